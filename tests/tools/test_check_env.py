"""The page about the machine: what it says here, and on machines where almost everything is broken."""

import ast
import http.server
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from harness import ROOT, environment, expect

from common import device
from common.runs import machine
from tools import check_env, probe

LINE = re.compile(r"(ok     |warn   |MISSING) [a-z_]+ +\S")
CPU = {
    "torch": {"version": "9.0", "built_for": None, "nccl": None, "npu_error": None, "cann": None},
    "device": {"backend": "gloo", "count": 0, "dtype": "bf16", "notes": ""},
    "cards": [],
    "errors": {},
    "transformers": {"version": "5"},
    "deepspeed": {"version": "1", "ninja": True},
}
OURS = (
    "DANPU_|HF_|HCCL_|NCCL_|.*_VISIBLE_DEVICES|.*_proxy|.*_PROXY|DEVICES|NPROC|OUTPUT|MODEL|DATA|"
    "TORCH_EXTENSIONS_DIR|ASCEND|CXX"
)


def clean(**extra):
    """The environment without anything the page looks at, a cache of its own."""
    return {k: v for k, v in environment().items() if not re.match(OURS, k)} | {
        k: str(v) for k, v in extra.items()
    }


def run(*command, cwd=ROOT, timeout=120, **env):
    """The page as a user starts it, or a command like it; never a traceback."""
    command = [
        str(word)
        for word in command or (sys.executable, "-m", "tools.check_env", "--offline", "--json")
    ]
    done = subprocess.run(
        command, cwd=cwd, env=clean(**env), capture_output=True, text=True, timeout=timeout
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    return done


def checks(done, code):
    """{key: {"status", "fact", "remedy"}} of a run with --json that must exit with `code`."""
    answer = json.loads(expect(done, code).stdout)
    assert answer["ready"] == (code == 0)
    return answer["checks"]


@pytest.fixture
def page(monkeypatch, capsys, tmp_path):
    """page(facts, **environment) -> checks: the page of a machine whose torch tells `facts`.

    facts: None asks the torch of this machine, in a process of its own. page.text, page.errors: what was printed.
    """

    def page(facts=CPU, code=0, flags=("--offline",), **env):
        for name in [name for name in os.environ if re.match(OURS, name)]:
            monkeypatch.delenv(name)
        for name, value in ({"DANPU_CACHE": tmp_path, "OUTPUT": tmp_path} | env).items():
            monkeypatch.setenv(name, str(value))
        with monkeypatch.context() as patch:
            if facts is not None:
                patch.setattr(probe, "torch_facts", lambda: facts)
            assert check_env.main(["--json", *flags]) == code
        page.text, page.errors = capsys.readouterr()
        answer = json.loads(page.text)
        assert answer["ready"] == (code == 0)
        return answer["checks"]

    return page


def package(folder, name, code="", version=None):
    """A package on PYTHONPATH that hides the real one; `version`: with metadata."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    if version:
        metadata(folder, name, version)
    return folder


def metadata(folder, name, version):
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_HEAD(self):
        Hub.asked += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Hub.asked = 0
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# ---- this machine -------------------------------------------------------------------------------------------


def test_the_page_of_this_machine(tmp_path):
    """Through the shell, from another folder: aligned, one screen, and what it promises is what `launch` would do."""
    done = expect(
        run("bash", ROOT / "tools/check_env.sh", "--offline", cwd=tmp_path, OUTPUT="here")
    )
    *lines, blank, verdict = done.stdout.splitlines()
    assert blank == "" and len(lines) <= 40
    assert all(LINE.match(line) or line.startswith(" " * 22) for line in lines), done.stdout
    assert len({LINE.match(line).end() for line in lines if LINE.match(line)}) == 1, (
        "the facts are not aligned"
    )
    assert (
        f"{tmp_path}/here" in done.stdout
        and torch.__version__ in done.stdout
        and "\033[" not in done.stdout
    )
    processes = (
        "2 processes on CPU" if device.kind() == "cpu" else f"{device.device_count()} process"
    )
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[device.half_dtype()]
    assert (
        verdict.startswith(f"ready: bash <recipe>/train_zero2.sh will use {processes}")
        and f" in {half}" in verdict
    )


def test_json_and_a_hub_behind_a_proxy_with_a_password(page, server):
    """One hub answers (HF_ENDPOINT), two are behind a dead proxy. No secret in the text."""
    env = {"HF_ENDPOINT": server, "HF_TOKEN": "hf_topsecret"}
    hub = page(flags=(), https_proxy="http://me:p@ss/w@127.0.0.1:9", **env)["hub"]
    assert hub["status"] == "ok" and "HF_TOKEN set" in hub["fact"]
    assert hub["fact"].startswith(server.partition("//")[2])
    assert "unreachable: hf-mirror.com, www.modelscope.cn" in hub["fact"]
    assert "https=http://***@127.0.0.1:9" in hub["fact"]
    assert not re.search("topsecret|me:|p@ss|ss/w", page.text + page.errors)
    answer = json.loads(page.text)
    assert set(answer) == {"ready", "verdict", "checks", "versions"}
    always = "system python requirements torch transformers deepspeed offload device dtype settings cpu memory limits"
    assert {*always.split(), "output", "cache", "hub_cache", "hub", "extras"} <= set(
        answer["checks"]
    )
    assert set(answer["checks"]["cpu"]) == {"status", "fact", "remedy"}


def test_colours_only_on_a_terminal(monkeypatch):
    lines = {"cpu": check_env.Line("ok", "fast")}
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.delenv("NO_COLOR", raising=False)
        coloured = check_env.as_text(lines, "")
        monkeypatch.setenv("NO_COLOR", "1")
        plain = check_env.as_text(lines, "")
    os.close(master)
    assert coloured.startswith("\033[32mok     \033[0m cpu") and plain.startswith("ok      cpu")


# ---- Python and packages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A virtual environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run(
        [os.path.realpath(sys.executable), "-m", "venv", "--without-pip", folder], check=True
    )
    return folder / "bin/python"


def test_nothing_installed(bare):
    found = checks(run(bare, "-m", "tools.check_env", "--offline", "--json"), 1)
    assert found["torch"] == {"status": "MISSING", "fact": "not installed", "remedy": ""}
    assert "not installed: torch, transformers, peft" in found["requirements"]["fact"]
    assert found["requirements"]["remedy"] == f"{bare} -m pip install -r {ROOT}/requirements.txt"
    assert {"cpu", "memory", "limits", "output", "hub"} <= found.keys(), "the rest is still told"


def test_an_old_python_can_read_the_files(bare):
    """All that a bare Python loads of ours: syntax of 3.8, and no annotation that is evaluated."""
    code = (
        "import sys, tools.check_env, tools.probe\n"
        "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))"
    )
    loaded = [Path(file) for file in run(bare, "-c", code).stdout.split()]
    ours = {file.relative_to(ROOT).as_posix() for file in loaded if file.is_relative_to(ROOT)}
    ours.add("common/runs/environment.py")
    assert {"tools/check_env.py", "tools/probe.py", "common/runs/machine.py"} <= ours
    for name in ours:
        text = (ROOT / name).read_text()
        ast.parse(text, feature_version=(3, 8))
        assert "from __future__ import annotations" in text or "def " not in text, name


@pytest.mark.parametrize("version", [(3, 9, 2), (3, 13, 0)])
def test_a_python_that_is_not_supported(page, monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", (*version, "final", 0))
    found = page(code=1)
    assert found["python"]["status"] == "MISSING"
    assert "must be 3.10, 3.11 or 3.12" in found["python"]["fact"]
    assert "not ready: python" in page.text


LAUNCHER = ("common/runs/environment.py", "common/runs/machine.py")


def test_the_shell_takes_the_venv_when_the_active_python_lacks_packages(bare, tmp_path):
    project = tmp_path / "a project"
    (project / ".venv/bin").mkdir(parents=True)
    for name in ("common/launch.sh", "tools/check_env.sh", *LAUNCHER):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text((ROOT / name).read_text())
    (project / "requirements.txt").write_text("danpu-no-such-package==1\n")
    (project / ".venv/bin/python").write_text('#!/bin/sh\n[ "$1" = -c ] || echo "venv $*"\n')
    (project / ".venv/bin/python").chmod(0o755)
    done = run(
        "bash",
        project / "tools/check_env.sh",
        "--json",
        cwd=tmp_path,
        PATH=f"{bare.parent}:/usr/bin:/bin",
    )
    assert expect(done).stdout == "venv -m tools.check_env --json\n"


TORCH = [
    (
        "raise OSError('libcudart.so.99: cannot open shared object file')",
        "OSError: libcudart.so.99: cannot open",
    ),
    ("import os; os.kill(os.getpid(), 11)", "crashes (SIGSEGV)"),
    ("import time; time.sleep(60)", "no answer within 2 s"),
    ("import sys; sys.exit('no licence')", "no licence"),
    ("import os; os._exit(3)", "no message"),
]


@pytest.mark.parametrize("code, words", TORCH)
def test_a_torch_that_does_not_import(page, monkeypatch, tmp_path, code, words):
    monkeypatch.setattr(probe, "SECONDS", 2)
    found = page(None, code=1, PYTHONPATH=package(tmp_path, "torch", code))
    assert found["torch"]["status"] == "MISSING" and words in found["torch"]["fact"]
    assert " -m pip install --force-reinstall torch==" in found["torch"]["remedy"]
    assert found["deepspeed"]["status"] == "warn" and found["device"]["status"] == "MISSING"


def test_torch_npu_without_cann_other_versions_and_a_broken_library(page, monkeypatch, tmp_path):
    """Three faults at once: a torch_npu that only warns (no card here), a peft of another version, no transformers."""
    version = torch.__version__.split("+")[0]
    cause = "raise ImportError('libhccl.so: cannot open shared object file')"
    package(tmp_path, "torch_npu", cause, version)
    package(tmp_path, "transformers", "raise ModuleNotFoundError('No module named \"tokenizers\"')")
    monkeypatch.syspath_prepend(metadata(tmp_path, "peft", "0.1.0"))
    found = page(None, code=1, PYTHONPATH=tmp_path)
    assert found["torch"]["status"] == "ok" and found["device"]["status"] == "ok"
    assert found["torch_npu"]["status"] == "warn" and "libhccl.so" in found["torch_npu"]["fact"]
    assert found["torch_npu"]["remedy"].startswith(f"{check_env.PIP} uninstall -y torch-npu")
    pinned = machine.pins(ROOT / "requirements.txt")["peft"]
    assert (
        found["requirements"]["status"] == "warn"
        and f"peft 0.1.0 (pinned: {pinned})" in found["requirements"]["fact"]
    )
    assert found["requirements"]["remedy"] == f"{check_env.PIP} install peft=={pinned}"
    assert (
        found["transformers"]["status"] == "MISSING"
        and "tokenizers" in found["transformers"]["fact"]
    )


def test_torch_npu_of_another_torch_and_refused_settings(page, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(package(tmp_path, "torch_npu", version="2.5.1"))
    found = page(None, code=1, PYTHONPATH=tmp_path, NPROC="0", DANPU_DEVICE="tpu")
    assert "torch-npu 2.5.1 belongs to torch 2.5.1" in found["torch_npu"]["fact"]
    assert found["settings"]["status"] == "MISSING" and found["settings"]["remedy"] == "unset NPROC"
    assert (
        "'tpu' is not one of" in found["device"]["fact"]
        and found["device"]["remedy"] == "unset DANPU_DEVICE"
    )
    assert found["deepspeed"]["status"] == "ok", "what comes after a step that fails is still tried"


def test_other_versions_block_where_no_venv_may_be_made(page, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(metadata(tmp_path / "site", "peft", "0.1.0"))
    assert page()["requirements"]["status"] == "warn"
    assert page(code=1, DANPU_NO_VENV=1)["requirements"]["status"] == "MISSING"


def test_missing_compiler_ninja_and_a_stale_lock(page, tmp_path):
    assert "g++" in page(CXX="no-such-compiler")["offload"]["remedy"]
    facts = CPU | {"deepspeed": {"version": "1", "ninja": False}}
    assert page(facts)["offload"]["remedy"].startswith("export PATH=")
    lock = tmp_path / "py311/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert page(TORCH_EXTENSIONS_DIR=tmp_path)["offload"]["status"] == "ok", (
        "somebody may be building now"
    )
    os.utime(lock, (1, 1))
    assert page(TORCH_EXTENSIONS_DIR=tmp_path)["offload"]["remedy"] == f"rm {lock}"


# ---- devices ------------------------------------------------------------------------------------------------


def cards(backend, *cards, dtype="bf16", **torch_facts):
    """Facts of a machine with accelerators; a card is (name, free GiB, all GiB) or an error."""
    listed = [
        {"error": c}
        if isinstance(c, str)
        else {"name": c[0], "free": c[1] << 30, "total": c[2] << 30}
        for c in cards
    ]
    here = {"backend": backend, "count": len(cards), "dtype": dtype, "notes": ""}
    return CPU | {"torch": CPU["torch"] | torch_facts, "device": here, "cards": listed}


def test_cards_in_use_and_broken_cards_are_named_by_their_ids(page, capsys):
    free, full = ("H100", 79, 80), ("H100", 3, 80)
    found = page(cards("nccl", free, full, free), CUDA_VISIBLE_DEVICES="2,5,7")
    assert (
        found["device"]["status"] == "warn"
        and "in use by others: card 5" in found["device"]["fact"]
    )
    assert (
        "79/80 3/80 79/80" in found["device"]["fact"]
        and found["device"]["remedy"] == "export CUDA_VISIBLE_DEVICES=2,7"
    )
    found = page(cards("nccl", "CUDA error: ECC", free, "CUDA error: ECC"), code=1, DEVICES="4,5,6")
    assert "card 4,6 cannot compute: CUDA error: ECC" in found["device"]["fact"]
    assert found["device"]["remedy"] == "export DEVICES=5"
    assert (
        page(cards("nccl", "CUDA error: ECC"), code=1)["dtype"]["fact"]
        == "unknown, since no device works"
    )
    assert page(cards("nccl", free), code=1, NPROC=2)["settings"]["remedy"] == "unset NPROC"


def test_nvidia_cards_that_torch_does_not_use(page, monkeypatch, tmp_path):
    """The remedy follows the reason: a build without CUDA, hidden cards, an old driver, one that fails or hangs."""
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 570.86\n")
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    cuda = CPU | {"torch": CPU["torch"] | {"built_for": "13.0"}}
    assert "--force-reinstall torch==" in page(PATH=path)["nvidia"]["remedy"]
    assert (
        page(cuda, PATH=path, CUDA_VISIBLE_DEVICES="")["nvidia"]["remedy"]
        == "unset CUDA_VISIBLE_DEVICES"
    )
    old = cuda | {
        "device": CPU["device"] | {"notes": "The NVIDIA driver on your system is too old"}
    }
    assert "driver 570.86, torch for CUDA 13.0" in page(old, PATH=path)["nvidia"]["fact"]
    assert "too old" in page(old, PATH=path)["nvidia"]["fact"]
    assert (
        page(cards("nccl", ("H100", 80, 80), built_for="13.0", nccl="2.28"), PATH=path)["nvidia"][
            "status"
        ]
        == "ok"
    )
    tool.write_text(
        "#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n"
    )
    assert "version mismatch" in page(cuda, PATH=path)["nvidia"]["fact"]
    tool.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(probe, "TOOL_SECONDS", 0.2)
    assert "the driver hangs" in page(cuda, PATH=path)["nvidia"]["fact"]


@pytest.fixture
def ascend_host(monkeypatch, tmp_path):
    """A host with one Ascend card, torch-npu as pinned, and CANN at a usual place, not sourced."""
    pinned = machine.pins(ROOT / "requirements-npu.txt")["torch-npu"]
    monkeypatch.syspath_prepend(metadata(tmp_path / "site", "torch_npu", pinned))
    (tmp_path / "davinci0").touch()
    monkeypatch.setattr(machine, "CARDS", str(tmp_path / "davinci[0-9]*"))
    home = tmp_path / "ascend-toolkit/latest"
    (home / "x86_64-linux").mkdir(parents=True)
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=9.1.0\n"
    )
    return home


def test_ascend_whose_cann_was_not_sourced_blocks(page, ascend_host):
    why = f"CANN's environment is not set (libhccl.so): source {ascend_host.parent}/set_env.sh"
    facts = CPU | {"torch": CPU["torch"] | {"npu_error": why, "cann": str(ascend_host)}}
    found = page(facts, code=1)
    assert found["cann"]["fact"] == f"9.1.0 in {ascend_host}, set_env.sh was not sourced"
    assert (
        found["cann"]["remedy"]
        == found["torch_npu"]["remedy"]
        == f"source {ascend_host.parent}/set_env.sh"
    )
    assert (
        found["torch_npu"]["status"] == "MISSING" and "1 x /dev/davinci*" in found["ascend"]["fact"]
    )
    assert page(facts, DANPU_DEVICE="cpu")["torch_npu"]["status"] == "warn"
    assert "torch sees none of them" in page(CPU)["ascend"]["fact"]


def test_an_ascend_host_is_measured_against_its_own_requirements(page, ascend_host, monkeypatch):
    real = machine.installed
    monkeypatch.setattr(
        machine, "installed", lambda name: None if name == "torch-npu" else real(name)
    )
    found = page(code=1)["requirements"]
    assert found["fact"] == "not installed: torch-npu" and "install torch-npu==" in found["remedy"]


CHIPS = [
    ("Ascend910A", "warn"),
    ("Ascend910B", "warn"),
    ("Ascend910PremiumA", "warn"),
    ("Ascend310P3", "ok"),
]


@pytest.mark.parametrize("name, status", CHIPS)
def test_chips_without_bf16(page, ascend_host, name, status):
    found = page(cards("hccl", (name, 30, 32), dtype="fp16"))["dtype"]
    assert found["status"] == status and found["fact"].startswith(f"fp16: {name} has no bf16")
    assert ("torch and torch-npu 2.7.1" in found["fact"]) == (status == "warn")


def test_a_usable_ascend_and_its_variables(page, ascend_host):
    ops = ascend_host / "opp"
    ops.mkdir()
    good = {"ASCEND_HOME_PATH": ascend_host, "ASCEND_OPP_PATH": ops}
    found = page(cards("hccl", ("Ascend910B2", 60, 64)), **good)
    assert (
        found["cann"]["status"] == "ok" and found["dtype"]["fact"] == "bf16: Ascend910B2 has bf16"
    )
    found = page(
        cards("hccl", ("Ascend910B2", 60, 64)),
        ASCEND_HOME_PATH=ascend_host,
        ASCEND_RT_VISIBLE_DEVICES="3,10,1",
    )
    assert "ASCEND_OPP_PATH= is not" in found["cann"]["fact"]
    assert found["settings"]["remedy"] == "export ASCEND_RT_VISIBLE_DEVICES=1,3,10"
    found = page(cards("hccl", ("Ascend910B2", 60, 64)), HCCL_CONNECT_TIMEOUT=60, **good)
    assert found["settings"]["remedy"] == "export HCCL_CONNECT_TIMEOUT=1800"


def test_npu_smi_without_a_card_is_a_container_without_devices(page, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/npu-smi").write_text("#!/bin/sh\necho npu-smi 25.0\n")
    (tmp_path / "bin/npu-smi").chmod(0o755)
    found = page(PATH=f"{tmp_path}/bin:{os.environ['PATH']}", DANPU_DEVICE="cpu")["ascend"]
    assert found["status"] == "warn" and "--device /dev/davinci0" in found["remedy"]


# ---- the machine around them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variable, key, code",
    [("OUTPUT", "output", 1), ("DANPU_CACHE", "cache", 1), ("HF_HOME", "hub_cache", 0)],
)
def test_folders_that_cannot_be_made(page, tmp_path, variable, key, code):
    (tmp_path / "file").touch()
    found = page(code=code, **{variable: tmp_path / "file/folder"})[key]
    assert (
        found["status"] == ("MISSING" if code else "warn")
        and f"{tmp_path}/file is not a folder" in found["fact"]
    )
    assert found["remedy"].startswith(f"export {variable}=")


@pytest.mark.parametrize("free, status", [(0.1, "MISSING"), (5, "warn"), (500, "ok")])
def test_a_disk_that_is_almost_full(page, monkeypatch, free, status):
    real = check_env.shutil.disk_usage
    monkeypatch.setattr(
        check_env.shutil, "disk_usage", lambda path: real(path)._replace(free=int(free * 2**30))
    )
    found = page(code=status == "MISSING")["output"]
    assert found["status"] == status and f"{free:.1f} GiB free" in found["fact"]


def test_a_disk_that_takes_no_byte(page, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check_env.tempfile, "TemporaryFile", full)
    assert "No space left on device" in page(code=1)["cache"]["fact"]


V1 = {
    "memory/a/memory.limit_in_bytes": "3221225472",
    "memory/a/memory.usage_in_bytes": "2147483648",
    "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 536870912",
    "cpu/a/cpu.cfs_quota_us": "50000",
    "cpu/a/cpu.cfs_period_us": "100000",
}
V2 = {
    "a/memory.max": "3221225472",
    "a/memory.current": "2147483648",
    "a/memory.stat": "inactive_file 536870912",
    "a/cpu.max": "50000 100000",
    "a/b/memory.max": "max",
    "a/b/cpu.max": "max 100000",
}


@pytest.mark.parametrize(
    "files, own", [(V1, "5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/"), (V2, "0::/a/b")]
)
def test_the_limits_of_a_container_count(page, monkeypatch, tmp_path, files, own):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    real = machine.read
    monkeypatch.setattr(
        machine, "read", lambda path: own if str(path) == "/proc/self/cgroup" else real(path)
    )
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    found = page()
    assert (
        found["memory"]["status"] == "warn"
        and "1.5 GiB free of 3.0 GiB, the limit" in found["memory"]["fact"]
    )
    assert found["cpu"]["status"] == "warn" and "limited to 0.5" in found["cpu"]["fact"]


def test_little_shared_memory(page, monkeypatch):
    real = check_env.shutil.disk_usage
    monkeypatch.setattr(check_env, "SHM", "/")
    monkeypatch.setattr(
        check_env.shutil,
        "disk_usage",
        lambda path: real(path)._replace(total=64 << 20) if path == "/" else real(path),
    )
    found = page()["limits"]
    assert found["status"] == "warn" and "--shm-size" in found["remedy"]


def test_a_check_that_fails_is_a_line(page, monkeypatch):
    monkeypatch.setattr(check_env.os, "sched_getaffinity", lambda pid: 1 / 0)
    assert page()["cpu"]["fact"] == "cannot be looked at: ZeroDivisionError('division by zero')"


# ---- hubs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dead(monkeypatch):
    """Addresses where nobody listens stand for the mirror and ModelScope; returns a third one."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name, path in (("MIRROR", "/mirror"), ("MODELSCOPE", "/scope")):
            monkeypatch.setattr(
                check_env, name, f"http://127.0.0.1:{closed.getsockname()[1]}{path}"
            )
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


def test_no_hub_at_all_is_no_failure(page, dead):
    found = page(flags=(), HF_ENDPOINT=dead)["hub"]
    assert (
        found["status"] == "warn"
        and "Connection refused" in found["fact"]
        and "no proxy" in found["fact"]
    )
    assert found["remedy"].startswith("export MODEL=/")


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("MIRROR", "export HF_ENDPOINT={}"),
        ("MODELSCOPE", "python -m tools.download ORG/NAME --source modelscope"),
    ],
)
def test_the_remedy_is_a_hub_that_answers(page, monkeypatch, dead, server, name, remedy):
    monkeypatch.setattr(check_env, name, server)
    found = page(flags=(), HF_ENDPOINT=dead)["hub"]
    assert found["status"] == "warn" and found["remedy"] == remedy.format(server)


