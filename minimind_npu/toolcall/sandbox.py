"""Run Python that a model wrote, in a process of its own with limits; for rewards and tools.

    result = run("print(6 * 7)", seconds=5)
    result.outcome, result.stdout            # "done", "42\\n"

In force everywhere (Linux):
- its own process group, ended with all of it after `seconds`, or when it prints too much
- limits on processor time, memory of a process, size of a file, open files, core dumps
- an empty environment, an empty temporary folder as working folder, standard library only
- as root: it runs as the user nobody

In force where the kernel lets a user make namespaces; `missing` of the result names what was not:
- "network": no interface at all, not even 127.0.0.1
- "processes": it sees and signals its own processes only, at most so many, and none outlives it
- "files": everything is read-only but its folder, which lies in memory and has a size; the home
  folder, those for temporary files and /run are empty

NOT covered, by nothing here: faults of the kernel (no system call is filtered); what it reads that
this user, or nobody, may read outside the home folder, though without network it can only print it;
memory of all its processes together (limit x processes, and files in memory beside it); load on
processors and memory bandwidth within the limits, so times that others measure; a program that
recognises that it is tested. Where "processes" is missing, a process that leaves its group lives on
until its processor time is used up. For code of an enemy take a virtual machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

MIB = 1 << 20
LONGEST = 100_000  # bytes of the code, which is an argument of the process
NOBODY = 65534
PYTHON = os.path.realpath(sys.executable)
PYTHON_HOME = os.path.realpath(sys.base_prefix)
# beside the home folder and that of temporary files: sockets of services among them
PRIVATE_PLACES = ("/run", "/var/tmp", "/dev/shm")
GRACE = 1.0  # seconds after the end of the code in which its pipes have to close
STARTING = 30.0  # seconds that the limits may take to be there, on a busy machine

# of linux/sched.h, sys/mount.h, sys/prctl.h
NEW_USER = 0x10000000
NEW_NET = 0x40000000
NEW_PID = 0x20000000
NEW_MOUNT = 0x00020000
NEW_IPC = 0x08000000
PRIVATE = 0x40000 | 0x4000  # with all below
BIND = 0x1000 | 0x4000
PLAIN = 2 | 4 | 8  # nosuid, nodev, noexec
MOUNT_SETATTR = 442  # the same number on every architecture
BELOW = 0x8000
READ_ONLY = 1
DIE_WITH_PARENT = 1
DUMPABLE = 4
NO_NEW_PRIVILEGES = 38


@dataclass(frozen=True)
class Limits:
    """seconds: by the clock; memory_mb: of each process; processes: threads count too; output:
    bytes of stdout and stderr together; files_mb: of its folder."""

    seconds: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    output: int = 100_000
    files_mb: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Result:
    """outcome: "done" (exit code 0), "failed", "late", "too much output", or "not started", when
    stderr says why; missing: protections that this machine does not give, see the top."""

    outcome: str
    stdout: str
    stderr: str
    code: int | None
    seconds: float
    missing: tuple[str, ...]


def run(code: str, stdin: str = "", **limits) -> Result:
    """Run code and wait; may be called from any thread. limits: fields of Limits. Raises nothing
    for what the code does; ValueError for code that is too long or holds a zero byte."""
    most = Limits(**limits)
    if len(code.encode(errors="replace")) > LONGEST or "\0" in code:
        raise ValueError(f"code has to be below {LONGEST:,} bytes and without zero bytes")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as given:
        os.chmod(folder, 0o777)  # as root it belongs to another user
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        told, tell = os.pipe()
        task = json.dumps([asdict(most), folder, os.path.expanduser("~"), tell])
        command = [PYTHON, "-I", "-S", __file__, task, code.encode(errors="replace")]
        try:
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                start_new_session=True,
                pass_fds=(tell,),
            )
        finally:
            os.close(tell)
        return Watched(process, told, most).result()


# ---- outside -------------------------------------------------------------------------------------


class Watched:
    """A process in its sandbox, seen from outside. told: a pipe on which it says, a line each, what
    is missing before the code starts, and how the code ended."""

    def __init__(self, process: subprocess.Popen, told: int, most: Limits):
        self.process = process
        self.most = most
        self.pipes = {
            process.stdout.fileno(): bytearray(),
            process.stderr.fileno(): bytearray(),
            told: bytearray(),
        }
        self.told = told
        self.began = time.monotonic()
        self.deadline = self.began + STARTING
        self.has_started = False

    def result(self) -> Result:
        try:
            problem = self.read_all()
        finally:
            self.end()
        seconds = time.monotonic() - self.began
        out, err, told = (bytes(read) for read in self.pipes.values())
        lines = [json.loads(line) for line in told.splitlines()]
        if not lines:
            return Result("not started", "", as_text(err)[-500:], None, seconds, ())
        code = lines[1] if len(lines) > 1 else None
        missing = tuple(lines[0])
        outcome = problem or ("done" if code == 0 else "failed")
        return Result(outcome, as_text(out), as_text(err), code, seconds, missing)

    def read_all(self) -> str:
        """Until the pipes close; -> why it was not waited for any longer, or ""."""
        with selectors.DefaultSelector() as selector:
            for pipe in self.pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                left = self.deadline - time.monotonic()
                if left <= 0:
                    return "" if self.has_ended() else "late"
                for key, _ in selector.select(left):
                    self.read(key.fd, selector)
                if self.printed() > self.most.output:
                    return "too much output"
        return ""

    def read(self, pipe: int, selector) -> None:
        piece = os.read(pipe, 65536)
        if not piece:
            selector.unregister(pipe)
        self.pipes[pipe] += piece
        if pipe != self.told:
            return
        if not self.has_started:
            self.has_started = True
            self.began = time.monotonic()
            self.deadline = self.began + self.most.seconds
        if self.has_ended():  # what still holds a pipe is a process that it left behind
            self.deadline = min(self.deadline, time.monotonic() + GRACE)

    def has_ended(self) -> bool:
        return self.pipes[self.told].count(b"\n") == 2

    def printed(self) -> int:
        return sum(len(read) for pipe, read in self.pipes.items() if pipe != self.told)

    def end(self) -> None:
        # it has ended; or what is left of its group is another user's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        os.close(self.told)


def as_text(read: bytes) -> str:
    return read.decode(errors="replace")


@cache
def missing() -> tuple[str, ...]:
    """The protections that this machine does not give."""
    return run("", seconds=STARTING).missing


# ---- inside: before the code starts --------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def call(function: Callable, *arguments) -> None:
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_nobody() -> None:
    """Root is exempt from the limit on processes, and may do anything. OSError where nobody could
    not even start Python."""
    if not all(is_open_to_all(path) for path in (PYTHON, PYTHON_HOME, os.__file__)):
        raise PermissionError("Python lies in a folder that only root may enter")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    call(libc.prctl, DUMPABLE, 1, 0, 0, 0)  # else /proc/self is still root's


def is_open_to_all(path: str) -> bool:
    while path != "/":
        needed = 0o5 if os.path.isdir(path) else 0o4
        if os.stat(path).st_mode & needed != needed:
            return False
        path = os.path.dirname(path)
    return True


def new_user() -> None:
    """A user namespace in which this process may do what follows; the user is none of its root."""
    user = os.getuid()
    group = os.getgid()
    call(libc.unshare, NEW_USER)
    for name, words in (
        ("setgroups", "deny"),
        ("uid_map", f"1000 {user} 1"),
        ("gid_map", f"1000 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
            file.write(words)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = (source.encode(), target.encode(), kind and kind.encode())
    call(libc.mount, *words, ctypes.c_ulong(flags), options.encode() or None)


def only_own_files(folder: str, files_mb: int, home: str) -> None:
    call(libc.unshare, NEW_MOUNT)
    mount("none", "/", None, PRIVATE)
    for place in (home, tempfile.gettempdir(), *PRIVATE_PLACES):
        if os.path.isdir(place) and not os.path.islink(place):
            hide(place, PYTHON_HOME)
    os.makedirs(folder, exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)  # set, clear, propagation, user
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call(libc.syscall, MOUNT_SETATTR, -100, b"/", BELOW, ctypes.byref(attributes), size)
    mount("tmpfs", folder, "tmpfs", PLAIN, f"size={files_mb}m,nr_inodes=2000,mode=0777")
    os.chdir(folder)


def hide(place: str, needed: str) -> None:
    """An empty folder in the place of another, but for what is needed of it."""
    inner = os.open(needed, os.O_PATH)
    mount("tmpfs", place, "tmpfs", PLAIN, "size=64k,mode=0755")
    if is_below(needed, place):
        os.makedirs(needed)
        mount(f"/proc/self/fd/{inner}", needed, None, BIND)
    os.close(inner)


def is_below(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{os.path.realpath(folder).rstrip('/')}/")


def own_network() -> None:
    call(libc.unshare, NEW_NET)


def own_processes() -> None:
    """What is forked from here on is process 1 of a namespace, and its end the end of all."""
    call(libc.unshare, NEW_PID | NEW_IPC)


def own_proc() -> None:
    call(libc.unshare, NEW_MOUNT)
    mount("none", "/", None, PRIVATE)
    try:
        mount("proc", "/proc", "proc", PLAIN)
    except OSError:  # within a container, parts of /proc are hidden from it
        mount("tmpfs", "/proc", "tmpfs", PLAIN | READ_ONLY, "size=4k")


def set_limits(most: Limits, has_namespace: bool) -> None:
    seconds = int(most.seconds) + 2
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: most.memory_mb * MIB,
        resource.RLIMIT_FSIZE: most.files_mb * MIB,
        resource.RLIMIT_NOFILE: most.open_files,
        resource.RLIMIT_CORE: 0,
    }
    if has_namespace:  # two more are ours; elsewhere all processes of the user would be counted
        limits[resource.RLIMIT_NPROC] = most.processes + 2
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def isolate(most: Limits, folder: str, home: str) -> list[str]:
    """All protections that this machine gives; -> the names of those it does not."""
    files = ("files", only_own_files, (folder, most.files_mb, home))
    user = ("user", new_user, ())
    steps = [user, files]
    if os.geteuid() == 0:  # root needs no user namespace for its mounts, and nobody could not
        steps = [files, ("processes", become_nobody, ()), user]
    steps += [("network", own_network, ()), ("processes", own_processes, ())]
    found = []
    for name, step, arguments in steps:
        try:
            step(*arguments)
        except OSError:
            found.append(name)
    return sorted(set(found) - {"user"})


def inside(most: Limits, folder: str, home: str, tell: int, code: str) -> None:
    os.set_inheritable(tell, False)
    call(libc.prctl, DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    call(libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    found = isolate(most, folder, home)
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    call(libc.prctl, DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    has_namespace = "processes" not in found
    if has_namespace and "files" not in found:
        own_proc()
    os.write(tell, json.dumps(found).encode() + b"\n")
    child = os.fork()
    if child == 0:
        set_limits(most, has_namespace)
        os.execve(PYTHON, [PYTHON, "-I", "-S", "-X", "utf8", "-c", code], {})
    _, status = os.waitpid(child, 0)
    os.write(tell, json.dumps(os.waitstatus_to_exitcode(status)).encode() + b"\n")


def main() -> None:
    limits, folder, home, tell = json.loads(sys.argv[1])
    inside(Limits(**limits), folder, home, tell, sys.argv[2])


if __name__ == "__main__":
    main()
