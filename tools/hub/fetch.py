"""One file of a repository onto the disk: continued after a cut, and checked before it gets its
name.

A file without its last byte, or with a wrong one, never stands under its name: bytes are gathered
in `NAME.<start of the hash>.part` and renamed only after size, hash and (safetensors) header and
offsets were found right.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import requests

from tools.hub import aria2, weights
from tools.hub.link import Fatal, Link, Retry, Stopped, blocks, get, host, patiently

WRONG_TRIES = 3  # a file that arrives whole and wrong this often is wrong at its source
ARIA2_TRIES = 3  # then we do it ourselves
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Entry:
    """One file of a repository: path, address, bytes, hashes; None where the source does not
    tell."""

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git: str | None = None  # sha1 of the git blob, which hubs give for small files

    @property
    def hashed(self) -> bool:
        return bool(self.sha256 or self.git)


def size_text(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:,.0f} B" if units[0] == "B" else f"{count:,.1f} {units[0]}"


# ---- names --------------------------------------------------------------------------------------------------


def safe_target(folder: Path, path: str) -> Path:
    """folder/path; Fatal when a name that the server gave leads out of the folder or is one of
    ours."""
    parts = path.split("/")
    odd = any(unicodedata.category(c) in ("Cc", "Cs") or c == "\\" for c in path) or re.match(
        r"[A-Za-z]:", path
    )
    ours = parts[0].startswith(".danpu.") or path.endswith((".part", ".part.aria2"))
    if odd or ours or any(part in ("", ".", "..") for part in parts):
        raise Fatal(f"the source names a file {path!r}, which is no path inside {folder}")
    target = folder.joinpath(*parts)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise Fatal(f"{target}: a link leads out of {folder}")
    return target


def part_of(target: Path, entry: Entry) -> Path:
    """Where the bytes gather. The name holds the hash, so that no part is ever continued with
    another version."""
    return target.with_name(
        f"{target.name}.{(entry.sha256 or entry.git or 'without-hash')[:12]}.part"
    )


def gathered(part: Path) -> int:
    """Bytes of a part that need not be fetched again."""
    try:
        stat = part.stat()
    except FileNotFoundError:
        return 0
    return (
        min(stat.st_blocks * 512, stat.st_size) if aria2.control_of(part).exists() else stat.st_size
    )


def discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    aria2.control_of(part).unlink(missing_ok=True)


# ---- is it right? -------------------------------------------------------------------------------------------


def _digest(path: Path, entry: Entry, stop: threading.Event) -> tuple[str, str | None]:
    """A file's sha256, and its git blob's sha1 if the entry has one."""
    sha = hashlib.sha256()
    git = (
        hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        if entry.git
        else None
    )
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if stop.is_set():
                raise Stopped
            sha.update(block)
            if git:
                git.update(block)
    return sha.hexdigest(), git.hexdigest() if git else None


def examine(path: Path, entry: Entry, stop: threading.Event) -> tuple[str, str | None]:
    """(sha256, what is wrong) of a file that should be `entry`; None when it is right.

    safetensors must be sound in any case; where the source has no hash a JSON file must parse.
    """
    sha, git = _digest(path, entry, stop)
    size = path.stat().st_size
    if entry.size not in (None, size):
        return sha, f"{size:,} bytes, expected {entry.size:,}"
    if entry.sha256 and sha != entry.sha256:
        return sha, f"sha256 is {sha}, expected {entry.sha256}"
    if entry.git and git != entry.git:
        return sha, f"git's sha1 is {git}, expected {entry.git}"
    wrong = (
        weights.problem(path, entry.path)
        if not entry.hashed or entry.path.endswith(".safetensors")
        else None
    )
    return sha, f"{wrong}, as it is in the repository itself" if wrong and entry.hashed else wrong


# ---- fetch --------------------------------------------------------------------------------------------------


def fetch(entry: Entry, folder: Path, link: Link, show: Callable[[str, int], None]) -> str:
    """Get one file, whole, under its name; returns its sha256.

    show(path, bytes): is told how much stands on the disk. Raises Fatal (with the reason), Stopped,
    OSError (full disk, no rights); the part stays for the next call.
    """
    target = safe_target(folder, entry.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part, memory = part_of(target, entry), {"wrong": 0, "etag": None, "aria2": 0}
    if not entry.hashed:  # nothing would show that the rest belongs to another version
        discard(part)

    def attempt() -> str:
        try:
            size = _gather(entry, part, link, show, memory)
        except Retry as error:
            if error.restart:
                discard(part)
            raise
        sha, wrong = examine(part, replace(entry, size=size), link.stop)
        if wrong:
            discard(part)
            memory["wrong"] += 1
            if memory["wrong"] == WRONG_TRIES or "repository itself" in wrong:
                raise Fatal(
                    f"{wrong}; deleted" + (f" {WRONG_TRIES} times" if memory["wrong"] > 1 else "")
                )
            raise Retry(f"{wrong}; deleted")
        return sha

    sha = patiently(attempt, link, entry.path, lambda: gathered(part))
    settle(part, target)
    return sha


def settle(part: Path, target: Path) -> None:
    """Give a checked file its name, so that not even a power cut leaves less under it."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    inside = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(inside)
    finally:
        os.close(inside)


