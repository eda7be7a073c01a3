"""Whether all ranks of a run still live, and where they wait for one another.

A collective has a time-out (--ddp_timeout), so that a rank that hangs does not keep the others for
ever. But rank 0 may tokenise, write or check files for longer while the others have nothing to do:
they wait for it outside of a collective (`wait_for_all`), at the store over which the launcher has
brought the ranks together. There every rank also says now and then that it lives. One that is
silent for most of the time-out ends the run, by name; so does one that has ended.

The thread that says so needs the interpreter now and then: a library call that holds it for the
whole time-out counts as silence. DeepSpeed waits in a collective for the part of a checkpoint that
rank 0 writes alone (ZeRO-1 and ZeRO-2: the weights); on a disk that needs longer for them raise
--ddp_timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from common import voice
from common.runs.ranks import name_ranks

BOOT = Path("/proc/sys/kernel/random/boot_id")
LOOKS = 10  # at the other ranks, in the seconds of the time-out
SILENT_LOOKS = 8  # in a row end the run: before the time-out of a collective, which names nobody
LONGEST_SLEEP = 0.5  # seconds between two looks of one who waits
CHECK_AFTER = 1  # seconds between its looks whether the others have ended
SAY_AFTER = 60  # seconds of waiting


class Heartbeat(threading.Thread):
    """This rank's sign of life, and its look at others: rank 0 watches all, the others rank 0."""

    def __init__(self, seconds: float):
        """seconds: --ddp_timeout."""
        super().__init__(name="heartbeat", daemon=True)
        self.seconds = seconds
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.watched = range(1, self.world) if self.rank == 0 else [0]
        self.passed = 0  # how often all have waited for one another
        self.over = threading.Event()
        self.store = connect(seconds)
        self.store.set(f"who/{self.rank}", f"{os.getpid()} {place()}")

    # ---- life ----
    def run(self) -> None:
        beats = dict.fromkeys(self.watched, -1)
        silent = dict.fromkeys(self.watched, 0)
        waiting_since = None
        # looks are counted, not seconds: where all processes were suspended, nobody was silent
        while not self.over.wait(self.seconds / LOOKS):
            for rank in self.watched:
                beat = self.beat_of(rank, beats[rank])
                silent[rank] = 0 if beat != beats[rank] else silent[rank] + 1
                beats[rank] = beat
            gone = [rank for rank in self.watched if silent[rank] >= SILENT_LOOKS]
            if gone and not self.over.is_set():
                self.end_run(gone)
            if self.rank == 0:
                waiting_since = self.tell_that_others_wait(waiting_since)

    def beat_of(self, rank: int, last: int) -> int:
        """How often a rank has said that it lives; `last` where the store cannot be reached."""
        try:
            self.store.add(f"beat/{self.rank}", 1)
            return self.store.add(f"beat/{rank}", 0)
        except RuntimeError:  # gone with the machine that held it
            return last

    def end_run(self, gone: list[int]) -> None:
        print(f"error: {self.why(gone)}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may be inside a collective

    def why(self, gone: list[int]) -> str:
        named = name_ranks(gone)
        with contextlib.suppress(RuntimeError):
            if any(self.has_ended(rank) for rank in gone):  # it has said why
                return f"lost another rank: {named} ended"
            if len(gone) == 1 and self.store.check([f"who/{gone[0]}"]):
                pid, host, _ = self.store.get(f"who/{gone[0]}").decode().split()
                named += f" (process {pid} on {host})"
        return (
            f"{named} gave no sign of life for {self.seconds * SILENT_LOOKS / LOOKS:.0f} s: "
            "stopped, stuck or cut off; the run is ended. "
            f"--ddp_timeout {self.seconds:.0f} sets how long the ranks wait for one another"
        )

    def tell_that_others_wait(self, since: float | None) -> float | None:
        """Since when others wait for what rank 0 does alone; it says so once a minute."""
        number = self.passed + 1
        with contextlib.suppress(RuntimeError):
            is_here = self.store.check([f"{number}/0"])  # it waits itself, for a third one
            if is_here or not self.store.check([f"{number}/what"]):
                return None
            if since is None or time.monotonic() - since < SAY_AFTER:
                return since or time.monotonic()
            what = self.store.get(f"{number}/what").decode()
            if number == self.passed + 1:
                voice.say(f"the other ranks wait for rank 0: {what}")
        return time.monotonic()

    # ---- waiting ----
    def wait_for_all(self, what: str) -> None:
        number = self.passed + 1
        self.store.set(f"{number}/{self.rank}", "")
        if self.rank:
            self.store.set(f"{number}/what", what)
        if self.store.add(f"{number}/here", 1) == self.world:
            self.store.set(f"{number}/all", "")
        self.wait_until_set(f"{number}/all", number, what)
        self.passed = number
        # all are beyond the one before
        self.store.delete_key(f"{number - 1}/{self.rank}")

    def wait_until_set(self, key: str, number: int, what: str) -> None:
        began = time.monotonic()
        check_at = CHECK_AFTER
        say_at = SAY_AFTER
        while not self.store.check([key]):  # store.wait would log a warning every time
            waited = time.monotonic() - began
            if waited > check_at:
                check_at = waited + CHECK_AFTER
                missing = self.refuse_ended(number)
                if missing and waited > say_at:
                    say_at = waited + SAY_AFTER
                    voice.say(f"rank 0 waits for {name_ranks(missing)}")
            time.sleep(min(LONGEST_SLEEP, 0.001 + waited / 20))

    def refuse_ended(self, number: int) -> list[int]:
        """The ranks that are not here yet; SystemExit where one of them has ended."""
        everybody = range(self.world)
        missing = [rank for rank in everybody if not self.store.check([f"{number}/{rank}"])]
        ended = [rank for rank in missing if self.has_ended(rank)]
        if ended and not self.store.check([f"{number}/all"]):
            raise SystemExit(f"lost another rank: {name_ranks(ended)} ended while others waited")
        return missing

    def has_ended(self, rank: int) -> bool:
        if self.store.check([f"left/{rank}"]):
            return True
        if not self.store.check([f"who/{rank}"]):
            return False
        pid, *where = self.store.get(f"who/{rank}").decode().split()
        return where == place().split() and not os.path.exists(f"/proc/{pid}")

    def stop(self) -> None:
        """This process ends."""
        if not self.over.is_set():
            self.over.set()
            with contextlib.suppress(RuntimeError):
                self.store.set(f"left/{self.rank}", "")
            self.join(5)


def connect(seconds: float):
    """A connection of its own to the store of this run."""
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=seconds)
    return dist.PrefixStore("heartbeat", dist.TCPStore(address, port, timeout=patience))


