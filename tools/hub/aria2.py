"""Large files through aria2c (several connections at once) where it is installed."""

from __future__ import annotations

import errno
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tools.hub.link import CONNECT, Link, Retry, Stopped, get, host

MEANING = {
    1: "unknown error",
    2: "time out",
    3: "not found",
    6: "network problem",
    19: "host name not found",
}
DISK_FULL = 9


def control_of(part: Path) -> Path:
    """aria2c's note of which pieces of a part are there; while it stands, the part has holes."""
    return part.with_name(part.name + ".aria2")


def append(part: Path, url: str, size: int, link: Link, tick: Callable[[], None]) -> bool:
    """Complete a part; False when aria2c cannot do it (no ranges). tick() is called now and then.

    We follow the redirects ourselves, since aria2c would hand the token on to any host, and give it
    the last address on stdin, where no list of processes shows it.
    """
    with get(link, url, {"Range": "bytes=0-0"}) as answer:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        keep = {
            k: v
            for k, v in answer.request.headers.items()
            if k in ("Authorization", "Cookie", "User-Agent")
        }
        last = answer.url
    if answer.status_code != 206:
        return False
    if total != str(size):
        raise Retry(f"{host(last)} has {total or 'no'} bytes, the file {size:,}", restart=True)
    lines = [last, f" dir={part.parent.resolve()}", f" out={part.name}"]
    lines += [f" header={name}: {value}" for name, value in keep.items()]
    if any(ord(c) < 32 for line in lines for c in line):  # would be read as another option
        return False
    code = _run(link, "\n".join(lines) + "\n", tick)
    if code == DISK_FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
    if code or control_of(part).exists():
        raise Retry(f"aria2c ended with code {code} ({MEANING.get(code, 'see its manual')})")
    return True


def _run(link: Link, job: str, tick: Callable[[], None]) -> int:
    """aria2c's exit code. It ends with us, even when we are killed."""
    words = [
        link.aria2,
        "--no-conf=true",
        "--input-file=-",
        "--continue=true",
        "--split=4",
        "--max-connection-per-server=4",
        "--min-split-size=1M",
        "--file-allocation=none",
        "--auto-file-renaming=false",
        "--follow-torrent=false",
        "--follow-metalink=false",
        "--max-tries=1",
        f"--timeout={max(1, round(link.stall))}",
        "--quiet=true",
        f"--connect-timeout={CONNECT}",
        f"--stop-with-process={os.getpid()}",
        "--auto-save-interval=1",
    ]
    bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    words += [f"--ca-certificate={bundle}"] if bundle else []
    proxies = {
        f"{scheme}_proxy": address for scheme, address in urllib.request.getproxies().items()
    }  # small letters
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | proxies,
    )
    try:
        process.stdin.write(job)
        process.stdin.close()
        while process.poll() is None:
            if link.stop.wait(0.2):
                raise Stopped
            tick()
    except BrokenPipeError:
        pass
    finally:
        if process.poll() is None:
            process.terminate()  # it notes what it has
    return process.wait()