def _gather(entry: Entry, part: Path, link: Link, show: Callable, memory: dict) -> int:
    """Append to the part what it lacks; returns the file's size.

    With a hash the part is simply continued: if it belongs to something else, the hash tells.
    Without one it is continued only where the server confirms its ETag (If-Range).
    """
    have, whole = gathered(part), not aria2.control_of(part).exists()
    if whole and have and have == entry.size:
        return have
    if (
        link.aria2
        and entry.hashed
        and (entry.size or 0) >= link.aria2_from
        and memory["aria2"] < ARIA2_TRIES
    ):
        memory["aria2"] += 1
        if aria2.append(
            part, entry.url, entry.size, link, lambda: show(entry.path, gathered(part))
        ):
            return entry.size
        have, whole = gathered(part), not aria2.control_of(part).exists()
    if not whole or (have and not entry.hashed and not memory["etag"]):
        discard(part)
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and not entry.hashed:
        headers["If-Range"] = memory["etag"]
    with get(link, entry.url, headers) as answer:
        start, size = _place(answer, entry, have)
        etag = answer.headers.get("ETag", "")
        memory["etag"] = (
            etag if etag.startswith('"') else None
        )  # a weak one promises nothing about bytes
        _append(answer, part, start, size, link, lambda count: show(entry.path, count))
    return size


def _place(answer: requests.Response, entry: Entry, have: int) -> tuple[int, int]:
    """(where in the file this answer begins: `have` or 0, size of the file); Retry when it is
    another thing."""
    encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
    start = 0
    if answer.status_code == 206:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        total = place and (None if place[2] == "*" else int(place[2]))
        if (
            encoded
            or not place
            or int(place[1]) != have
            or (total and entry.size and total != entry.size)
        ):
            raise Retry(f"{host(answer.url)} continues at another place than asked", restart=True)
        start = have
    length = "" if encoded else answer.headers.get("Content-Length", "")
    announced = start + int(length) if length.isdigit() else None
    size = announced if entry.size is None else entry.size
    if size is None:
        raise Fatal(
            f"{host(answer.url)} tells neither size nor hash: nothing would show whether the file is whole"
        )
    page = "text/html" in answer.headers.get("Content-Type", "") and not entry.path.endswith(
        (".html", ".htm")
    )
    if announced not in (None, size) or (page and not entry.hashed):
        what = "a web page" if page else f"{announced:,} bytes"
        raise Retry(
            f"{host(answer.url)} sends {what} instead of the file of {size:,} bytes",
            restart=bool(start),
        )
    return start, size


def _append(
    answer, part: Path, have: int, size: int, link: Link, show: Callable[[int], None]
) -> None:
    """Write the body at byte `have` of the part; Retry when it ends too early or too late."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(part, flags, 0o666), "r+b") as file:
        file.truncate(have)
        file.seek(have)
        show(have)
        for block in blocks(answer, link):
            if link.stop.is_set():
                raise Stopped
            have += len(block)
            if have > size:
                raise Retry(f"more bytes than the file's {size:,} came", restart=True)
            file.write(block)
            show(have)
    if have < size:
        raise Retry(f"cut after {size_text(have)} of {size_text(size)}")
