"""One page about this machine: what training will use, what is missing, and the command that helps.

    bash tools/check_env.sh                              with CANN and the Python that the recipes' shells take
    python -m tools.check_env [--json] [--offline]       with the active Python

Exit code 0: training can run; 1: a line says MISSING. Works without torch, on any Python from 3.8.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import re
import resource
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from common.runs.report import versions
from tools import probe

ROOT = Path(__file__).resolve().parents[1]
PIP = f"{shlex.quote(sys.executable)} -m pip"
CGROUP, SHM, CARDS = Path("/sys/fs/cgroup"), "/dev/shm", "/dev/davinci[0-9]*"
HUB, MIRROR, MODELSCOPE = (
    "https://huggingface.co",
    "https://hf-mirror.com",
    "https://www.modelscope.cn",
)
HUB_SECONDS, GIB = 5, 2**30
OK, WARN, MISSING = "ok", "warn", "MISSING"
COLOURS = {OK: "\033[32m", WARN: "\033[33m", MISSING: "\033[31m"}
SECRET = re.compile("TOKEN|SECRET|PASSW|KEY", re.IGNORECASE)
TOLD = re.compile(  # variables that change a run
    "(DANPU|HF|NCCL|HCCL|MASTER|PYTORCH)_.*|DEVICES|.*_VISIBLE_DEVICES|NPROC|NNODES|NODE_RANK|HOSTFILE|MODEL|DATA"
)
OLD_ASCEND = re.compile(
    "Ascend910(A|B|Pro.*|Premium.*)$"
)  # the first generation; 910B1 to B4 are another chip


class Line(NamedTuple):
    """status: OK, WARN (training can run) or MISSING (it cannot); remedy: a command to paste."""

    key: str
    status: str
    fact: str
    remedy: str = ""


def env(name):
    return os.environ.get(name, "").strip()


def read(path):
    try:
        return Path(path).expanduser().read_text(errors="replace").strip()
    except OSError:
        return ""


# ---- Python and packages ------------------------------------------------------------------------------------


def system():
    name = re.search(r'PRETTY_NAME="?([^"\n]*)', read("/etc/os-release"))
    inside = (
        ", in a container"
        if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")
        else ""
    )
    fact = f"{name[1] if name else platform.system()}, {platform.machine()}, {' '.join(platform.libc_ver())}{inside}"
    return Line("system", OK, fact)


def good_python():
    return (3, 10) <= sys.version_info[:2] <= (3, 12)


def in_environment():
    return sys.prefix != sys.base_prefix or bool(env("CONDA_PREFIX"))


def new_environment(file="requirements.txt"):
    """Command for a Python that can run the recipes; .venv is where their shells look."""
    venv, file = ROOT / ".venv", shlex.quote(str(ROOT / file))
    if (venv / "bin/python").exists() and Path(sys.prefix) != venv:
        return f"source {shlex.quote(str(venv / 'bin/activate'))}"
    base = next(filter(shutil.which, ("python3.11", "python3.12", "python3.10")), None)
    if not base:
        return f"conda create -y -n danpu python=3.11 && conda run -n danpu pip install -r {file}"
    return f"{base} -m venv {shlex.quote(str(venv))} && {shlex.quote(str(venv / 'bin/python'))} -m pip install -r {file}"


def python():
    fact = f"{platform.python_version()} in {sys.prefix}{'' if in_environment() else ' (no virtual environment)'}"
    if good_python():
        return Line("python", OK, fact)
    return Line("python", MISSING, f"{fact}: must be 3.10, 3.11 or 3.12", new_environment())


def pins(file="requirements.txt"):
    """{package: version} of a requirements file and of those it names by -r, for this Python."""
    found = {}
    for text in read(ROOT / file).splitlines():
        if text.startswith("-r "):
            found.update(pins(text[3:].strip()))
        spec, _, marker = text.partition(";")
        pin = re.match(r"([\w.-]+)==(\S+)", spec)
        bound = re.search(r'python_version *(>=|<) *"(\d+)\.(\d+)"', marker)
        if pin and (
            not bound
            or (bound[1] == "<") == (sys.version_info[:2] < (int(bound[2]), int(bound[3])))
        ):
            found[pin[1]] = pin[2]
    return found


def installed(package):
    try:
        return metadata.version(package)
    except Exception:  # PackageNotFoundError, or a folder whose METADATA is gone
        return None


def requirements():
    npu = ascend_machine() and (ROOT / "requirements-npu.txt").exists()
    file = "requirements-npu.txt" if npu else "requirements.txt"
    wanted = pins(file)
    have = {name: installed(name) for name in wanted}
    absent = [name for name in wanted if not have[name]]
    other = [name for name in wanted if have[name] and have[name].split("+")[0] != wanted[name]]
    if not absent and not other:
        return Line("requirements", OK, f"{len(wanted)} packages as pinned in {file}")
    facts = [f"{name} {have[name]} (pinned: {wanted[name]})" for name in other]
    facts += [f"not installed: {', '.join(absent)}"] if absent else []
    names = " ".join(f"{name}=={wanted[name]}" for name in other + absent)
    remedy = f"{PIP} install {names if len(absent) < 4 else '-r ' + shlex.quote(str(ROOT / file))}"
    if absent and not (in_environment() and good_python()):
        remedy = new_environment(file)
    if not absent and env("DANPU_NO_VENV") != "1":
        return Line(
            "requirements",
            WARN,
            "; ".join([*facts, "the recipes' shells will use their .venv"]),
            remedy,
        )
    return Line("requirements", MISSING, "; ".join(facts), remedy)


def library(found, name):
    """torch, transformers or deepspeed: whether its import works, not only whether it is
    installed."""
    have, about = installed(name), found.get(name)
    if about:
        build = f" for CUDA {about['built_for']}" if about.get("built_for") else ""
        return Line(name, OK, f"{about['version']}{build}, import works")
    if not have:
        return Line(name, MISSING, "not installed")
    if name not in found["errors"]:
        return Line(name, WARN, f"{have}, not tried, since what comes before it fails")
    remedy = f"{PIP} install --force-reinstall {name}=={pins().get(name)}"
    return Line(name, MISSING, f"{have} cannot be imported: {found['errors'][name]}", remedy)


def offload(found):
    """What DeepSpeed compiles its CPU optimizer with; locks of killed builds, for which the next
    one waits."""
    folder = env("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    locks = glob.glob(os.path.expanduser(f"{folder}/**/lock"), recursive=True)
    locks = [lock for lock in locks if time.time() - os.path.getmtime(lock) > 60]
    if not shutil.which(env("CXX") or "c++"):
        return Line(
            "offload",
            WARN,
            "no C++ compiler for DeepSpeed's CPU optimizer",
            "apt-get install -y g++",
        )
    if not found.get("deepspeed", {}).get("ninja", True):
        remedy = f"export PATH={shlex.quote(sys.prefix)}/bin:$PATH"
        return Line("offload", WARN, "no ninja on PATH for DeepSpeed's CPU optimizer", remedy)
    if locks:  # recipes remove them when they start
        remedy = f"rm {' '.join(map(shlex.quote, locks))}"
        return Line("offload", WARN, f"{len(locks)} lock(s) left by killed builds", remedy)
    return Line("offload", OK, "C++ compiler and ninja for DeepSpeed's CPU optimizer")


# ---- devices ------------------------------------------------------------------------------------------------


def ascend_machine():
    """Whether launch.sh takes this for an Ascend machine: its cards, or the driver's tool."""
    return env("DANPU_DEVICE") != "cpu" and bool(glob.glob(CARDS) or shutil.which("npu-smi"))