def place() -> str:
    """ "host space": processes that have it in common see each other in /proc. Machines may
    bear one name, so it has the number of their start too."""
    try:
        start = BOOT.read_text(encoding="ascii").strip()
        space = f"{start}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: nobody is seen
        space = f"process-{os.getpid()}"
    return f"{socket.gethostname()} {space}"


_own: Heartbeat | None = None  # of this process


def start(seconds: float) -> None:
    """Begin to watch and to be watched, where this is one of several ranks. seconds:
    --ddp_timeout."""
    global _own
    # without torchrun's agent rank 0 holds the store, from the process group on
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()
    if has_store and int(os.environ.get("WORLD_SIZE", 1)) > 1 and _own is None:
        _own = Heartbeat(seconds)
        _own.start()
        atexit.register(stop)


def stop() -> None:
    """Before this process ends: the others need not wait for it."""
    if _own is not None:
        _own.stop()


def seconds() -> float | None:
    """--ddp_timeout, where the ranks are watched."""
    return _own.seconds if _own else None


def wait_for_all(what: str) -> None:
    """Wait until all ranks are here, however long one of them works alone before. All ranks call
    it.

    what: rank 0 may do before, in a few words ("it tokenises"); said once a minute.
    SystemExit where a rank has ended.
    """
    if _own is not None:
        _own.wait_for_all(what)
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
