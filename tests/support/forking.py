"""Processes that start with torch and its friends imported: tests spend most of their time on those
imports.

A server imports the libraries once (nothing of the project) and forks itself for each process that
a test, or a launcher under test, wants to start. What is started instead of Python is a small
client: it hands its arguments, variables, folder and streams to the server, passes signals on and
ends as its process ended. Where the variables would change what the libraries read at import, the
client becomes the real Python.

    python = forking.client(folder, env)  # the client; one server for all that share `folder`
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

LIBRARIES = (
    "torch", "torch.distributed.run", "transformers.trainer", "transformers.generation", "transformers.masking_utils",
    "transformers.models.llama.modeling_llama", "deepspeed", "peft", "datasets", "matplotlib.pyplot",
    "torch.utils.tensorboard", "accelerate", "psutil",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every ZeRO run asks for it; it brings torch's compiler
)  # fmt: skip
READ_AT_IMPORT = (  # beginnings of variables
    "HF_", "TRANSFORMERS_", "OMP_", "MKL_", "PYTHON", "DS_", "CUDA_", "TORCH", "LD_", "ASCEND", "NPU", "NUMEXPR", "MPL",
    "DANPU_DEVICE", "DANPU_VERBOSE", "XDG_", "HOME", "LANG", "LC_", "TMP",
)  # fmt: skip
NOT_READ = (
    "TORCHELASTIC",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_NCCL",
    "PYTHON_EXEC",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    # how much the libraries say, which obey() sets in the new process
    "TRANSFORMERS_VERBOSITY",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_DISABLE_TELEMETRY",
    "PYTHONWARNINGS",
    "PYTHONUNBUFFERED",
    "PYTHONUTF8",
    "TORCH_CPP_LOG_LEVEL",
    "ASCEND_GLOBAL_LOG_LEVEL",
    "ASCEND_SLOG_PRINT_TO_STDOUT",
    "DS_ACCELERATOR",  # what it says is what DeepSpeed finds on its own, on the CPU and on NPUs
)
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUTF8": "1"}  # as launch.sh has them
SECONDS_BETWEEN_LOOKS = 5  # of a server, whether it is still wanted

CLIENT = """
import os, signal, socket, sys
def become_python():
    os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
if sys.argv[1:2] and sys.argv[1].startswith("-") and sys.argv[1] not in ("-c", "-m", "-u"):
    become_python()
seen = {k: v for k, v in os.environ.items() if k.startswith(READ_AT_IMPORT) and not k.startswith(NOT_READ)}
if seen != KNOWN:
    if "DANPU_FORK_DEBUG" in os.environ:
        print({k: (seen.get(k), KNOWN.get(k)) for k in {*seen, *KNOWN} if seen.get(k) != KNOWN.get(k)}, file=sys.stderr)
    become_python()
import json
line = socket.socket(socket.AF_UNIX)
try:
    line.connect(ADDRESS)
except OSError:
    become_python()
what = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(line, [len(what).to_bytes(4, "big")], [0, 1, 2])
line.sendall(what)
pid = int.from_bytes(line.recv(4), "big")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = line.recv(4)
code = os.waitstatus_to_exitcode(int.from_bytes(status, "big")) if len(status) == 4 else 70
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def watched(env: dict) -> dict:
    return {
        k: v for k, v in env.items() if k.startswith(READ_AT_IMPORT) and not k.startswith(NOT_READ)
    }


def client(folder: Path, env: dict, often: bool) -> Path | None:
    """What to start instead of Python for processes with the variables `env`; None where Python
    itself is as quick.

    Args:
        folder: of all servers of a test session; they end when it is gone, or its `owner`.
        often: whether many processes with these variables come; else a server is started when they
            are asked for a second time, as it costs as much as one process.
    """
    from filelock import FileLock

    key = hashlib.sha256(json.dumps(watched(env), sort_keys=True).encode()).hexdigest()[:12]
    own = folder / key
    python = own / "python"
    with FileLock(folder / f"{key}.lock"):
        first = not own.exists()
        own.mkdir(exist_ok=True)
        if not python.exists() and (often or not first):
            start(own, env)
    return python if python.exists() else None


def start(folder: Path, env: dict) -> None:
    """Start a server whose client is folder/python; none where the libraries cannot be imported."""
    address = folder / "socket"
    names = {"PYTHON": sys.executable, "KNOWN": watched(env), "ADDRESS": str(address)}
    names |= {"READ_AT_IMPORT": READ_AT_IMPORT, "NOT_READ": NOT_READ}
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, address],
            env={k: v for k, v in env.items() if k != "PYTHONWARNINGS"} | QUIET,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    # after what the libraries have to say
    if "ready\n" not in iter(server.stdout.readline, ""):
        return
    part = folder / "python.part"
    part.write_text(f"#!{sys.executable} -IS\n{head}{CLIENT}")
    part.chmod(0o755)
    part.rename(folder / "python")