def nvidia(found, smi):
    """Driver, and why torch uses no card; None without a trace of NVIDIA."""
    module = re.search(r"Module\s+([\d.]+)", read("/proc/driver/nvidia/version"))
    about, device = found.get("torch", {}), found.get("device", {})
    if not smi and not module:
        return None
    if smi and not smi[0]:
        return Line(
            "nvidia",
            WARN,
            smi[1],
            "sudo dmesg | grep -i nvrm | tail    # then reload the driver, or reboot",
        )
    fact = f"driver {smi[1] if smi else module[1]}, torch for CUDA {about.get('built_for')}, NCCL {about.get('nccl')}"
    if device.get("backend") != "gloo" or env("DANPU_DEVICE"):
        return Line("nvidia", OK, fact)
    hides = next((name for name in ("DEVICES", "CUDA_VISIBLE_DEVICES") if name in os.environ), None)
    why, remedy = (
        device["notes"] or "torch sees no card",
        "nvidia-smi    # torch may need a newer driver",
    )
    if hides:
        why, remedy = f"{hides}={env(hides)} shows torch no card", f"unset {hides}"
    if not about["built_for"]:
        why = "this torch is a build without CUDA"
        remedy = f"{PIP} install --force-reinstall torch=={pins().get('torch')}"
    return Line("nvidia", WARN, f"{fact}: {why}", remedy)


