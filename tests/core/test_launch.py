"""The launcher: exit codes, last words, signals, a dead rank, the choice of Python and its first install."""

import contextlib
import fcntl
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from harness import ROOT, error_line, expect, finish, shell, start
from harness import environment as variables

from common import device, launch
from common.runs import environment, machine, ranks

SCRIPT = """
import os, signal, sys, time
mode, rank = sys.argv[-1], int(os.environ["RANK"])
words = ["rank", str(rank), "of", os.environ["WORLD_SIZE"], "port", os.environ["MASTER_PORT"], *sys.argv[1:-1]]
os.write(1, (" ".join(words) + "\\n").encode())  # at once: the ranks write to one pipe
if mode == "fail" and rank == 1: sys.exit("error: rank one is unhappy")
if mode == "usage": sys.exit(2)
if mode == "memory": sys.exit(f"error: {os.environ.get('PYTORCH_ALLOC_CONF')}")
if mode == "killed" and rank == 1: time.sleep(0.5) or os.kill(os.getpid(), signal.SIGKILL)
if mode == "stop":
    os.write(2, b"chatter of a library\\n" * rank)
    signal.signal(signal.SIGTERM, lambda *_: time.sleep(0.5 - rank / 2) or sys.exit(75))
if mode != "ok": time.sleep(60)
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "run.sh").write_text(
        f'set -euo pipefail\nsource {ROOT}/common/launch.sh\nlaunch {tmp_path}/train.py "$@"\n'
    )
    return tmp_path / "run.sh"


def launcher(recipe, *flags, **env):
    """launch.py started without the shell, which has nothing to add where neither its variables nor
    its process are the point."""
    command = ["python", ROOT / "common/launch.py", "auto", recipe.parent / "train.py", *flags]
    return start(command, **env)


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
    ("killed", 1, "rank 1 was killed by SIGKILL, probably out of host memory (it held 0."),
]


@pytest.mark.parametrize("mode, code, words", FAILURES)
def test_exit_code_and_last_words_of_a_failing_rank(recipe, mode, code, words):
    process = launcher(recipe, mode)
    began = time.time()
    result = expect(finish(process), code)
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
    assert expect(finish(process, 30), 75).stderr == "", "what the other rank said is no reason"
    left = subprocess.run(
        ["pgrep", "-f", str(recipe.parent / "train.py")], capture_output=True, text=True
    ).stdout
    assert not left.strip(), "a rank was left behind"


def test_a_signal_ends_a_launcher_that_waits_for_other_machines(recipe):
    env = {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29572}
    process = launcher(recipe, "ok", NPROC=1, **env)
    wait_until_listening(29572)
    process.send_signal(signal.SIGTERM)
    assert "interrupted. The same command" in expect(finish(process, 20), 75).stdout


def wait_until_listening(port):
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def test_a_signal_that_comes_before_a_rank_listens_is_an_interruption(recipe):
    process = start(["bash", recipe, "sleep"])
    assert "rank 0" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in expect(finish(process, 40), 75).stderr


def test_two_runs_at_once_do_not_share_a_port(recipe):
    runs = [launcher(recipe, "ok") for _ in range(2)]
    assert all("rank 0 of 2" in expect(finish(run, 60)).stdout for run in runs)


def test_usage_errors(recipe):
    assert "NPROC=two" in error_line(shell(recipe, "ok", NPROC="two"), 2)
    assert "HOSTFILE" in error_line(shell(recipe, "ok", HOSTFILE="/nowhere"), 2)
    expect(shell(recipe, "ok", NNODES=2), 1)


def test_a_hostfile_needs_pdsh_and_hands_variables_on(recipe, tmp_path):
    """deepspeed's launcher starts the other machines through pdsh and gives them few variables."""
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("first slots=1\n# a note\nsecond slots=1\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    env = {"HOSTFILE": hosts, "PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": tmp_path}
    assert "apt-get install pdsh" in error_line(shell(recipe, "ok", **env), 1)
    for name, body in (("ssh", "echo 10.0.0.1"), ("pdsh", f'printf "%s\\n" "$@" >{tmp_path}/said')):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    env |= {
        "HF_ENDPOINT": "https://a.mirror/with $pace",
        "HF_TOKEN": "hf_secret",
        "HF_APIKEY": "hf_secret",
        "DS_ACCELERATOR": "cpu",
        "DANPU_KEY": "/keys/mine",
        "DS_ENV_FILE": tmp_path / "own",
    }
    (tmp_path / "own").write_text("\nNCCL_SOCKET_IFNAME=eth7")
    done = expect(shell(recipe, "ok", **env))
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "own").read_text() == "\nNCCL_SOCKET_IFNAME=eth7", "the user's own file"
    for given in ("NCCL_SOCKET_IFNAME", "DANPU_KEY", "TOKENIZERS_PARALLELISM"):
        assert f"export {given}=" in said, given
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in tmp_path.glob("danpu-env*"))
    assert "first,second" in said and r'export HF_ENDPOINT="https://a.mirror/with \$pace"' in said
    assert "hf_secret" not in said + done.stdout + done.stderr
    assert "--no_local_rank" not in said and "train.py" in said


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_blocks_of_memory_grow_unless_the_user_says_otherwise(recipe, monkeypatch, given, expected):
    """Packed rows have another length each step; torch's older name of the variable counts too."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert error_line(shell(recipe, "memory", NPROC=1, **given), 1) == f"error: {expected}"


def test_several_nodes_on_one_machine(recipe):
    """Two launchers as two nodes, one process each."""
    env = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29571, "NPROC": 1}
    nodes = [start(["bash", recipe, "ok"], NODE_RANK=i, **env) for i in range(2)]
    outs = [expect(finish(node, 60)).stdout for node in nodes]
    assert "rank 0 of 2" in outs[0] and "rank 1 of 2" in outs[1]


# ---- the command that continues ----------------------------------------------------------------------------------


def test_the_printed_command_is_the_one_that_was_typed(tmp_path):
    """Variables included, flags that the wrapper adds left out, nothing that would begin anew; the same words again
    give the same command."""
    (tmp_path / "train.py").write_text("import os; print(os.environ['DANPU_RERUN'])")
    wrapper = tmp_path / "my run.sh"
    wrapper.write_text(
        f"set -euo pipefail\nknobs='SIZE STAGES'\nsource {ROOT}/common/launch.sh\nSIZE=${{SIZE:-tiny}}\n"
        f'OUTPUT=${{OUTPUT:-elsewhere}}\nlaunch {tmp_path}/train.py --use_lora true --deepspeed x.json "$@"\n'
    )
    given = {"MODEL": "a b", "DATA": "x.jsonl:0.5 它's.csv", "NPROC": 1, "STAGES": "sft dpo"}
    given |= {"DANPU_CACHE": str(tmp_path), "DANPU_KEY": f"{tmp_path}/key"}
    flags = ["--lora_r", "4", "--overwrite_output_dir", "true", "--system_prompt", "用'中文'答"]
    flags += ["--overwrite-output-dir", "--deepspeed=mine.json"]
    printed = expect(shell(wrapper, *flags, **given)).stdout.strip()
    assert printed == (
        "MODEL='a b' DATA='x.jsonl:0.5 它'\\''s.csv' NPROC=1 STAGES='sft dpo' "
        f"DANPU_CACHE={tmp_path} DANPU_KEY={tmp_path}/key bash '{wrapper}' --lora_r 4 --system_prompt '用'\\''中文'\\''答' --deepspeed=mine.json"
    )
    again = finish(start(["bash", "-c", printed]))
    assert expect(again).stdout.strip() == printed


# ---- whose error it is -------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys, time
order, rank = sys.argv[-1].split(","), int(os.environ["RANK"])
what = dict(word.split("=") for word in order).get(str(rank), "lost")
gloo = f"[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:{4000 + rank}"
if what == "raises": raise ValueError(f"rank {rank} has a bad row")
if what == "killed": os.kill(os.getpid(), signal.SIGKILL)
if what == "late":  # its words are out, and its end takes longer than that of the ranks that lost it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("Traceback (most recent call last):\\n  line\\nValueError: rank", rank, "has a bad row", file=sys.stderr)
    time.sleep(1.5)
    sys.exit(1)
if what == "hangs": time.sleep(60)
if what == "waits":
    time.sleep(1)
    sys.exit("error: timed out waiting for another rank, which lives but takes no part")
if what == "tidies":  # an exception, and another while it is handled
    try:
        raise ValueError(f"rank {rank} has a bad row")
    finally:
        raise RuntimeError(gloo)
time.sleep(0.7)
raise RuntimeError(gloo)
"""


