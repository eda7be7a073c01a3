"""Which process of a run failed first, and what of the others' words only follows from it.

When one rank dies, the others lose it in the middle of a collective and fail too: with an error of
gloo, NCCL, HCCL or the store that tells nothing. On a loaded machine such a rank may even end
before the one that it lost. So what counts is when a process ended and what its last words are.
Used by launch.py; needs no package.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from common.runs import machine

LAST_LINES = 30  # of a failed rank's stderr
KEPT_LINES = 400  # of what rank 0 says
HELD_SECONDS = 10  # an error that its process survives is shown after so long
GRACE_SECONDS = 25  # a rank that does not obey SIGTERM is killed by torchrun's agent after 30
RECENT_SECONDS = 60  # an older error is one that its rank survived
INTERRUPTED = 75

# what a rank says that has lost another one; never the reason why a run ended, unless nothing else
# is there
LOST = re.compile(
    r"connection (closed|reset|refused)( by peer)?|broken pipe|socket (closed|timeout)|"
    r"failed to recv|remote process exited|connectFullMesh|timed out waiting|"
    r"timed out after .* waiting|wait timeout|gloo/|NCCL (error|communicator|watchdog)|"
    r"nccl(Remote|System|Internal)Error|"
    r"ProcessGroup(Gloo|NCCL|HCCL)|hccl|\bE[IJ]\d{4}\b|ERR0\d{4}|TCPStore|DistNetworkError|"
    r"DistStoreError|DistBackendError|client socket has|sendBytes|recvValue|watchdog|heartbeat|"
    r"monitoredBarrier|lost (another|a) rank|notify wait",
    re.IGNORECASE,
)
# what a rank may say by itself although it sounds like that
OWN = re.compile(
    r"out of memory|address already in use|EADDRINUSE|failed to (bind|listen)|invalid ?usage|"
    r"duplicate gpu|no space left|https?://|HTTPS?Connection|httpx|requests\.exceptions",
    re.IGNORECASE,
)
# what it says when the others were there, but did not answer
NO_ANSWER = re.compile(r"timed out waiting|timed out after|operation timeout", re.IGNORECASE)
PREFIX = re.compile(r"^\[(rank|default)\d+\]:\s?(?!\[)")  # torch's, on lines of a traceback
CPP_ERROR = re.compile(r"^(\[rank\d+\]:)?\[[EF]\d{4} ")  # [rank1]:[E1129 13:05 Process...cpp:1]
CPP_WARNING = re.compile(r"^(\[rank\d+\]:)?\[[WI]\d{4} ")
TRACEBACK = "Traceback (most recent call last)"
CHAINED = ("During handling of the above", "The above exception was the direct cause")
AN_ERROR = re.compile(r"^(error: |[\w.]*(Error|Exception|Interrupt|Fault)\b)")


# ---- last words ----------------------------------------------------------------------------------


def last_words(text: list[str]) -> list[str]:
    """A rank's stderr without what libraries log while a process ends."""
    lines = [line.rstrip() for line in text]
    while lines and (not lines[-1] or CPP_WARNING.match(lines[-1])):
        lines.pop()
    return lines


def error_of(text: list[str]) -> str:
    """The error that a rank ended with, "" where it says none: the first exception of its last
    traceback (the others came of it), else what C++ reports, or a last line that reads like one."""
    lines = [PREFIX.sub("", line) for line in text]
    starts = [i for i, line in enumerate(lines) if TRACEBACK in line]
    if starts:
        return exception_of(lines, starts)
    for i, line in enumerate(lines):
        if CPP_ERROR.match(line) or line.startswith("terminate called"):
            return "\n".join(lines[i : i + LAST_LINES])
    last = lines[-3:]
    begins = [i for i, line in enumerate(last) if AN_ERROR.match(line)]
    return "\n".join(last[begins[0] :]) if begins else ""