def test_a_hub_that_accepts_and_stays_silent(page, monkeypatch, dead):
    monkeypatch.setattr(check_env, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = page(flags=(), HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")["hub"]
    assert found["status"] == "warn" and re.search("timed out|no answer", found["fact"])


@pytest.mark.parametrize("address", ["hf-mirror.com", "file:///etc/passwd"])
def test_an_endpoint_that_is_no_web_address(page, dead, address):
    assert (
        "not an http:// or https:// address" in page(flags=(), HF_ENDPOINT=address)["hub"]["fact"]
    )


def test_an_endpoint_with_a_token_in_it_is_masked(page):
    found = page(
        HF_ENDPOINT="https://abc123@hub.example/x",
        MY_API_KEY="0123456789",
        MODEL="/models/0123456789",
    )
    assert "HF_ENDPOINT=https://***@hub.example/x, MODEL=/models/***" in found["settings"]["fact"]
    assert "abc123" not in str(found) and "0123456789" not in str(found)


def test_offline_asks_nobody(page, server):
    assert page(HF_ENDPOINT=server)["hub"]["fact"].startswith("not asked")
    assert page(flags=(), HF_ENDPOINT=server, HF_HUB_OFFLINE=1)["hub"]["fact"].startswith(
        "not asked"
    )
    assert Hub.asked == 0


def test_the_cache_is_where_the_data_goes(monkeypatch):
    from common.data.cache import cache_root

    for place in ("/some/where", None):
        monkeypatch.setenv("DANPU_CACHE", place) if place else monkeypatch.delenv(
            "DANPU_CACHE", raising=False
        )
        assert check_env.cache().fact.startswith(str(cache_root()))
    assert Path(check_env.ROOT) == ROOT