@pytest.mark.parametrize(
    "order, ranks, last",
    [
        ("9=raises", 16, "ValueError: rank 9 has a bad row"),
        ("1=late", 2, "ValueError: rank 1 has a bad row"),
        ("0=raises", 4, "ValueError: rank 0 has a bad row"),
        ("1=tidies", 2, ""),
        ("2=killed", 3, "rank 2 was killed by SIGKILL, probably out of host memory"),
    ],
)
def test_the_error_of_the_rank_that_failed_first_comes_last(tmp_path, order, ranks, last):
    """Whoever ends first, and whatever the ranks that lost it say: that is one line."""
    (tmp_path / "train.py").write_text(DYING)
    command = ["python", ROOT / "common/launch.py", ranks, tmp_path / "train.py", order]
    lines = expect(finish(start(command)), 1).stderr.splitlines()
    rank = order.split("=")[0]
    if last:
        assert lines[-1].startswith(last)
    else:
        assert "ValueError: rank 1 has a bad row" in lines and "tcp/pair" in lines[-1]
    summaries = [line for line in lines if line.startswith("launch: ")]
    assert len(summaries) <= 1 and all(f"rank {rank} failed first" in s for s in summaries)
    consequences = [line for line in lines if "Connection closed by peer" in line]
    assert len(consequences) <= 1 + (order == "1=tidies")
    if ranks == 16 and summaries:
        assert summaries[0].count("Connection closed by peer") == ("said" in summaries[0])