def cann(found):
    """Line about CANN: version, folder, whether its set_env.sh was sourced."""
    home = env("ASCEND_HOME_PATH") or found.get("torch", {}).get("cann")
    if not home:
        remedy = "source /usr/local/Ascend/cann/set_env.sh    # after https://www.hiascend.com/cann/download"
        return Line("cann", WARN, "not found", remedy)
    files = [*glob.glob(f"{home}/*-linux/ascend_toolkit_install.info"), f"{home}/version.cfg"]
    version = re.search(r"(?m)^version=(\S+)|\[[\d.]+:([^\]]+)\]", "\n".join(map(read, files)))
    fact = f"{version[1] or version[2] if version else 'unknown version'} in {home}"
    remedy = f"source {home.replace('/latest', '')}/set_env.sh"
    if not env("ASCEND_HOME_PATH"):
        return Line("cann", WARN, f"{fact}, set_env.sh was not sourced", remedy)
    if not os.path.isdir(env("ASCEND_OPP_PATH")):
        return Line(
            "cann",
            WARN,
            f"{fact}, ASCEND_OPP_PATH={env('ASCEND_OPP_PATH')} is not its operators",
            remedy,
        )
    return Line("cann", OK, f"{fact}, set_env.sh was sourced")


def ascend(found, smi):
    """Cards and driver, CANN, torch_npu; nothing without a trace of Ascend."""
    cards, wheel, error = (
        glob.glob(CARDS),
        installed("torch-npu"),
        found.get("torch", {}).get("npu_error"),
    )
    backend = found.get("device", {}).get("backend")
    bad = (
        MISSING if cards and ascend_machine() else WARN
    )  # launch.sh refuses to train on the CPU beside a card
    driver = re.search(r"(?m)^Version=(\S+)", read("/usr/local/Ascend/driver/version.info"))
    fact = f"{len(cards)} x /dev/davinci*, driver {driver[1] if driver else 'unknown'}, "
    fact += "no npu-smi" if not smi else "npu-smi answers" if smi[0] else smi[1]
    if any(not os.access(card, os.R_OK | os.W_OK) for card in cards):
        yield Line(
            "ascend", bad, f"{fact}; no permission to use them", "sudo usermod -aG HwHiAiUser $USER"
        )
    elif smi and not cards and backend != "hccl":
        remedy = "docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm"
        yield Line(
            "ascend", WARN, f"{fact}; no card is passed in", f"{remedy} --device /dev/hisi_hdc ..."
        )
    elif cards and backend == "gloo" and not error and bad == MISSING:
        yield Line(
            "ascend",
            WARN,
            f"{fact}; torch sees none of them",
            "unset ASCEND_RT_VISIBLE_DEVICES; npu-smi info",
        )
    elif smi or cards:
        yield Line("ascend", OK if smi and smi[0] else WARN, fact)
    if smi or cards or backend == "hccl":
        yield cann(found)
    if error:
        why, _, remedy = error.rpartition(": ")
        if not remedy.startswith(("source ", "pip ")):
            why, remedy = error, ""
        if not (smi or cards):  # then it is only in the way
            remedy = f"{PIP} uninstall -y torch-npu    # a plain `import torch` may fail beside it"
        yield Line("torch_npu", bad, f"{wheel} cannot be used: {why}", remedy)
    elif wheel:
        yield Line("torch_npu", OK, f"{wheel} beside torch {installed('torch')}")


def device(found):
    """What training uses: names, memory, cards that fail or that somebody else fills."""
    about, cards = found.get("device"), found.get("cards", [])
    if not about or len(cards) != about["count"]:
        why = (
            found["errors"].get("device")
            or found["errors"].get("cards")
            or "unknown, since torch does not work"
        )
        return Line("device", MISSING, why, "unset DANPU_DEVICE" if env("DANPU_DEVICE") else "")
    chosen = f" (DANPU_DEVICE={env('DANPU_DEVICE')})" if env("DANPU_DEVICE") else ""
    if not cards:
        return Line("device", OK, "CPU" + (chosen or ": torch sees no accelerator"))
    visible = "ASCEND_RT_VISIBLE_DEVICES" if about["backend"] == "hccl" else "CUDA_VISIBLE_DEVICES"
    variable = visible if env(visible) and not env("DEVICES") else "DEVICES"
    ids = (env(variable) or ",".join(map(str, range(len(cards))))).split(",")
    names = ", ".join(sorted({card["name"] for card in cards if "name" in card})) or "unusable card"
    memory = " ".join(f"{c.get('free', 0) / GIB:.0f}/{c.get('total', 0) / GIB:.0f}" for c in cards)
    fact = f"{len(cards)} x {names} over {about['backend']}{chosen}, GiB free/all: {memory}"
    good, busy, failing = [], [], {}
    for number, card in zip(ids, cards):  # noqa: B905 (Python 3.8)
        if "error" in card:
            failing.setdefault(card["error"], []).append(number)
        else:
            (good if card["free"] > card["total"] / 2 else busy).append(number)
    fact += "".join(
        f"; card {','.join(which)} cannot compute: {error}" for error, which in failing.items()
    )
    fact += f"; in use by others: card {','.join(busy)}" if busy else ""
    remedy = f"export {variable}={','.join(good)}" if good and (failing or busy) else ""
    return Line("device", MISSING if failing else WARN if busy else OK, fact, remedy)