def exception_of(lines: list[str], starts: list[int]) -> str:
    """The message of the traceback that the last one of `starts` goes back to."""
    *earlier, first = starts
    for start in reversed(earlier):
        if not any(line.startswith(CHAINED) for line in lines[start:first]):
            break
        first = start
    message = []
    for line in lines[first + 1 :]:
        if line.startswith((*CHAINED, TRACEBACK)):
            break
        if message or (line and not line.startswith(" ")):
            message.append(line)
    return "\n".join(message[:LAST_LINES]).strip()


def is_consequence(error: str) -> bool:
    """Whether these words only say that another rank is gone."""
    return bool(LOST.search(error)) and not OWN.search(error)


# ---- who was first -------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a rank ended. code: negative for a signal; at: when, in seconds since 1970; said: when it
    spoke last; text: the end of its stderr."""

    rank: int
    code: int
    at: float
    said: float = 0.0
    text: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.text = last_words(self.text)
        self.error = error_of(self.text)


def first_failure(ranks: list[Ended]) -> Ended:
    """The rank whose failure is the reason for the others'."""
    began = min(one.at for one in ranks)

    def doubt(one: Ended) -> tuple[int, float]:
        """How sure it is that another one was the reason, and when this one failed."""
        by_launcher = one.code in (-signal.SIGTERM, INTERRUPTED) and one.at > began
        by_launcher |= one.code == -signal.SIGKILL and one.at > began + GRACE_SECONDS
        speaks_of_it = one.error and not (by_launcher and one.said < began - RECENT_SECONDS)
        # its words may stand there long before it ends
        when = min(one.at, one.said) if speaks_of_it and one.said else one.at
        if speaks_of_it:
            return (2 if is_consequence(one.error) else 0), when
        return (3 if by_launcher else 1), when

    return min(ranks, key=doubt)


def consequences(first: Ended, ranks: list[Ended]) -> str:
    """What the other ranks said, for one line: "" where they said nothing."""
    said: dict[str, list[int]] = {}
    for one in ranks:
        if one is not first and one.error not in ("", first.error):
            said.setdefault(in_short(one.error), []).append(one.rank)
    return "; ".join(f"{name_ranks(numbers)} said: {words}" for words, numbers in said.items())


def in_short(error: str) -> str:
    """An error without the addresses and numbers that differ from rank to rank."""
    if is_consequence(error):
        return max((match[0] for match in LOST.finditer(error)), key=len)
    return error.splitlines()[0][:160]


def without_an_answer(first: Ended, ranks: list[Ended]) -> list[int]:
    """The ranks that let the others wait until `first` gave up: they have nothing to say of it, or
    noticed elsewhere that it had (common/runs/heartbeat.py)."""
    if not (is_consequence(first.error) and NO_ANSWER.search(first.error)):
        return []  # it died of something else, perhaps of a time-out of its own
    return [one.rank for one in ranks if not one.error or "lost another rank" in one.error]


def name_ranks(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in spans]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