@pytest.mark.parametrize("order, rank", [("0=waits,1=hangs", 1), ("0=hangs,1=waits", 0)])
def test_a_rank_that_takes_no_part_is_named_in_one_line(tmp_path, order, rank):
    (tmp_path / "train.py").write_text(DYING)
    command = ["python", ROOT / "common/launch.py", 2, tmp_path / "train.py", order]
    line = error_line(finish(start(command)), 1)
    assert line.startswith(f"error: rank {rank} took no part") and "--ddp_timeout" in line


CUT_OFF = {  # what a rank says that lost another
    "gloo": "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:45",
    "gloo reset": "RuntimeError: Application timeout caused pair closure\n[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation",
    "nccl": "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2006, remote process exited or there was a network error\nncclRemoteError: A call failed possibly due to a network error",
    "hccl": "RuntimeError: HcclAllreduce:ProcessGroupHCCL.cpp:120 HCCL function error: error code is 9\nEI0002: Notify wait timeout",
    "store": "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
    "timeout": "torch.distributed.DistStoreError: wait timeout after 600000ms, keys: /default_pg/0//cuda//0",
}
ALONE = {  # what it can have by itself
    "memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "nccl": "torch.distributed.DistBackendError: NCCL error: Cuda failure 2 'out of memory'",
    "port": "torch.distributed.DistNetworkError: The server socket has failed to bind, EADDRINUSE",
    "hub": "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='hub'): Connection refused",
    "row": "ValueError: the row has no answer",
}


def ended(rank, error="", code=1, at=0.0, **more):
    text = ["Traceback (most recent call last):", "  File x", *error.splitlines()] if error else []
    return ranks.Ended(rank, code, at, at, text, **more)


@pytest.mark.parametrize("words", CUT_OFF.values(), ids=CUT_OFF)
@pytest.mark.parametrize("own", ALONE.values(), ids=ALONE)
def test_words_of_a_lost_rank_are_no_reason(words, own):
    all_of_them = [ended(0, words, at=1.0), ended(1, own, at=3.0), ended(2, words, at=2.0)]
    first = ranks.first_failure(all_of_them)
    assert first.rank == 1 and ranks.consequences(first, all_of_them).startswith("ranks 0, 2 said")
    assert ranks.first_failure([all_of_them[0], all_of_them[2]]).rank == 0, "nothing else is known"


def test_who_was_first_without_words():
    lost = ended(0, CUT_OFF["gloo"], at=1.0)
    assert ranks.first_failure([lost, ended(1, code=-9, at=1.1)]).rank == 1, "killed by the system"
    assert ranks.first_failure([lost, ended(1, code=-9, at=40.0)]).rank == 0, "by the launcher"
    assert ranks.first_failure([lost, ended(1, code=-15, at=1.1)]).rank == 0, "by the launcher"
    survived = ended(1, ALONE["row"], code=-15, at=500.0)
    survived.said = 20.0
    lost.at = lost.said = 400.0
    assert ranks.first_failure([lost, survived]).rank == 0, "an old error that was handled"
    abort = "[rank0]:[E1129 10:00:00 ProcessGroupNCCL.cpp:699] Watchdog caught collective operation timeout"
    watchdog = ranks.Ended(0, -6, 1.0, 1.0, [abort, "terminate called after throwing"])
    assert ranks.first_failure([watchdog, ended(1, code=-11, at=2.0)]).rank == 1


