"""One page about this machine: what training will use, what is missing, and the command that helps.

    bash tools/check_env.sh                          with CANN and the Python of the recipes' shells
    python -m tools.check_env [--json] [--offline]   with the active Python

Exit code 0: training can run; 1: a line says MISSING. Needs no torch, and any Python from 3.8.
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.runs import machine
from common.runs.machine import read
from tools import probe

ROOT = Path(__file__).resolve().parents[1]
PIP = f"{shlex.quote(sys.executable)} -m pip"
SHM = "/dev/shm"
HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://www.modelscope.cn"
HUB_SECONDS = 5
GIB = 2**30
OK = "ok"
WARN = "warn"
MISSING = "MISSING"
COLOURS = {OK: "\033[32m", WARN: "\033[33m", MISSING: "\033[31m"}
SECRET = re.compile("TOKEN|SECRET|PASSW|KEY", re.IGNORECASE)
CHANGES_A_RUN = re.compile(
    "(DANPU|HF|NCCL|HCCL|MASTER|PYTORCH)_.*|DEVICES|.*_VISIBLE_DEVICES|"
    "NPROC|NNODES|NODE_RANK|HOSTFILE|MODEL|DATA"
)
# the first generation, without bf16; 910B1 to B4 are another chip
OLD_ASCEND = re.compile("Ascend910(A|B|Pro.*|Premium.*)$")


class Line(NamedTuple):
    """status: OK, WARN (training can run) or MISSING (it cannot); remedy: a command to paste."""

    status: str
    fact: str
    remedy: str = ""


def env(name):
    return os.environ.get(name, "").strip()


# ---- Python and packages -------------------------------------------------------------------------


def system():
    name = re.search(r'PRETTY_NAME="?([^"\n]*)', read("/etc/os-release"))
    parts = [name[1] if name else platform.system(), platform.machine()]
    parts.append(" ".join(platform.libc_ver()))
    if any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))):
        parts.append("in a container")
    return Line(OK, ", ".join(parts))


def in_environment():
    return sys.prefix != sys.base_prefix or bool(env("CONDA_PREFIX"))


def new_environment(file):
    """Command for a Python that can run the recipes; .venv is where their shells look."""
    venv = ROOT / ".venv"
    own = venv / "bin/python"
    if own.exists() and Path(sys.prefix) != venv:
        return f"source {shlex.quote(str(venv / 'bin/activate'))}"
    install = f"pip install -r {shlex.quote(str(file))}"
    base = machine.base_python()
    if not base:
        return f"conda create -y -n danpu python=3.11 && conda run -n danpu {install}"
    return f"{base} -m venv {shlex.quote(str(venv))} && {shlex.quote(str(own))} -m {install}"


def python():
    fact = f"{platform.python_version()} in {sys.prefix}"
    if not in_environment():
        fact += " (no virtual environment)"
    if machine.supported():
        return Line(OK, fact)
    remedy = new_environment(machine.requirements(ROOT))
    return Line(MISSING, f"{fact}: must be {machine.PYTHONS}", remedy)


def requirements():
    file = machine.requirements(ROOT)
    pinned = machine.pins(file)
    lacks = machine.missing(file)
    if not lacks:
        return Line(OK, f"{len(pinned)} packages as pinned in {file.name}")
    other = {name: have for name, have in lacks.items() if have}
    absent = [name for name in lacks if name not in other]
    facts = [f"{name} {have} (pinned: {pinned[name]})" for name, have in other.items()]
    if absent:
        facts.append(f"not installed: {', '.join(absent)}")
    names = " ".join(f"{name}=={pinned[name]}" for name in [*other, *absent])
    few = len(absent) < 4
    remedy = f"{PIP} install {names if few else '-r ' + shlex.quote(str(file))}"
    if absent and not (in_environment() and machine.supported()):
        remedy = new_environment(file)
    if absent or env("DANPU_NO_VENV") == "1":
        return Line(MISSING, "; ".join(facts), remedy)
    facts.append("the recipes' shells will use their .venv")
    return Line(WARN, "; ".join(facts), remedy)


def pinned(name):
    """What to give pip for a package of the requirements."""
    return f"{name}=={machine.pins(ROOT / 'requirements.txt').get(name)}"


def library(name, found):
    """Whether the import of torch, transformers or deepspeed works, not only whether it is
    installed."""
    have = machine.installed(name)
    about = found.get(name)
    if about:
        build = f" for CUDA {about['built_for']}" if about.get("built_for") else ""
        return Line(OK, f"{about['version']}{build}, import works")
    if not have:
        return Line(MISSING, "not installed")
    if name not in found["errors"]:
        return Line(WARN, f"{have}, not tried, since what comes before it fails")
    fact = f"{have} cannot be imported: {found['errors'][name]}"
    return Line(MISSING, fact, f"{PIP} install --force-reinstall {pinned(name)}")


def offload(found):
    """What DeepSpeed compiles its CPU optimizer with, and what killed builds of it left."""
    if not shutil.which(env("CXX") or "c++"):
        fact = "no C++ compiler for DeepSpeed's CPU optimizer"
        return Line(WARN, fact, "apt-get install -y g++")
    if not found.get("deepspeed", {}).get("ninja", True):
        remedy = f"export PATH={shlex.quote(sys.prefix)}/bin:$PATH"
        return Line(WARN, "no ninja on PATH for DeepSpeed's CPU optimizer", remedy)
    locks = machine.stale_build_locks()
    if locks:  # recipes remove them when they start
        remedy = f"rm {' '.join(map(shlex.quote, locks))}"
        return Line(WARN, f"{len(locks)} lock(s) left by killed builds", remedy)
    return Line(OK, "C++ compiler and ninja for DeepSpeed's CPU optimizer")


# ---- devices -------------------------------------------------------------------------------------


def nvidia(found, smi):
    """Driver, and why torch uses no card; None without a trace of NVIDIA."""
    module = re.search(r"Module\s+([\d.]+)", read("/proc/driver/nvidia/version"))
    if not smi and not module:
        return None
    if smi and not smi[0]:
        remedy = "sudo dmesg | grep -i nvrm | tail    # then reload the driver, or reboot"
        return Line(WARN, smi[1], remedy)
    torch = found.get("torch", {})
    driver = smi[1] if smi else module[1]
    fact = f"driver {driver}, torch for CUDA {torch.get('built_for')}, NCCL {torch.get('nccl')}"
    on_cpu = found.get("device", {}).get("backend") == "gloo"
    if not on_cpu or env("DANPU_DEVICE"):
        return Line(OK, fact)
    why, remedy = why_no_card(torch["built_for"], found["device"]["notes"])
    return Line(WARN, f"{fact}: {why}", remedy)


def why_no_card(built_for, notes):
    """(why torch uses none of the NVIDIA cards, remedy)."""
    if not built_for:
        remedy = f"{PIP} install --force-reinstall {pinned('torch')}"
        return "this torch is a build without CUDA", remedy
    for name in ("DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            return f"{name}={env(name)} shows torch no card", f"unset {name}"
    return notes or "torch sees no card", "nvidia-smi    # torch may need a newer driver"


def ascend(found, smi):
    """Cards and driver; None without a trace of them."""
    cards = machine.ascend_cards()
    backend = found.get("device", {}).get("backend")
    if not smi and not cards:
        return None
    driver = re.search(r"(?m)^Version=(\S+)", read("/usr/local/Ascend/driver/version.info"))
    fact = f"{len(cards)} x /dev/davinci*, driver {driver[1] if driver else 'unknown'}, "
    if not smi:
        fact += "no npu-smi"
    else:
        fact += "npu-smi answers" if smi[0] else smi[1]
    if any(not os.access(card, os.R_OK | os.W_OK) for card in cards):
        remedy = "sudo usermod -aG HwHiAiUser $USER"
        return Line(unusable_ascend(), f"{fact}; no permission to use them", remedy)
    if not cards and backend != "hccl":
        devices = ("davinci0", "davinci_manager", "devmm_svm", "hisi_hdc")
        remedy = f"docker run {' '.join(f'--device /dev/{name}' for name in devices)} ..."
        return Line(WARN, f"{fact}; no card is passed in", remedy)
    if backend == "gloo" and unusable_ascend() == MISSING and not npu_error(found):
        remedy = "unset ASCEND_RT_VISIBLE_DEVICES; npu-smi info"
        return Line(WARN, f"{fact}; torch sees none of them", remedy)
    return Line(OK if smi and smi[0] else WARN, fact)


def unusable_ascend():
    """Status of an Ascend that cannot be used: the launcher refuses to train on the CPU beside a
    card."""
    return MISSING if machine.ascend_cards() and machine.is_ascend() else WARN


def npu_error(found):
    return found.get("torch", {}).get("npu_error")


def cann(found, smi):
    """Version, folder, whether its set_env.sh was sourced; None where nothing asks for CANN."""
    backend = found.get("device", {}).get("backend")
    if not (smi or machine.ascend_cards() or backend == "hccl"):
        return None
    home = env("ASCEND_HOME_PATH") or found.get("torch", {}).get("cann")
    if not home:
        remedy = "source /usr/local/Ascend/cann/set_env.sh"
        return Line(
            WARN, "not found", f"{remedy}    # after https://www.hiascend.com/cann/download"
        )
    files = [*glob.glob(f"{home}/*-linux/ascend_toolkit_install.info"), f"{home}/version.cfg"]
    version = re.search(r"(?m)^version=(\S+)|\[[\d.]+:([^\]]+)\]", "\n".join(map(read, files)))
    words = version[1] or version[2] if version else "unknown version"
    fact = f"{words} in {home}"
    remedy = f"source {home.replace('/latest', '')}/set_env.sh"
    if not env("ASCEND_HOME_PATH"):
        return Line(WARN, f"{fact}, set_env.sh was not sourced", remedy)
    operators = env("ASCEND_OPP_PATH")
    if not os.path.isdir(operators):
        return Line(WARN, f"{fact}, ASCEND_OPP_PATH={operators} is not its operators", remedy)
    return Line(OK, f"{fact}, set_env.sh was sourced")


def torch_npu(found, smi):
    """Whether it can be used; None where it is not installed."""
    wheel = machine.installed("torch-npu")
    error = npu_error(found)
    if not error:
        beside = f"{wheel} beside torch {machine.installed('torch')}"
        return Line(OK, beside) if wheel else None
    why, _, remedy = error.rpartition(": ")
    if not remedy.startswith(("source ", "pip ")):
        why = error
        remedy = ""
    if not smi and not machine.ascend_cards():  # then it is only in the way
        remedy = f"{PIP} uninstall -y torch-npu    # a plain `import torch` may fail beside it"
    return Line(unusable_ascend(), f"{wheel} cannot be used: {why}", remedy)


def device(found):
    """What training uses: names, memory, cards that fail or that somebody else fills."""
    about = found.get("device")
    cards = found.get("cards", [])
    forced = env("DANPU_DEVICE")
    if not about or len(cards) != about["count"]:
        errors = found["errors"]
        why = errors.get("device") or errors.get("cards") or "unknown, since torch does not work"
        return Line(MISSING, why, "unset DANPU_DEVICE" if forced else "")
    chosen = f" (DANPU_DEVICE={forced})" if forced else ""
    if not cards:
        return Line(OK, "CPU" + (chosen or ": torch sees no accelerator"))
    names = ", ".join(sorted({card["name"] for card in cards if "name" in card}))
    memory = " ".join(f"{c.get('free', 0) / GIB:.0f}/{c.get('total', 0) / GIB:.0f}" for c in cards)
    fact = f"{len(cards)} x {names or 'unusable card'} over {about['backend']}{chosen}"
    return usable(cards, about["backend"], f"{fact}, GiB free/all: {memory}")


def usable(cards, backend, fact):
    """The line about cards; the remedy leaves out those that fail or are in use."""
    visible = "ASCEND_RT_VISIBLE_DEVICES" if backend == "hccl" else "CUDA_VISIBLE_DEVICES"
    variable = visible if env(visible) and not env("DEVICES") else "DEVICES"
    ids = env(variable).split(",") if env(variable) else map(str, range(len(cards)))
    good = []
    busy = []
    failing = {}
    for number, card in zip(ids, cards):  # noqa: B905 (Python 3.8)
        if "error" in card:
            failing.setdefault(card["error"], []).append(number)
        elif card["free"] > card["total"] / 2:
            good.append(number)
        else:
            busy.append(number)
    for error, numbers in failing.items():
        fact += f"; card {','.join(numbers)} cannot compute: {error}"
    if busy:
        fact += f"; in use by others: card {','.join(busy)}"
    if not failing and not busy:
        return Line(OK, fact)
    remedy = f"export {variable}={','.join(good)}" if good else ""
    return Line(MISSING if failing else WARN, fact, remedy)


def dtype(found):
    about = found.get("device", {"backend": None, "dtype": None})
    kind = about["dtype"]
    if about["backend"] == "gloo":
        has = "" if kind == "bf16" else "no "
        return Line(OK, f"{kind}: this CPU has {has}AMX or AVX512-BF16")
    names = [card["name"] for card in found.get("cards", []) if "name" in card]
    if not names:
        return Line(WARN, "unknown, since no device works")
    if about["backend"] == "hccl" and OLD_ASCEND.match(names[0]):
        older = "newer CANN does not list it; older stack: torch and torch-npu 2.7.1, CANN 8.3.RC1"
        return Line(WARN, f"{kind}: {names[0]} has no bf16; {older}")
    has = "bf16" if kind == "bf16" else "no bf16; with a loss scaler"
    return Line(OK, f"{kind}: {names[0]} has {has}")


def settings(found):
    """Variables that change a run; those that launch.sh or a driver would refuse."""
    given = []
    for name, value in sorted(os.environ.items()):
        if CHANGES_A_RUN.fullmatch(name) and not SECRET.search(name):
            given.append(f"{name}={value}")
    fact = ", ".join(given) or "none set"
    if not re.fullmatch(r"\d+(,\d+)*", env("DEVICES") or "0"):
        return Line(MISSING, f"{fact}; DEVICES must be a list like 0,2", "unset DEVICES")
    count = found.get("device", {}).get("count")
    nproc = env("NPROC") or "1"
    if not re.fullmatch("[1-9][0-9]*", nproc) or (count and int(nproc) > count):
        fact += "; NPROC must be 1 to the number of visible devices"
        return Line(MISSING, fact, "unset NPROC")
    ids = env("ASCEND_RT_VISIBLE_DEVICES")
    if ids and ids != machine.ascending(ids):
        remedy = f"export ASCEND_RT_VISIBLE_DEVICES={machine.ascending(ids)}"
        return Line(WARN, f"{fact}; ASCEND_RT_VISIBLE_DEVICES must ascend", remedy)
    wait = env("HCCL_CONNECT_TIMEOUT") or "120"
    if not (wait.isdigit() and 120 <= int(wait) <= 7200):
        fact += "; the timeout must be 120 to 7200 s"
        return Line(WARN, fact, "export HCCL_CONNECT_TIMEOUT=1800")
    return Line(OK, fact)


# ---- the machine around them ---------------------------------------------------------------------


def cpu():
    name = re.search(r"(?m)^model name\s*:\s*(.*)", read("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0))
    fact = f"{name[1] if name else platform.machine()}, {cores} cores"
    quotas = [read(file).split() for file in machine.cgroup("cpu", "cpu.max")]
    for file in machine.cgroup("cpu", "cpu.cfs_quota_us"):
        quotas.append([read(file), read(file.with_name("cpu.cfs_period_us"))])
    shares = [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]
    share = min(shares, default=cores)
    if share >= cores:
        return Line(OK, fact)
    remedy = f"export OMP_NUM_THREADS={max(1, int(share / 2))}"
    return Line(WARN, f"{fact}, limited to {share:.1f}", remedy)


def memory():
    """Free and total; in a container what its limit leaves."""
    host = machine.host_memory()
    note = ", the limit of this container" if host.limited else ""
    fact = f"{host.free / GIB:.1f} GiB free of {host.total / GIB:.1f} GiB{note}"
    if host.free < 4 * GIB:
        return Line(WARN, fact, "ps aux --sort -rss | head")
    return Line(OK, fact)


def limits():
    """/dev/shm, in which DataLoader workers, NCCL and HCCL share memory, and open files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    size = shutil.disk_usage(SHM).total if os.path.isdir(SHM) else 0
    fact = f"{SHM} {size / GIB:.1f} GiB, {files} open files"
    if size < GIB:
        outside = "sudo mount -o remount,size=8g /dev/shm"
        return Line(WARN, fact, f"docker run --shm-size 8g ...    # outside a container: {outside}")
    if files < 1024:
        return Line(WARN, fact, "ulimit -n 65536")
    return Line(OK, fact)


