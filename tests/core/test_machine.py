"""Questions about the machine: requirements, Ascend, device ids, locks of killed builds."""

import os
import subprocess
import sys

import pytest
from harness import ROOT

from common.runs import machine


@pytest.fixture
def listed(tmp_path):
    """A requirements file that names another, with versions for old and new Pythons."""
    (tmp_path / "base.txt").write_text(
        '# a comment\nnumpy==1.0\nnew==2; python_version >= "3.11"\nnew==1; python_version < "3.11"\n'
    )
    (tmp_path / "all.txt").write_text("-r base.txt\nnumpy==2.0\nno-such-package==3.1+cpu\n")
    return tmp_path / "all.txt"


@pytest.mark.parametrize("version, new", [((3, 9), "1"), ((3, 10), "1"), ((3, 11), "2")])
def test_pins_of_a_file_and_of_those_it_names(listed, monkeypatch, version, new):
    """3.9 is older than 3.11, although the word is larger."""
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    assert machine.pins(listed) == {"numpy": "2.0", "new": new, "no-such-package": "3.1+cpu"}


def test_what_a_python_lacks(listed, monkeypatch, tmp_path, capsys):
    have = {"numpy": "2.0+cu130", "new": "0.1"}
    monkeypatch.setattr(machine, "installed", have.get)
    monkeypatch.setattr(sys, "version_info", (3, 11, 0, "final", 0))
    assert machine.missing(listed) == {"new": "0.1", "no-such-package": None}
    lacks = ["new==2 (0.1)", "no-such-package==3.1+cpu (not installed)"]
    assert machine.shortfall(listed) == lacks
    assert machine.main("missing", str(listed)) == 0
    assert capsys.readouterr().out.splitlines() == lacks
    assert machine.shortfall(tmp_path / "absent.txt") == []
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    assert machine.shortfall(listed)[0].startswith("Python 3.10, 3.11 or 3.12 (this is ")


@pytest.mark.parametrize("given, order", [("3,0", "0,3"), ("10,9,2,9", "2,9,10"), ("0", "0")])
def test_device_ids_ascend_as_numbers(given, order, capsys):
    assert machine.ascending(given) == order
    assert machine.main("ascending", given) == 0 and capsys.readouterr().out == f"{order}\n"


@pytest.mark.parametrize("trace", ["card", "npu-smi", "none"])
@pytest.mark.parametrize("wanted", ["", "npu", "cuda", "cpu"])
def test_an_ascend_machine(monkeypatch, tmp_path, trace, wanted):
    """Its card, or its tool where the card was not passed into the container; not against the user's word."""
    if trace != "none":
        name = {"card": "davinci0", "npu-smi": "npu-smi"}[trace]
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(machine, "CARDS", str(tmp_path / "davinci[0-9]*"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DANPU_DEVICE", wanted)
    expected = trace != "none" and wanted in ("", "npu")
    assert machine.is_ascend() == expected and machine.main("ascend") == int(not expected)
    assert bool(machine.ascend_cards()) == (trace == "card")
    file = "requirements-npu.txt" if expected else "requirements.txt"
    assert machine.requirements(ROOT) == ROOT / file
    assert machine.requirements(tmp_path) == tmp_path / "requirements.txt"


def test_locks_of_killed_builds_are_old(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("py311/cpu_adam/lock", "py311/utils/lock", "py311/utils/block"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert machine.stale_build_locks() == []
    os.utime(tmp_path / "py311/utils/lock", (1, 1))
    assert machine.stale_build_locks() == [str(tmp_path / "py311/utils/lock")]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "nowhere"))
    assert machine.stale_build_locks() == []


def test_the_lock_of_a_build_that_takes_long_is_left_alone(monkeypatch, tmp_path):
    """On a busy machine minutes; taken away, a second build would write the same files."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as ninja:
        assert machine.stale_build_locks() == []
        ninja.kill()
    assert machine.stale_build_locks() == [str(lock)]
