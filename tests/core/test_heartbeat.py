"""Ranks watch one another: long work of one keeps the others waiting, a silent one ends the run."""

import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from harness import ROOT, error_line, finish, start

from common.runs import heartbeat, ranks

SECONDS = 5  # the time-out
PRODUCT = [path for path in ROOT.glob("*/**/*.py") if "tests" not in path.parts]
RANK = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common import cli
from common.runs import heartbeat
heartbeat.SAY_AFTER = 1
def main():
    heartbeat.start({SECONDS})
    cli.wait_for_all("nothing")
    if sys.argv[1] == "works": time.sleep({SECONDS} + 2)
    if sys.argv[1] == "stops": os.kill(os.getpid(), signal.SIGSTOP)
    if sys.argv[1] == "stuck": time.sleep(60)  # it lives, and the other one gives up
    if sys.argv[1] == "gives up": raise SystemExit("timed out waiting for another rank")
    if sys.argv[1] == "dies": os.kill(os.getpid(), signal.SIGKILL)
    cli.wait_for_all("it tokenises")
    print("together again")
cli.run(main)
"""


@pytest.fixture(scope="module")
def ends():
    """What becomes of two ranks where one of them does something: (what, who) -> both."""
    pairs = {}
    for what, who in (
        ("works", 0),
        ("works", 1),
        ("stops", 0),
        ("stops", 1),
        ("dies", 0),
        ("stuck", 1),
    ):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        both = []
        for rank in range(2):
            other = "gives up" if what == "stuck" else "waits"
            word = what if rank == who else other
            both.append(start(["python", "-c", RANK, word], RANK=rank, **shared))
        pairs[what, who] = (store, both)
    found = {}
    for (what, who), (_, both) in pairs.items():
        other = finish(both[1 - who], 60)
        if what == "stops":  # there is no launcher
            both[who].kill()
        done = finish(both[who], 60)
        found[what, who] = (done, other) if who == 0 else (other, done)
    return found


@pytest.mark.parametrize("who", [0, 1])
def test_work_longer_than_the_time_out_keeps_the_others_waiting_and_is_told(ends, who):
    both = ends["works", who]
    assert [one.returncode for one in both] == [0, 0], both
    words = (
        "the other ranks wait for rank 0: it tokenises" if who == 0 else "rank 0 waits for rank 1"
    )
    assert words in both[0].stdout
    assert all("together again" in one.stdout for one in both)


@pytest.mark.parametrize("who", [0, 1])
def test_a_silent_rank_ends_the_others_by_name(ends, who):
    line = error_line(ends["stops", who][1 - who], 1)
    assert line.startswith(f"error: rank {who} (process ") and f"--ddp_timeout {SECONDS}" in line


def test_a_rank_that_has_ended_is_not_waited_for(ends):
    dead, other = ends["dies", 0]
    assert dead.returncode == -signal.SIGKILL
    assert "lost another rank: rank 0 ended" in error_line(other, 1)


def test_nobody_waits_in_a_barrier_for_what_one_rank_does_alone():
    """A barrier has a time-out; the only one left is for whoever has no heartbeat."""
    found = []
    for path in PRODUCT:
        if ".venv" not in path.parts:
            text = path.read_text(encoding="utf-8")
            found += [path.name] * len(re.findall(r"dist(?:ributed)?\.barrier\(", text))
            assert "days=" not in text or "init_process_group" not in text, path
            assert not re.search(r"ddp_timeout=\d", text), path
    assert found == ["heartbeat.py"]


def test_a_rank_that_is_stuck_does_not_blame_the_one_that_gave_up(ends):
    """The launcher then names it (test_launch.py)."""
    other, stuck = ends["stuck", 1]
    assert "timed out waiting" in error_line(other, 1)
    line = error_line(stuck, 1)
    assert line == "error: lost another rank: rank 0 ended" and ranks.is_consequence(line)


def test_rank_0_is_not_blamed_where_it_waits_itself(capsys):
    """Rank 1 waits for rank 2, and so does rank 0."""
    store = dist.HashStore()
    beat = SimpleNamespace(passed=0, store=store)
    store.set("1/what", "it tokenises")
    long_ago = time.monotonic() - 2 * heartbeat.SAY_AFTER
    heartbeat.Heartbeat.tell_that_others_wait(beat, long_ago)
    assert "wait for rank 0: it tokenises" in capsys.readouterr().out
    store.set("1/0", "")
    assert heartbeat.Heartbeat.tell_that_others_wait(beat, long_ago) is None
    assert not capsys.readouterr().out


def test_machines_of_one_name_are_two_places(tmp_path, monkeypatch):
    """Copies of one disk have one host name, and every machine's first space is pid:[4026531836]."""
    here = heartbeat.place()
    assert here == heartbeat.place() and len(here.split()) == 2
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(heartbeat, "BOOT", tmp_path / "boot_id")
    assert heartbeat.place() != here