def dtype(found):
    name = next((card["name"] for card in found.get("cards", []) if "name" in card), None)
    about = found.get("device", {"backend": None, "dtype": None})
    half = about["dtype"] == "bf16"
    if about["backend"] == "gloo":
        return Line(
            "dtype", OK, f"{about['dtype']}: this CPU has {'' if half else 'no '}AMX or AVX512-BF16"
        )
    if not name:
        return Line("dtype", WARN, "unknown, since no device works")
    if about["backend"] == "hccl" and OLD_ASCEND.match(name):
        older = "newer CANN does not list it; older stack: torch and torch-npu 2.7.1, CANN 8.3.RC1"
        return Line("dtype", WARN, f"{about['dtype']}: {name} has no bf16; {older}")
    return Line(
        "dtype",
        OK,
        f"{about['dtype']}: {name} has {'bf16' if half else 'no bf16; with a loss scaler'}",
    )


def settings(found):
    """Variables that change a run; those that launch.sh or a driver would refuse."""
    given = [
        f"{k}={v}"
        for k, v in sorted(os.environ.items())
        if TOLD.fullmatch(k) and not SECRET.search(k)
    ]
    fact, count, ids = (
        ", ".join(given) or "none set",
        found.get("device", {}).get("count"),
        "ASCEND_RT_VISIBLE_DEVICES",
    )
    if not re.fullmatch(r"\d+(,\d+)*", env("DEVICES") or "0"):
        return Line(
            "settings", MISSING, f"{fact}; DEVICES must be a list like 0,2", "unset DEVICES"
        )
    if (
        not re.fullmatch("[1-9][0-9]*", env("NPROC") or "1")
        or count
        and int(env("NPROC") or 1) > count
    ):
        return Line(
            "settings",
            MISSING,
            f"{fact}; NPROC must be 1 to the number of visible devices",
            "unset NPROC",
        )
    if env(ids) and env(ids) != probe.ascending(env(ids)):
        return Line(
            "settings",
            WARN,
            f"{fact}; {ids} must ascend",
            f"export {ids}={probe.ascending(env(ids))}",
        )
    wait = env("HCCL_CONNECT_TIMEOUT") or "120"
    if not (wait.isdigit() and 120 <= int(wait) <= 7200):
        return Line(
            "settings",
            WARN,
            f"{fact}; the timeout must be 120 to 7200 s",
            "export HCCL_CONNECT_TIMEOUT=1800",
        )
    return Line("settings", OK, fact)


# ---- the machine around them --------------------------------------------------------------------------------