def folder(path, variable, least, wanted, bad=MISSING):
    """Whether files can be made in `path` (or where it will be made), and its free space; limits in
    GiB."""
    place = Path(path).expanduser().absolute()
    remedy = f"export {variable}=/folder/on/a/larger/disk"
    existing = next(p for p in [place, *place.parents] if os.path.lexists(p))
    if not existing.is_dir():
        return Line(bad, f"{place} cannot be made: {existing} is not a folder", remedy)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # only writing shows a quota
            file.write(bytes(1 << 20))
    except OSError as error:
        return Line(bad, f"{place} cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(existing).free / GIB
    fact = f"{place}, {free:,.1f} GiB free"
    if free >= wanted:
        return Line(OK, fact)
    return Line(bad if free < least else WARN, fact, remedy)


def output():
    return folder(env("OUTPUT") or ROOT / "output", "OUTPUT", 0.5, 20)


def cache():
    return folder(env("DANPU_CACHE") or "~/.cache/danpu", "DANPU_CACHE", 0.2, 2)


def hub_home():
    return Path(env("HF_HOME") or Path(env("XDG_CACHE_HOME") or "~/.cache") / "huggingface")


def hub_cache():
    return folder(env("HF_HUB_CACHE") or hub_home() / "hub", "HF_HOME", 0.5, 20, bad=WARN)


def ask_hubs():
    """{url: function to wait for what probe.web_server says}, the hub that is used first."""
    urls = dict.fromkeys([env("HF_ENDPOINT").rstrip("/") or HUB, MIRROR, MODELSCOPE])
    return {url: probe.in_background(probe.web_server, url, HUB_SECONDS) for url in urls}


def hub(asked):
    """asked: of `ask_hubs`; empty: offline."""
    token = f"HF_TOKEN {'set' if env('HF_TOKEN') or read(hub_home() / 'token') else 'not set'}"
    if not asked:
        return Line(OK, f"not asked, {token}")
    until = time.monotonic() + HUB_SECONDS + 1
    silent = (False, f"no answer within {HUB_SECONDS} s")
    reached = {}
    reasons = {}
    for url, answer in asked.items():
        host = url.partition("//")[2] or url
        good, words = answer(until - time.monotonic()) or silent
        if good:
            reached[url] = f"{host} ({words})"
        else:
            reasons.setdefault(words, []).append(host)
    facts = [", ".join(reached.values())] if reached else []
    facts += [f"unreachable: {', '.join(hosts)} ({why})" for why, hosts in reasons.items()]
    proxies = urllib.request.getproxies().items()
    shown = " ".join(f"{kind}={url}" for kind, url in proxies if kind != "no")
    fact = "; ".join([*facts, f"proxy {shown}" if shown else "no proxy", token])
    if next(iter(asked)) in reached:
        return Line(OK, fact)
    if MIRROR in reached:
        return Line(WARN, fact, f"export HF_ENDPOINT={MIRROR}")
    if MODELSCOPE in reached:
        return Line(WARN, fact, "python -m tools.download ORG/NAME --source modelscope")
    return Line(WARN, fact, "export MODEL=/folder/of/a/model    # the built-in model needs no hub")


def extras():
    """What some flags and tests use; training runs without."""

    def has(*programs):
        return "yes" if any(map(shutil.which, programs)) else "no"

    bits = machine.installed("bitsandbytes") or "no"
    browser = has("chromium", "chromium-browser", "google-chrome")
    fact = f"bitsandbytes (4-bit LoRA) {bits}, aria2c (downloads) {has('aria2c')}"
    return Line(OK, f"{fact}, chromium (tests) {browser}")


# ---- the page ------------------------------------------------------------------------------------


def masked(text):
    """Without values of secret variables and without the user part of any address."""
    secrets = []
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            secrets.append(value)
        if "//" in value or name.lower().endswith("_proxy"):
            user = (value.partition("//")[2] or value).rpartition("@")[0]
            if ":" in user:
                secrets.append(user)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


def look(offline):
    """({name: line}, what probe.torch_facts found). A check that fails says so in its line."""
    version = ("--query-gpu=driver_version", "--format=csv,noheader")
    facts = probe.in_background(probe.torch_facts)
    gpu = probe.in_background(probe.tool, "nvidia-smi", *version)
    npu = probe.in_background(probe.tool, "npu-smi", "info")
    asked = {} if offline else ask_hubs()
    found = facts(probe.SECONDS + 10) or {"errors": {}}
    gpu = gpu(probe.TOOL_SECONDS + 5)
    npu = npu(probe.TOOL_SECONDS + 5)
    checks = {
        "system": system,
        "python": python,
        "requirements": requirements,
        "torch": partial(library, "torch", found),
        "transformers": partial(library, "transformers", found),
        "deepspeed": partial(library, "deepspeed", found),
        "offload": partial(offload, found),
        "nvidia": partial(nvidia, found, gpu),
        "ascend": partial(ascend, found, npu),
        "cann": partial(cann, found, npu),
        "torch_npu": partial(torch_npu, found, npu),
        "device": partial(device, found),
        "dtype": partial(dtype, found),
        "settings": partial(settings, found),
        "cpu": cpu,
        "memory": memory,
        "limits": limits,
        "output": output,
        "cache": cache,
        "hub_cache": hub_cache,
        "hub": partial(hub, asked),
        "extras": extras,
    }
    lines = {}
    for name, check in checks.items():
        try:
            line = check()
        except Exception as error:
            line = Line(WARN, f"cannot be looked at: {probe.one_line(repr(error))}")
        if line:
            lines[name] = Line(*map(masked, line))
    return lines, found


def those(lines, status):
    return [name for name, line in lines.items() if line.status == status]


def verdict(lines, found):
    missing = those(lines, MISSING)
    if missing:
        return f"not ready: {', '.join(missing)}. Begin with the first remedy above"
    count = int(env("NPROC") or found["device"]["count"] or 2)
    processes = f"{count} process{'es' if count > 1 else ''}"
    name = found["cards"][0]["name"] if found["cards"] else "CPU"
    run = f"{processes} on {name} in {found['device']['dtype']}"
    warned = those(lines, WARN)
    ending = f"; worth a look: {', '.join(warned)}" if warned else ""
    return f"ready: bash <recipe>/train_zero2.sh will use {run}{ending}"


def as_text(lines, final):
    colour = sys.stdout.isatty() and not env("NO_COLOR")
    margin = " " * 22
    width = max(80, shutil.get_terminal_size((120, 40)).columns) - len(margin)
    text = []
    for name, line in lines.items():
        fact = textwrap.fill(line.fact, width, break_long_words=False, break_on_hyphens=False)
        status = f"{line.status:<7}"
        if colour:
            status = f"{COLOURS[line.status]}{status}\033[0m"
        text.append(f"{status} {name:<13} {textwrap.indent(fact, margin).lstrip()}")
        if line.remedy:
            text.append(margin + line.remedy)
    return "\n".join([*text, "", final])


def as_json(lines, final):
    answer = {
        "ready": not those(lines, MISSING),
        "verdict": final,
        "checks": {name: line._asdict() for name, line in lines.items()},
        "versions": machine.versions(),
    }
    return json.dumps(answer, indent=1)


def main(argv=None):
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.check_env", description=about)
    json_help = "the same as JSON, for bug reports; without secrets"
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--offline", action="store_true", help="do not ask the model hubs")
    args = parser.parse_args(argv)
    machine.tolerate_terminals()
    hubs_off = env("HF_HUB_OFFLINE").upper() in ("1", "ON", "YES", "TRUE")
    lines, found = look(args.offline or hubs_off)
    form = as_json if args.json else as_text
    text = form(lines, verdict(lines, found))
    sys.stdout.write(text + "\n")  # at once, so that `| head` gets it whole
    return 1 if those(lines, MISSING) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