def test_who_let_the_others_wait_until_they_gave_up():
    """A rank that lives but takes no part says nothing, and the launcher must end it."""
    gave_up = ended(0, "error: timed out waiting for another rank, which lives but takes no part")
    watchdog = ended(2, "Watchdog caught collective operation timeout: WorkNCCL", code=-6, at=0.2)
    stuck = [ended(1, code=-9, at=30.0), ended(3, code=-15, at=0.3)]
    stuck.append(ended(4, "error: lost another rank: rank 0 ended", at=8.0))
    both = [gave_up, *stuck, watchdog]
    assert ranks.without_an_answer(ranks.first_failure(both), both) == [1, 3, 4]
    died = [ended(0, CUT_OFF["gloo"]), ended(1, code=-9, at=30.0)]
    assert ranks.without_an_answer(died[0], died) == []
    raised = [gave_up, ended(1, ALONE["row"], at=1.0)]
    assert ranks.first_failure(raised).rank == 1
    own = ended(0, "CommError: Run initialization has timed out after 90.0 sec")
    assert ranks.without_an_answer(own, [own, ended(1, code=-15, at=0.3)]) == [], "a tracker's"


def test_equal_words_of_several_ranks_are_one_line():
    line = "error: rank 0 (process 7 on host) gave no sign of life for 480 s"
    three = [ended(1, line), ended(2, line, at=0.1), ended(3, line, at=0.2)]
    assert ranks.first_failure(three).error == line and not ranks.is_consequence(line)
    assert ranks.consequences(three[0], three) == ""


def test_stopped_processes_are_ended_when_the_run_has_ended_or_late(capsys):
    watch = ranks.Watch(expected=1, patience=2)
    with subprocess.Popen(["sleep", "60"]) as alone, subprocess.Popen(["sleep", "60"]) as left:
        alone.send_signal(signal.SIGSTOP)
        left.send_signal(signal.SIGSTOP)
        while not (ranks.is_stopped(alone.pid) and ranks.is_stopped(left.pid)):
            time.sleep(0.01)
        for _ in range(2):
            watch.end_stopped({alone.pid})
        assert alone.poll() is None and not capsys.readouterr().err
        watch.end_stopped({alone.pid})
        assert alone.wait(20) == -signal.SIGKILL
        assert f"process {alone.pid} was stopped" in capsys.readouterr().err
        assert ranks.why_killed(watch, alone.pid) == "" != ranks.why_killed(watch, left.pid)
        watch.ended[1] = 1.0
        watch.end_stopped({left.pid})
        assert left.wait(20) == -signal.SIGKILL and not capsys.readouterr().err
    assert not ranks.is_stopped(os.getpid()) and not ranks.is_stopped(left.pid)


@pytest.mark.parametrize(
    "words", ["--ddp_timeout 20", "--ddp-timeout=20", "--stage sft", "--ddp_timeout x"]
)
def test_the_launcher_knows_how_long_ranks_wait(words, capsys):
    expected = 20 if "20" in words else device.DDP_TIMEOUT
    assert launch.patience(["train.py", *words.split()]) == expected
    assert capsys.readouterr().err == ""


def test_prefixes_and_parting_words_of_torch():
    text = (
        "[rank3]: Traceback (most recent call last):\n[rank3]:   File x\n[rank3]: ValueError: no\n"
    )
    text += "[rank3]:[W1129 10:00:00 ProcessGroupGloo.cpp:1] Warning: destroy_process_group() was not called\n"
    one = ranks.Ended(3, 1, 1.0, 1.0, text.splitlines())
    assert one.error == "ValueError: no" and one.text[-1] == "[rank3]: ValueError: no"
    assert ranks.name_ranks([7, 0, 1, 2]) == "ranks 0-2, 7" and ranks.name_ranks([3]) == "rank 3"


@pytest.mark.parametrize("ended, shown", [({}, True), ({41: 1.0}, False)])
def test_an_error_waits_longer_once_a_rank_has_ended(capfd, monkeypatch, ended, shown):
    """On a slow machine the ranks need more than HELD_SECONDS to end after one another."""
    monkeypatch.setattr(ranks, "HELD_SECONDS", 0)
    relay = ranks.Relay(SimpleNamespace(ended=ended))
    os.write(2, b"error: lost another rank\n")
    time.sleep(1.5)
    before_the_end = capfd.readouterr().err
    relay.end(release=True)
    assert ("lost another rank" in before_the_end) == shown
    assert ("lost another rank" in capfd.readouterr().err) == (not shown)