# ---- the processes -------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Notes when each child of this process ends; torchrun's agent only looks now and then. Ends
    those that are stopped (SIGSTOP) and would hear nothing else. Remembers what memory there was
    before the first ended."""

    def __init__(self, expected: int, patience: int):
        """expected: how many children there will be; patience: seconds that one may be stopped."""
        super().__init__(daemon=True)
        self.expected = expected
        self.patience = patience
        self.seen: set[int] = set()  # pids
        self.ended: dict[int, float] = {}  # pid -> seconds since 1970
        self.stopped: dict[int, int] = {}  # pid -> looks in a row that found it stopped
        self.killed: set[int] = set()  # pids, by end_stopped
        self.resident: dict[int, int] = {}  # pid -> bytes it held when last looked at
        self.host: machine.HostMemory | None = None  # at the same time

    def run(self) -> None:
        if not hasattr(os, "pidfd_open"):
            return
        poll = select.poll()
        known: dict[int, int] = {}  # descriptor -> pid
        seen = self.seen
        while True:
            for pid in children() if len(seen) < self.expected else ():
                if pid in seen:
                    continue
                seen.add(pid)
                if not self.ended:
                    self.look_at_memory({pid})
                try:
                    descriptor = os.pidfd_open(pid)
                except OSError:  # forbidden in some containers, or gone
                    continue
                known[descriptor] = pid
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(50 if len(seen) < self.expected else 1000):
                self.ended[known[descriptor]] = time.time()
                poll.unregister(descriptor)
                os.close(descriptor)
            alive = set(known.values()) - self.ended.keys()
            if not self.ended:
                self.look_at_memory(alive)
            self.end_stopped(alive)

    def look_at_memory(self, pids: set[int]) -> None:
        """While all live: what a rank held that the system kills is known from before."""
        self.host = machine.host_memory()
        self.resident |= {pid: machine.resident(pid) for pid in pids}

    def memory_of(self, pid: int) -> str:
        """What a process held and what was free, for people; "" where it was never looked at."""
        held = self.resident.get(pid)
        if not held or self.host is None:
            return ""
        gib = 2**30
        return (
            f"it held {held / gib:.1f} GiB, and {self.host.free / gib:.1f} GiB of the machine's "
            f"{self.host.total / gib:.1f} GiB were free, when last looked at"
        )

    def end_stopped(self, pids: set[int]) -> None:
        """About once a second; looks are counted, as they stop where this process is stopped
        too."""
        for pid in pids:
            self.stopped[pid] = self.stopped.get(pid, 0) + 1 if is_stopped(pid) else 0
            if self.stopped[pid] > (0 if self.ended else self.patience):
                if not self.ended:  # the others are on other machines
                    say(f"launch: process {pid} was stopped (SIGSTOP) for {self.patience} s")
                self.killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return status.rpartition(") ")[2].startswith("T")
    return False


def children() -> list[int]:
    """Processes that the main thread has started and that are there."""
    own = os.getpid()
    with contextlib.suppress(OSError):
        pids = Path(f"/proc/{own}/task/{own}/children").read_text(encoding="ascii")
        return [int(pid) for pid in pids.split()]
    return []


class Relay:
    """What rank 0 says on stderr, on its way to the terminal: errors are held back until it is
    known whether they are the reason or only follow from another rank's.

    On a terminal the rank gets one too, so that its progress bar stays a bar.
    """

    def __init__(self, watch: Watch):
        self.watch = watch
        self.real = os.dup(2)
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.said = 0.0  # when the last of them came
        self.unfinished = b""
        self.held = b""
        self.held_since = 0.0
        if os.isatty(2):
            self.source, end = open_terminal(2)
        else:
            self.source, end = os.pipe()
        os.dup2(end, 2)
        os.close(end)
        self.thread = threading.Thread(target=self.pump, daemon=True)
        self.thread.start()

    def pump(self) -> None:
        while True:
            ready, _, _ = select.select([self.source], [], [], 1)
            if ready:
                try:
                    data = os.read(self.source, 1 << 16)
                except OSError:  # a terminal whose other end is closed
                    data = b""
                if not data:
                    return
                self.take(data)
            is_survived = self.held and time.time() - self.held_since > HELD_SECONDS
            # once a rank has ended the run ends too, however long the others take to
            if is_survived and not self.watch.ended:
                self.release()

    def take(self, data: bytes) -> None:
        self.said = time.time()
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        for line in lines:
            self.lines.append(line.decode(errors="replace").rpartition("\r")[2])
        if self.held:
            self.held += data
            return
        # from the line on that begins an error
        at = 0
        for line in data.splitlines(keepends=True):
            if begins_an_error(line.decode(errors="replace")):
                self.held = data[at:]
                self.held_since = time.time()
                data = data[:at]
                break
            at += len(line)
        self.write(data)

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more; the rank goes on
            while data:
                data = data[os.write(self.real, data) :]

    def release(self) -> None:
        """Show what is held back."""
        self.write(self.held)
        self.held = b""

    def end(self, release: bool) -> None:
        """The ranks have ended: all that they said is here, and stderr is what it was."""
        sys.stderr.flush()
        os.dup2(self.real, 2)
        self.thread.join(3)  # a process that outlives its rank may still hold the other end
        if self.unfinished:
            self.lines.append(self.unfinished.decode(errors="replace"))
        if release:
            self.release()


def begins_an_error(line: str) -> bool:
    plain = PREFIX.sub("", line)
    begins = plain.startswith(("error: ", "terminate called"))
    return begins or TRACEBACK in plain or bool(CPP_ERROR.match(line))


def open_terminal(like: int) -> tuple[int, int]:
    """A pseudo-terminal as wide as the terminal `like` -> (what is written to it, its other
    end)."""
    import fcntl
    import termios
    import tty

    ours, theirs = os.openpty()
    tty.setraw(theirs)  # the real terminal does what there is to do
    size = fcntl.ioctl(like, termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    return ours, theirs


# ---- the report ----------------------------------------------------------------------------------


def report(failures: dict, watch: Watch, relay: Relay | None, logs: str) -> int:
    """Say why a run failed, the reason last; returns the exit code for all of it.

    failures: rank -> torch's ProcessFailure; relay: None where every rank speaks for itself.
    """
    ranks = [how_it_ended(rank, one, watch, relay, logs) for rank, one in failures.items()]
    first = first_failure(ranks)
    others = consequences(first, ranks)
    silent = without_an_answer(first, ranks)
    if silent:
        say(
            f"error: {name_ranks(silent)} took no part in what the others waited for (stopped or "
            "stuck; --ddp_timeout sets how long they wait); the run is ended"
        )
        return 1
    is_shown = failures[first.rank].local_rank == 0  # it has spoken on the terminal
    if relay is not None and not is_shown and not any(one.error for one in ranks if one.rank == 0):
        relay.release()
    if others:
        say(f"launch: rank {first.rank} failed first; of the others {others}")
        if is_consequence(first.error) and int(os.environ.get("NNODES", 1)) > 1:
            say("launch: every rank here only lost others: see the other machines")
    elif len(ranks) > 1 and (relay is None or (first.error and not is_shown)):
        say(f"launch: rank {first.rank} failed first")

    words = "\n".join(first.text[-LAST_LINES:])
    if relay is not None and is_shown and relay.held:
        relay.release()
    elif words and (others or not is_shown) and first.code != INTERRUPTED:
        say(words)
    code = first.code
    if code < 0:
        name = signal.Signals(-code).name
        pid = failures[first.rank].pid
        why = why_killed(watch, pid) if code == -signal.SIGKILL else ""
        say(f"rank {first.rank} was killed by {name}{why}; the other ranks were ended")
    elif relay is not None and not words and code not in (2, INTERRUPTED):
        say(f"launch: rank {first.rank} ended with code {code} and without a word")
    return code if code in (1, 2, INTERRUPTED) else 1


def why_killed(watch: Watch, pid: int) -> str:
    """Of a rank that got SIGKILL: the system sends it where memory ends, and says nothing to it."""
    if pid in watch.killed:
        return ""
    figures = watch.memory_of(pid)
    return ", probably out of host memory" + (f" ({figures})" if figures else "")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def how_it_ended(rank: int, failure, watch: Watch, relay: Relay | None, logs: str) -> Ended:
    """One of torch's ProcessFailures with its time and words."""
    # one that was never seen ended at once
    at = watch.ended.get(failure.pid, 0.0) if watch.ended else time.time()
    if relay is not None and failure.local_rank == 0:
        return Ended(rank, failure.exitcode, at, relay.said, list(relay.lines))
    for file in Path(logs).glob(f"**/{failure.local_rank}/stderr.log"):
        text = file.read_text(encoding="utf-8", errors="replace").splitlines()
        said = file.stat().st_mtime
        return Ended(rank, failure.exitcode, at, said, text[-KEPT_LINES:])
    return Ended(rank, failure.exitcode, at)
