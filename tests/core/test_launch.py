"""The launcher: exit codes, last words, signals, a dead rank, the choice of Python."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from harness import ROOT, environment, error_line, expect, finish, shell, start

SCRIPT = """
import os, signal, sys, time
mode, rank = sys.argv[-1], int(os.environ["RANK"])
words = ["rank", str(rank), "of", os.environ["WORLD_SIZE"], "port", os.environ["MASTER_PORT"], *sys.argv[1:-1]]
os.write(1, (" ".join(words) + "\\n").encode())  # at once: the ranks write to one pipe
if mode == "fail" and rank == 1: sys.exit("error: rank one is unhappy")
if mode == "usage": sys.exit(2)
if mode == "killed" and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
if mode == "stop": signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if mode != "ok": time.sleep(60)
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "run.sh").write_text(
        f'set -euo pipefail\nsource {ROOT}/common/launch.sh\nlaunch {tmp_path}/train.py "$@"\n'
    )
    return tmp_path / "run.sh"


def test_one_rank_speaks_and_environment_becomes_flags(recipe):
    out = expect(shell(recipe, "ok", MODEL="a b", DATA="x.jsonl:0.5 y.csv", OUTPUT="o")).stdout
    assert "rank 0 of 2" in out and "rank 1" not in out
    assert "--model_name_or_path a b --data_path x.jsonl:0.5 y.csv --output_dir o" in out


def test_verbose_shows_every_rank_and_nproc_is_obeyed(recipe):
    out = expect(shell(recipe, "ok", NPROC=3, DANPU_VERBOSE=1)).stdout
    assert all(f"rank {i} of 3" in out for i in range(3))


FAILURES = [
    ("usage", 2, ""),
    ("fail", 1, "error: rank one is unhappy"),
    ("killed", 1, "rank 1 was killed by SIGKILL"),
]


@pytest.mark.parametrize("mode, code, words", FAILURES)
def test_exit_code_and_last_words_of_a_failing_rank(recipe, mode, code, words):
    began = time.time()
    result = expect(shell(recipe, mode), code)
    assert time.time() - began < 30, "the other rank sleeps for 60 s and must have been ended"
    assert words in (result.stderr.strip().splitlines() or [""])[-1]
    assert "Traceback" not in result.stderr


def test_ranks_end_with_a_launcher_that_is_killed_outright(tmp_path):
    """Else they would train on into the folder that the next start uses."""
    (tmp_path / "train.py").write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom common import cli\n"
        "def main():\n    print('here', flush=True)\n    time.sleep(60)\ncli.run(main)\n"
    )
    (tmp_path / "run.sh").write_text(f"source {ROOT}/common/launch.sh; launch {tmp_path}/train.py")
    process = start(["bash", tmp_path / "run.sh"])
    assert process.stdout.readline() == "here\n"
    ranks = psutil.Process(process.pid).children()
    process.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert len(gone) == 2 and not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_the_ranks_which_stop_in_order(recipe, number):
    process = start(["bash", recipe, "stop"])
    assert "rank 0" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(number)
    assert expect(finish(process, 30), 75)
    left = subprocess.run(
        ["pgrep", "-f", str(recipe.parent / "train.py")], capture_output=True, text=True
    ).stdout
    assert not left.strip(), "a rank was left behind"


def test_two_runs_at_once_do_not_share_a_port(recipe):
    runs = [start(["bash", recipe, "ok"]) for _ in range(2)]
    assert all("rank 0 of 2" in expect(finish(run, 60)).stdout for run in runs)


def test_usage_errors(recipe):
    assert "NPROC=two" in error_line(shell(recipe, "ok", NPROC="two"), 2)
    assert "HOSTFILE" in error_line(shell(recipe, "ok", HOSTFILE="/nowhere"), 2)
    expect(shell(recipe, "ok", NNODES=2), 1)


def test_several_nodes_on_one_machine(recipe):
    """Two launchers as two nodes, one process each."""
    env = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29571, "NPROC": 1}
    nodes = [start(["bash", recipe, "ok"], NODE_RANK=i, **env) for i in range(2)]
    outs = [expect(finish(node, 60)).stdout for node in nodes]
    assert "rank 0 of 2" in outs[0] and "rank 1 of 2" in outs[1]


def test_no_venv_is_made_when_forbidden(recipe, tmp_path):
    """A Python without the requirements, DANPU_NO_VENV=1: one line that names what is missing."""
    bare = tmp_path / "bare"
    subprocess.run(
        [os.path.realpath(os.sys.executable), "-m", "venv", "--without-pip", bare], check=True
    )
    env = environment(DANPU_NO_VENV=1)
    env["PATH"] = f"{bare}/bin:/usr/bin:/bin"
    result = subprocess.run(["bash", recipe, "ok"], env=env, capture_output=True, text=True)
    line = error_line(result, 1)
    assert "torch==" in line and "not installed" in line and "pip install -r" in line


def test_an_incomplete_python_gets_a_venv(recipe, tmp_path):
    """Without the flag the launcher makes root/.venv; a copy of the project with one absent requirement is quick."""
    project = tmp_path / "project"
    (project / "common").mkdir(parents=True)
    for name in ("launch.sh", "launch.py"):
        (project / "common" / name).write_text((ROOT / "common" / name).read_text())
    (project / "requirements.txt").write_text("danpu-no-such-package==1\n")
    (project / "run.sh").write_text(
        f'set -euo pipefail\nsource {project}/common/launch.sh\nlaunch {project}/train.py "$@"\n'
    )
    result = shell(project / "run.sh", "ok", PIP_NO_INDEX=1, cwd=project)
    assert (
        f"making {project}/.venv" in result.stdout
        and "installing requirements.txt" in result.stdout
    )
    assert "pip install failed" in result.stderr and result.returncode == 1
    assert (project / ".venv/bin/python").exists()
    assert Path(ROOT / "requirements.txt").exists()


def test_a_torch_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch_cpu.so: broken')")
    command = ["python", ROOT / "common/launch.py", "auto", tmp_path / "train.py"]
    line = error_line(finish(start(command, PYTHONPATH=tmp_path)), 1)
    assert "cannot import torch" in line and "libtorch_cpu.so" in line and "check_env" in line