def test_a_handled_error_of_rank_0_and_its_bar_reach_the_terminal(tmp_path):
    """On a terminal rank 0 has one too; an error that it survives is shown in the end."""
    script = "import sys\nprint(sys.stderr.isatty(), file=sys.stderr)\n"
    script += "print('Traceback (most recent call last):\\nKeyError: handled', file=sys.stderr)\n"
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, ROOT / "common/launch.py", "2", tmp_path / "train.py"]
    master, slave = pty.openpty()
    done = subprocess.Popen(command, stderr=slave, stdout=subprocess.DEVNULL, env=variables())
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(master, 1 << 16):
            shown += part
    os.close(master)
    assert done.wait() == 0
    assert shown.decode().splitlines() == ["True", f"{ranks.TRACEBACK}:", "KeyError: handled"]


# ---- the Python of the shells and its first install --------------------------------------------------------------


def test_no_venv_is_made_when_forbidden(recipe, tmp_path):
    """A Python without the requirements, DANPU_NO_VENV=1: one line that names what is missing."""
    bare = tmp_path / "bare"
    subprocess.run(
        [os.path.realpath(sys.executable), "-m", "venv", "--without-pip", bare], check=True
    )
    env = variables(DANPU_NO_VENV=1)
    env["PATH"] = f"{bare}/bin:/usr/bin:/bin"
    result = subprocess.run(["bash", recipe, "ok"], env=env, capture_output=True, text=True)
    line = error_line(result, 1)
    assert "torch==" in line and "not installed" in line
    assert f"{bare}/bin/python -m pip install -r {ROOT}/requirements.txt" in line


