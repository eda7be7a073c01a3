"""Start one process per device through torchrun's elastic agent, and end them cleanly (called by
launch.sh).

    python common/launch.py NPROC [--accelerate YAML] train.py [flags]
        NPROC: a number, or auto: one per device, 2 on a CPU
        YAML: a config of `accelerate launch` with DeepSpeed

What plain torchrun lacks: the exit code of the recipe is passed through (0 done, 1 failed, 2 usage,
75 interrupted); the error of the rank that failed first is the last thing printed, and what the
others say because of it is one line (common/runs/ranks.py); Ctrl-C or SIGTERM lets the ranks finish
their step and save (a second one ends them at once).
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STOPS = (signal.SIGINT, signal.SIGTERM)


def agent_arguments(nproc: int) -> list[str]:
    """torchrun's flags from NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; a free port unless one
    is given."""
    nnodes = int(os.environ.get("NNODES", 1))
    flags = [
        f"--nproc-per-node={nproc}",
        f"--nnodes={nnodes}",
        "--signals-to-handle=SIGHUP,SIGQUIT",
        "--monitor-interval=0.2",
    ]
    if nnodes == 1 and not os.environ.get("MASTER_PORT"):
        flags += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        flags += meeting_point(nnodes)
    return flags


def meeting_point(nnodes: int) -> list[str]:
    """torchrun's flags for the place where the machines of a run find each other."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1" if nnodes == 1 else "")
    if not address or (nnodes > 1 and "NODE_RANK" not in os.environ):
        sys.exit(
            "launch: several nodes need NNODES, NODE_RANK (0 on the first) and MASTER_ADDR "
            "(address of the first)"
        )
    return [
        f"--node-rank={os.environ.get('NODE_RANK', '0')}",
        f"--master-addr={address}",
        f"--master-port={os.environ.get('MASTER_PORT', 29500)}",
    ]


def processes(wanted: str) -> int:
    """Processes to start here, checked against the devices; sets what the ranks need on a CPU."""
    try:
        from common import device
    except ImportError as error:
        sys.exit(f"launch: {sys.executable} cannot import torch ({error}); {remedy()}")
    message, fatal = device.install_problem()
    if message:
        print(message, file=sys.stderr)
    if fatal:
        sys.exit(1)
    kind = device.kind()
    count = device.device_count()
    nproc = int(wanted) if wanted != "auto" else count or 2
    if count and nproc > count:
        print(f"launch: NPROC={nproc}, but {count} {kind} device(s) are visible", file=sys.stderr)
        sys.exit(2)
    if not count:
        settle_cpu(nproc)
        os.environ["DS_ACCELERATOR"] = kind
    return nproc


def remedy() -> str:
    """What helps a Python without torch; a recipe copied with common/ alone has no tools/."""
    if (ROOT / "tools/check_env.sh").exists():
        return "`bash tools/check_env.sh` says what to do"
    if (ROOT / "requirements.txt").exists():
        return f"{sys.executable} -m pip install -r {ROOT}/requirements.txt"
    return f"with the project's requirements.txt in {ROOT} the shells install what it needs"


def settle_cpu(nproc: int) -> None:
    """Threads and memory of `nproc` ranks on one CPU; what the user has set stays."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # one thread team per process; more threads than cores slows gloo runs several times
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    # huge pages for tensors: 6-10 % faster
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def accelerate_environment(config: Path, nproc: int) -> None:
    """Set what `accelerate launch --config_file config` tells its ranks through the environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    flags = ["--config_file", str(config), "--num_processes", str(nproc)]
    flags += ["--main_process_port", "0", "train.py"]
    args = launch_command_parser().parse_args(flags)
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    if args.deepspeed_config_file:  # as a relative path it means a file beside the config
        args.deepspeed_config_file = str(config.parent / args.deepspeed_config_file)
    variables = prepare_deepspeed_cmd_env(args)[1]
    for name, value in variables.items():
        if name.startswith("ACCELERATE_"):
            os.environ[name] = value


def start_ranks(nproc: int, script: list[str], logs: str | None) -> None:
    """Start the ranks and wait for them; ChildFailedError when one fails.

    logs: where the others than the first local rank, the only one that speaks, leave what they
        say; None: all speak.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import elastic_launch

    args = run.parse_args([*agent_arguments(nproc), *script])
    config, command, arguments = run.config_from_args(args)
    if logs:  # the flag --redirects knows ten ranks only
        silent = {rank: Std.ALL for rank in range(1, nproc)}
        config.logs_specs = DefaultLogsSpecs(log_dir=logs, redirects=silent)
    elastic_launch(config, command)(*arguments)


def patience(words: list[str]) -> int:
    """Seconds that a rank may keep the others waiting."""
    from common import device

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag = ("--ddp_timeout", "--ddp-timeout")
    parser.add_argument(*flag, type=int, default=device.DDP_TIMEOUT)
    with contextlib.suppress(argparse.ArgumentError):  # no number: the ranks say so
        return parser.parse_known_args(words)[0].ddp_timeout
    return device.DDP_TIMEOUT


def forward_signals(watch) -> list[int]:
    """First Ctrl-C / SIGTERM: pass it on, so that the ranks save, or end where there are none yet.
    Second: kill them. Returns the list that those seen come into.

    A thread does it: while the main thread waits for other machines no handler of Python runs.
    """
    import psutil

    from common import cli

    seen: list[int] = []
    source, end = os.pipe()
    os.set_blocking(end, False)

    def pass_on():
        while True:
            number = os.read(source, 1)[0]
            if number not in STOPS:  # torchrun's agent listens to others
                continue
            seen.append(number)
            first = len(seen) == 1
            found = psutil.Process().children(recursive=not first)
            if not found and not watch.seen:
                cli.say_in_handler(f"\ninterrupted. {cli.how_to_go_on()}")
                os._exit(cli.INTERRUPTED)
            for child in found:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    child.send_signal(signal.SIGTERM if first else signal.SIGKILL)

    signal.set_wakeup_fd(end)
    for number in STOPS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=pass_on, daemon=True).start()
    return seen


def main() -> int:
    sys.path.insert(0, str(ROOT))
    nproc = processes(sys.argv[1])
    script = sys.argv[2:]
    if script[0] == "--accelerate":
        accelerate_environment(Path(script[1]).resolve(), nproc)
        script = script[2:]
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from common.runs import ranks

    is_verbose = os.environ.get("DANPU_VERBOSE") == "1"
    if not is_verbose:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    os.environ["DANPU_LAUNCHER"] = str(os.getpid())
    watch = ranks.Watch(nproc, patience(script))
    watch.start()
    signals = forward_signals(watch)
    relay = None if is_verbose else ranks.Relay(watch)
    failures = {}
    with tempfile.TemporaryDirectory(prefix="danpu-logs-") as logs:
        try:
            start_ranks(nproc, script, None if is_verbose else logs)
        except ChildFailedError as error:
            failures = error.failures
        finally:
            if relay:
                relay.end(release=not failures)
        codes = {one.exitcode for one in failures.values()}
        # a rank that is still importing cannot say so itself
        if failures and (len(signals) > 1 or (signals and codes == {-signal.SIGTERM})):
            ranks.say("launch: stopped at once; the same command goes on from what is saved")
            return ranks.INTERRUPTED
        return ranks.report(failures, watch, relay, logs) if failures else 0


if __name__ == "__main__":
    sys.exit(main())
