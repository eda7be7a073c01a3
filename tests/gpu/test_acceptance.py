"""The acceptance run of a card, dry: each check on tiny shapes, here on a CPU."""

import time

import acceptance
import pytest
from acceptance import DRY, Row, Session
from harness import ROOT, expect, finish, start

from common import device

SCRIPT = ROOT / "tests/gpu/acceptance.py"


@pytest.mark.slow
def test_every_check_runs_on_tiny_shapes(tmp_path):
    done = finish(start(["python", SCRIPT, "--dry-run", "--output_dir", tmp_path], fork=True))
    expect(done)
    for name in acceptance.CHECKS:
        assert f" {name} took " in done.stdout, name
    table = (tmp_path / "acceptance.md").read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) > 30 and "FAIL" not in table
    for word in ("waits of the host", "ZeRO-3", "64m compiled", "CUDA_VISIBLE_DEVICES=", "killed"):
        assert word in table


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path, True, time.monotonic() + 60, DRY)


def test_a_check_that_fails_hangs_or_breaks_ends_no_other(session, monkeypatch):
    def hangs(session):
        yield Row("before it hangs", "1", "1", True)
        session.run("-c", "import time; time.sleep(60)")

    def fails(session):
        session.run("-c", "import sys; print('error: the reason'); sys.exit(3)")
        yield Row("never", "")

    def breaks(session):
        yield Row("never", str(acceptance.losses(session.work)))

    def works(session):
        yield Row("works", "2", "2", True)

    checks = {"hangs": hangs, "fails": fails, "breaks": breaks, "works": works}
    monkeypatch.setattr(acceptance, "CHECKS", checks)
    monkeypatch.setattr(acceptance, "LIMITS", dict.fromkeys(checks, 20) | {"hangs": 0.2})
    began = time.monotonic()
    rows = acceptance.collect(session, list(checks))
    assert time.monotonic() - began < 30
    assert [row.verdict() for row in rows] == ["ok", "FAIL", "FAIL", "FAIL", "ok"]
    assert rows[1].figure == "stopped: no time left"
    assert rows[2].figure == "exit 3: error: the reason" and "trainer_state.json" in rows[3].figure


def test_what_is_not_begun_when_the_time_is_up_is_told(session, monkeypatch):
    session.ends = time.monotonic()
    (row,) = acceptance.collect(session, ["kernels"])
    assert row.verdict() == "FAIL" and row.figure == "not begun: no time left"


def test_targets_are_held_on_a_card(session):
    """A dry run judges no speed; on a card the same figures would fail."""
    session.dry = False
    session.found = {"plain": {"speed": 100, "gib": 10, "losses": {5: 2.0}}, "64m eager": 100.0}
    session.found["product_flops"] = 6 * acceptance.PARAMETERS * 1000
    found = {"speed": 60, "gib": 11, "losses": {5: 2.1}}
    rows = list(acceptance.speed_rows(session, "checkpointing", found))
    assert [row.verdict() for row in rows] == ["FAIL"] * 3 and rows[2].figure == "5.00%"
    assert acceptance.plain_row(session, "plain", "", 299).ok is False
    assert acceptance.plain_row(session, "plain", "", 301).ok is True
    assert acceptance.times_eager(session, "", "64m compiled", 139).ok is False
    assert acceptance.times_eager(session, "", "64m compiled", 141).ok is True


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    with pytest.raises(SystemExit, match="no CUDA card is visible; --dry-run takes tiny shapes"):
        acceptance.card(dry=False)
    assert "torch" in acceptance.card(dry=True)


def test_a_missing_wheel_folder_is_one_line():
    done = finish(start(["bash", ROOT / "tests/gpu/acceptance.sh"], WHEELS="/none"))
    assert expect(done, 2).stderr == "launch: WHEELS=/none is no folder\n"