def test_no_python_at_all_is_one_line(recipe, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    (tmp_path / "python").write_text("#!/bin/sh\nexit 127\n")  # pyenv's, with no version chosen
    (tmp_path / "python").chmod(0o755)
    env = {"PATH": str(tmp_path)}
    result = subprocess.run(["bash", recipe, "ok"], env=env, capture_output=True, text=True)
    assert error_line(result, 1) == "launch: needs Python 3.10, 3.11 or 3.12; none is on PATH"


def wheel(folder: Path, name: str, version: str) -> None:
    """A package with nothing in it, as pip installs it."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        file.writestr(f"{info}/METADATA", about)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_an_incomplete_python_gets_a_venv(tmp_path):
    """Without the flag the launcher makes root/.venv, with a line per stage, and continues after a failure; here in
    a copy of common/ with a requirement that pip does not find at first."""
    project = tmp_path / "a project"
    names = ("launch.sh", "launch.py", "__init__.py")
    for name in (*names, "runs/__init__.py", "runs/environment.py", "runs/machine.py"):
        (project / "common" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "common" / name).write_text((ROOT / "common" / name).read_text())
    (project / "requirements.txt").write_text("danpu_no_such_package==1\n")
    (project / "run.sh").write_text(
        'set -euo pipefail\nsource common/launch.sh\nlaunch train.py "$@"\n'
    )
    env = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path, "cwd": project}

    result = shell("run.sh", "ok", **env)
    lines = expect(result, 1).stderr.splitlines()
    lacks = "lacks danpu_no_such_package==1 (not installed)"
    assert lacks in lines[0] and f"making {project}/.venv with " in lines[0]
    assert lines[1].startswith("launch: .venv made in ") and lines[1].endswith(" s")
    assert lines[2].startswith("launch: installing requirements.txt into .venv")
    assert "ERROR: No matching distribution found for danpu_no_such_package==1" in lines
    assert lines[-1].startswith("launch: pip install failed; the same command again continues")
    assert not result.stdout and (project / ".venv/bin/python").exists()

    wheel(tmp_path, "danpu_no_such_package", "1")
    lines = expect(shell("run.sh", "ok", **env), 1).stderr.splitlines()
    assert [line.split(" in ")[0] for line in lines[:2]] == [
        "launch: installing requirements.txt into .venv; the first time takes some minutes",
        "launch: requirements.txt installed",
    ]
    assert len(lines) == 3 and f"{project}/.venv/bin/python cannot import torch" in lines[2]
    assert f"{project}/.venv/bin/python -m pip install -r {project}/requirements.txt" in lines[2]


@pytest.fixture
def venv(monkeypatch, tmp_path):
    """A project folder in which nothing is installed; its .venv."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    for name in ("DANPU_NO_VENV", "DANPU_VERBOSE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "requirements.txt").write_text("danpu_no_such_package==1\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    return tmp_path / ".venv"


def program(path: Path, *lines: str) -> Path:
    """A program in the place of Python."""
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


PIP = (
    "echo 'Collecting torch==1'",
    "echo '  Downloading torch-1.whl (906.5 MB)'",
    "echo 'Processing ./other.whl'",
)


def test_the_progress_of_pip_is_a_line_now_and_then(venv, monkeypatch, capfd, tmp_path):
    pip = program(tmp_path / "pip", *PIP)
    assert environment.quietly([pip]) == 0
    assert capfd.readouterr().err == "", "it took less than LINE_SECONDS"
    monkeypatch.setattr(environment, "LINE_SECONDS", 0)
    assert environment.quietly([pip]) == 0
    assert capfd.readouterr().err.splitlines() == [
        "launch: 1 packages collected; Collecting torch==1",
        "launch: 1 packages collected; Downloading torch-1.whl (906.5 MB)",
        "launch: 2 packages collected; Processing ./other.whl",
    ]


def test_the_progress_of_pip_is_one_changing_line_on_a_terminal(venv, monkeypatch, tmp_path):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert environment.quietly([program(tmp_path / "pip", *PIP)]) == 0
    shown = ""
    with contextlib.suppress(OSError):  # the other end is closed
        while True:
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    assert "\n" not in shown and "\r" in shown
    states = [state.removesuffix("\033[K") for state in shown.split("\r")[1:]]
    assert states[-2:] == ["launch: 2 packages collected; Processing ./other.whl", ""]


@pytest.mark.parametrize("code", [0, 1])
def test_all_that_pip_says_on_request_or_when_it_fails(venv, monkeypatch, capfd, tmp_path, code):
    python = program(venv / "bin/python", *[f"echo line {i}; " for i in range(40)], f"exit {code}")
    file = tmp_path / "requirements.txt"
    for verbose in ("1", "0"):
        monkeypatch.setenv("DANPU_VERBOSE", verbose)
        if code:
            with pytest.raises(SystemExit, match="pip install failed.*DANPU_VERBOSE=1"):
                environment.install(python, file)
        else:
            environment.install(python, file)
        shown = [line for line in capfd.readouterr().err.splitlines() if line.startswith("line ")]
        if verbose == "1":
            assert len(shown) == 40
        else:
            assert shown == [f"line {i}" for i in range(40 - environment.TAIL, 40) if code]


def test_a_venv_whose_making_was_killed_is_made_again(venv, monkeypatch, capfd):
    """It has a Python, but no pip yet."""
    program(venv / "bin/python")
    base = program(venv.parent / "base", 'echo "$@"; touch "$3/bin/pip"')
    monkeypatch.setattr(machine, "base_python", lambda: str(base))
    environment.make(["torch==1 (not installed)", "b==2 (1)"])
    said = capfd.readouterr().err
    assert f"-m venv {venv}" in said and "lacks torch==1 (not installed) and 1 more" in said
    environment.make(["torch==1 (not installed)"])
    assert capfd.readouterr().err == ""


def test_a_second_start_says_that_it_waits_for_the_first(venv, monkeypatch, capfd, tmp_path):
    python = program(venv / "bin/python", f'[ -e "{tmp_path}/done" ] || echo lacks')
    (venv / "bin/pip").touch()
    with open(tmp_path / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = []

        def choose():
            found.append(environment.choose(tmp_path / "requirements.txt"))

        second = threading.Thread(target=choose)
        second.start()
        second.join(1)
        assert second.is_alive() and "another start is installing" in capfd.readouterr().err
        (tmp_path / "done").touch()
    second.join(20)
    assert found == [python] and capfd.readouterr().err == "", "it does not install a second time"


def test_a_recipe_copied_without_the_list_runs_with_the_active_python(monkeypatch, tmp_path):
    assert environment.choose(tmp_path / "requirements.txt") == Path(sys.executable)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    assert environment.choose(tmp_path / "requirements.txt") == Path(sys.executable)


def test_a_torch_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch_cpu.so: broken')")
    command = ["python", ROOT / "common/launch.py", "auto", tmp_path / "train.py"]
    line = error_line(finish(start(command, PYTHONPATH=tmp_path)), 1)
    assert "cannot import torch" in line and "libtorch_cpu.so" in line and "check_env" in line