def wanted(folder: Path) -> bool:
    """Whether the test session that a server was started for still runs."""
    try:
        os.kill(int((folder / "owner").read_text()), 0)
    except OSError:
        return False
    return True


def serve(address: str) -> list[str]:
    """Fork for each client; returns, in a fork, the arguments of the process it is to be."""
    import gc
    import importlib
    import selectors

    for name in LIBRARIES:
        importlib.import_module(name)
    first_uses()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    print("ready", flush=True)
    selector, lines = selectors.DefaultSelector(), {}
    for source in (listener, woken):
        selector.register(source, selectors.EVENT_READ)
    session = Path(address).parent.parent
    while True:
        events = selector.select(SECONDS_BETWEEN_LOOKS)
        if not events and not wanted(session):
            for pid in lines:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        for key, _ in events:
            if key.fileobj is listener:
                line, _ = listener.accept()
                if words := fork(line, lines, (listener, woken, wake)):
                    return words
                selector.register(line, selectors.EVENT_READ)
            elif key.fileobj is woken:
                woken.recv(4096)
                bury(lines, selector)
            else:  # a client has gone before its process
                selector.unregister(key.fileobj)
                for pid in [pid for pid, line in lines.items() if line is key.fileobj]:
                    os.kill(pid, signal.SIGKILL)


def first_uses() -> None:
    """What the libraries set up at their first use, and every run would wait for."""
    import io

    import matplotlib.pyplot as plt
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
    figure, axes = plt.subplots()
    axes.set_yscale("log")
    axes.plot([1, 2], [1, 10], label="loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(io.BytesIO())
    plt.close(figure)


def fork(line: socket.socket, lines: dict, own: tuple) -> list[str] | None:
    """In the new process its arguments, in the server None."""
    size, streams, *_ = socket.recv_fds(line, 4, 3)
    what = b""
    while len(what) < int.from_bytes(size, "big"):
        part = line.recv(1 << 20)
        if not part:  # the client was killed: nobody waits for this process
            size = b""
        what += part
    pid = os.fork() if size else None
    if pid != 0:
        for stream in streams:
            os.close(stream)
    if pid is None:
        return None
    if pid:
        lines[pid] = line
        with contextlib.suppress(OSError):  # killed meanwhile: the end of its line is seen later
            line.sendall(pid.to_bytes(4, "big"))
        return None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for other in (*own, *lines.values(), line):
        other.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    words, env, folder = json.loads(what)
    os.environ.clear()
    os.environ.update(env)
    os.environ.pop("DANPU_LAUNCHER", None)  # the launcher is not this process's parent
    os.chdir(folder)
    obey()
    return words


def obey() -> None:
    """Variables about how much is said, which the libraries read when they were imported."""
    import warnings

    import datasets
    import huggingface_hub
    import transformers

    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    if "PYTHONUNBUFFERED" in os.environ:
        unbuffered()
    for library in (datasets, transformers):
        said = os.environ.get(f"{library.__name__.upper()}_VERBOSITY", "warning")
        level = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}[said]
        library.utils.logging.set_verbosity(level)
    if "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        huggingface_hub.utils.disable_progress_bars()


def unbuffered() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)


def bury(lines: dict, selector) -> None:
    """Tell the clients how their processes ended."""
    while lines:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        line = lines.pop(pid)
        try:
            selector.unregister(line)
            line.sendall(status.to_bytes(4, "big"))
        except (OSError, KeyError):
            pass
        line.close()


def run(words: list[str]) -> None:
    """Be `python words`, whose own children are forks too."""
    import runpy

    sys.executable = str(Path(sys.argv[1]).parent / "python")

    if words[0] == "-u":
        words = words[1:]
        unbuffered()
    sys.path.pop(0)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        if words[1] == "ipykernel_launcher":
            import pandas

            pandas.set_option("display.max_columns", 20)  # imported outside of a kernel it has 0
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


def end(action) -> None:
    """Call it and leave as Python leaves, but for taking all modules apart, which costs more than
    most of what is started here."""
    import atexit
    import threading

    code = 0
    try:
        action()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # what Python says of a stream that cannot be flushed
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    words = serve(sys.argv[1])
    end(lambda: run(words))