def cgroup(controller, name):
    """Control files of this process's cgroup and of those above it (v2 and v1)."""
    for line in read("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if not names or controller in names.split(","):
            folder = (CGROUP / controller if names else CGROUP) / path.lstrip("/")
            yield from (
                place / name for place in [folder, *folder.parents] if (place / name).is_file()
            )


def cpu():
    name = re.search(r"(?m)^model name\s*:\s*(.*)", read("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0))
    fact = f"{name[1] if name else platform.machine()}, {cores} cores"
    quotas = [read(file).split() for file in cgroup("cpu", "cpu.max")]
    quotas += [
        [read(f), read(f.with_name("cpu.cfs_period_us"))] for f in cgroup("cpu", "cpu.cfs_quota_us")
    ]
    share = min(
        [int(quota) / int(period) for quota, period in quotas if quota.isdigit()], default=cores
    )
    if share >= cores:
        return Line("cpu", OK, fact)
    return Line(
        "cpu",
        WARN,
        f"{fact}, limited to {share:.1f}",
        f"export OMP_NUM_THREADS={max(1, int(share / 2))}",
    )


def memory():
    """Free and total; in a container what its limit leaves (cached files count as free)."""
    info = {
        key: int(size) << 10
        for key, size in re.findall(r"(?m)^(\w+):\s+(\d+) kB", read("/proc/meminfo"))
    }
    total, free, limited = info["MemTotal"], info["MemAvailable"], ""
    for name, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for file in cgroup("memory", name):
            if read(file).isdigit() and int(read(file)) < total:
                cached = re.findall(
                    r"(?m)^(?:total_)?inactive_file (\d+)", read(file.with_name("memory.stat"))
                )
                total, limited = int(read(file)), ", the limit of this container"
                free = min(
                    free,
                    total - int(read(file.with_name(used)) or 0) + max(map(int, cached), default=0),
                )
    few = free < 4 * GIB
    fact = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB{limited}"
    return Line("memory", WARN if few else OK, fact, "ps aux --sort -rss | head" if few else "")


def limits():
    """/dev/shm, in which DataLoader workers, NCCL and HCCL share memory, and open files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    size = shutil.disk_usage(SHM).total if os.path.isdir(SHM) else 0
    fact = f"{SHM} {size / GIB:.1f} GiB, {files} open files"
    if size < GIB:
        remedy = "docker run --shm-size 8g ...    # outside a container: sudo mount -o remount,size=8g /dev/shm"
        return Line("limits", WARN, fact, remedy)
    return Line("limits", *((OK, fact) if files >= 1024 else (WARN, fact, "ulimit -n 65536")))


def folder(key, path, variable, least, wanted, bad=MISSING):
    """Whether files can be made in `path` (or where it will be made) and its free space; limits in
    GiB."""
    place, remedy = (
        Path(path).expanduser().absolute(),
        f"export {variable}=/folder/on/a/larger/disk",
    )
    existing = next(p for p in [place, *place.parents] if os.path.lexists(p))
    if not existing.is_dir():
        return Line(key, bad, f"{place} cannot be made: {existing} is not a folder", remedy)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # only writing shows a quota
            file.write(bytes(1 << 20))
    except OSError as error:
        return Line(key, bad, f"{place} cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(existing).free / GIB
    status = bad if free < least else WARN if free < wanted else OK
    return Line(key, status, f"{place}, {free:,.1f} GiB free", "" if status == OK else remedy)


def hub_home():
    return Path(env("HF_HOME") or Path(env("XDG_CACHE_HOME") or "~/.cache") / "huggingface")


def folders():
    return [
        folder("output", env("OUTPUT") or ROOT / "output", "OUTPUT", 0.5, 20),
        folder("cache", env("DANPU_CACHE") or "~/.cache/danpu", "DANPU_CACHE", 0.2, 2),
        folder(
            "hub_cache", env("HF_HUB_CACHE") or hub_home() / "hub", "HF_HOME", 0.5, 20, bad=WARN
        ),
    ]


def hub(asked):
    """asked: {url: function to wait for what probe.web_server says}, the one that is used first;
    empty: offline."""
    token = f"HF_TOKEN {'set' if env('HF_TOKEN') or read(hub_home() / 'token') else 'not set'}"
    if not asked:
        return Line("hub", OK, f"not asked, {token}")
    until, reached, reasons = time.monotonic() + HUB_SECONDS + 1, {}, {}
    for url, answer in asked.items():
        host = url.partition("//")[2] or url
        good, words = answer(until - time.monotonic()) or (
            False,
            f"no answer within {HUB_SECONDS} s",
        )
        if good:
            reached[url] = f"{host} ({words})"
        else:
            reasons.setdefault(words, []).append(host)
    facts = [", ".join(reached.values())] if reached else []
    facts += [f"unreachable: {', '.join(hosts)} ({why})" for why, hosts in reasons.items()]
    proxies = " ".join(
        f"{kind}={url}" for kind, url in urllib.request.getproxies().items() if kind != "no"
    )
    fact = "; ".join([*facts, f"proxy {proxies}" if proxies else "no proxy", token])
    if next(iter(asked)) in reached:
        return Line("hub", OK, fact)
    remedy = "export MODEL=/folder/of/a/model    # the built-in model needs no hub"
    if MODELSCOPE in reached:
        remedy = "python -m tools.download ORG/NAME --source modelscope"
    return Line("hub", WARN, fact, f"export HF_ENDPOINT={MIRROR}" if MIRROR in reached else remedy)


def extras():
    """What some flags and tests use; training runs without."""
    bits = f"bitsandbytes (4-bit LoRA) {installed('bitsandbytes') or 'no'}"
    aria = f"aria2c (downloads) {'yes' if shutil.which('aria2c') else 'no'}"
    browser = (
        "yes" if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) else "no"
    )
    return Line("extras", OK, f"{bits}, {aria}, chromium (tests) {browser}")


# ---- the page -----------------------------------------------------------------------------------------------


def masked(text):
    """Without values of secret variables and without the user part of any address."""
    secrets = [v for k, v in os.environ.items() if SECRET.search(k) and len(v) >= 8]
    addresses = [
        v.partition("//")[2] or v
        for k, v in os.environ.items()
        if "//" in v or k.lower().endswith("_proxy")
    ]
    users = [user for user in (address.rpartition("@")[0] for address in addresses) if ":" in user]
    for secret in sorted(secrets + users, key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


def look(offline):
    """(lines, probe.torch_facts). A check that fails says so in a line of its own."""
    facts = probe.in_background(probe.torch_facts)
    gpu = probe.in_background(
        probe.tool, "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    npu = probe.in_background(probe.tool, "npu-smi", "info")
    urls = (
        []
        if offline
        else dict.fromkeys([env("HF_ENDPOINT").rstrip("/") or HUB, MIRROR, MODELSCOPE])
    )
    asked = {url: probe.in_background(probe.web_server, url, HUB_SECONDS) for url in urls}
    found, lines = facts(probe.SECONDS + 10) or {"errors": {}}, []
    gpu, npu = gpu(probe.TOOL_SECONDS + 5), npu(probe.TOOL_SECONDS + 5)
    for check, *given in (
        (system,),
        (python,),
        (requirements,),
        (library, found, "torch"),
        (library, found, "transformers"),
        (library, found, "deepspeed"),
        (offload, found),
        (nvidia, found, gpu),
        (ascend, found, npu),
        (device, found),
        (dtype, found),
        (settings, found),
        (cpu,),
        (memory,),
        (limits,),
        (folders,),
        (hub, asked),
        (extras,),
    ):
        try:
            got = check(*given)
            lines += [got] if isinstance(got, Line) else got or []
        except Exception as error:
            lines.append(
                Line(check.__name__, WARN, f"cannot be looked at: {probe.one_line(repr(error))}")
            )
    return [Line(*map(masked, line)) for line in lines], found


def verdict(lines, found):
    missing = [line.key for line in lines if line.status == MISSING]
    if missing:
        return f"not ready: {', '.join(missing)}. Begin with the first remedy above"
    about, cards = found["device"], found["cards"]
    count = int(env("NPROC") or about["count"] or 2)
    run = f"{count} process{'es' if count > 1 else ''} on {cards[0]['name'] if cards else 'CPU'} in {about['dtype']}"
    warned = ", ".join(line.key for line in lines if line.status == WARN)
    return f"ready: bash <recipe>/train_zero2.sh will use {run}" + (
        f"; worth a look: {warned}" if warned else ""
    )


def as_text(lines, final):
    colour = sys.stdout.isatty() and not env("NO_COLOR")
    width = max(80, shutil.get_terminal_size((120, 40)).columns) - 22
    text = []
    for line in lines:
        fact = textwrap.fill(line.fact, width, break_long_words=False, break_on_hyphens=False)
        status = f"{COLOURS[line.status]}{line.status:<7}\033[0m" if colour else f"{line.status:<7}"
        text.append(f"{status} {line.key:<13} {textwrap.indent(fact, ' ' * 22).lstrip()}")
        text += [" " * 22 + line.remedy] if line.remedy else []
    return "\n".join([*text, "", final])


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_env", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON, for bug reports; without secrets"
    )
    parser.add_argument("--offline", action="store_true", help="do not ask the model hubs")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    lines, found = look(args.offline or env("HF_HUB_OFFLINE").upper() in ("1", "ON", "YES", "TRUE"))
    final, ready = verdict(lines, found), all(line.status != MISSING for line in lines)
    text = as_text(lines, final)
    if args.json:
        checks = {
            line.key: {"status": line.status, "fact": line.fact, "remedy": line.remedy}
            for line in lines
        }
        text = json.dumps(
            {"ready": ready, "verdict": final, "checks": checks, "versions": versions()}, indent=1
        )
    sys.stdout.write(text + "\n")  # at once, so that `| head` gets it whole
    return 0 if ready else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
