"""The training manager: start, watch, stop and continue trainings of all recipes, in a browser.

    python -m tools.manager                              # http://127.0.0.1:8999
    python tools/manager/serve.py --recipe train_qwen --datasets /data/texts --weights output models
    DANPU_MANAGER_TOKEN=... python -m tools.manager --host 0.0.0.0      # others need the token

Trainings outlive it: started again it finds them, their logs and how they ended. Data and weights
are taken from the recipes, uploads and the named folders only.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT)]  # for common/ and tools/

import socket

import uvicorn

from common.demo import serve
from tools.manager import jobs
from tools.manager.app import Manager, build_app, make_manager
from tools.manager.front import Front
from tools.manager.settings import Settings

LOCAL = ("127.0.0.1", "::1", "localhost")
MOST_MB = 1 << 20


class Parser(argparse.ArgumentParser):
    """Mistakes are one line with exit code 2; an unknown flag is answered with the nearest."""

    def error(self, message: str):
        flag = message.removeprefix("unrecognized arguments: ").split()[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near and "unrecognized" in message else ""
        self.exit(2, f"error: {message}{hint}\n")


def parse_args(argv=None, chosen: str | None = None) -> argparse.Namespace:
    """chosen: the recipe that the page opens first, unless --recipe names another."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask; needs a token")
    add("--port", type=int, default=8999, help="0: any free one")
    add("--recipe", default=chosen, help="the one that the page opens first")
    add("--root", default=str(PROJECT), help="folder of the recipes")
    add("--state", help="folder of jobs, logs, uploads; default: ROOT/output/manager")
    add("--weights", nargs="+", help="folders of models and runs; default: ROOT/output")
    add("--datasets", nargs="+", default=[], help="more folders of data")
    add("--max_upload_mb", type=int, default=200, help="MiB of one uploaded file")
    add("--token", help="default: DANPU_MANAGER_TOKEN, which no list of processes shows")
    args = parser.parse_args(argv)
    args.token = args.token if args.token is not None else os.environ.get("DANPU_MANAGER_TOKEN")
    if args.token is not None and not (args.token.isascii() and args.token.isalnum()):
        parser.error("--token (DANPU_MANAGER_TOKEN) has letters and digits only, at least one")
    if args.host not in LOCAL and args.token is None:
        parser.error(f"--host {args.host}: whoever reaches it could train; set a --token")
    if not 0 <= args.port < 1 << 16:
        parser.error("--port is from 0 to 65535")
    if not 0 < args.max_upload_mb < MOST_MB:
        parser.error("--max_upload_mb is at least 1")
    for name in (args.root, *(args.weights or ()), *args.datasets):
        is_to_come = Path(name).resolve() == Path(args.root).resolve() / "output"
        if not Path(name).is_dir() and not is_to_come:
            parser.error(f"{name}: no such folder")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    root = Path(args.root).resolve()
    state = args.state or root / "output/manager"
    weights = args.weights or [root / "output"]
    return Settings(
        root=root,
        state=Path(state).resolve(),
        weights=tuple(Path(folder).resolve() for folder in weights),
        datasets=tuple(Path(folder).resolve() for folder in args.datasets),
        max_upload=args.max_upload_mb << 20,
        token=args.token,
        chosen=args.recipe,
    )


def bind(host: str, port: int) -> socket.socket:
    """SystemExit with one line when the port is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        told = f"error: cannot serve on {host}:{port}: {error.strerror}"
        raise SystemExit(f"{told}; choose another --port") from None
    return sock


class Server(uvicorn.Server):
    """uvicorn whose signals end the logs that are being read, which would keep it open."""

    def __init__(self, front: Front, manager: Manager):
        super().__init__(serve.config(front, front.limits))
        self.manager = manager

    def handle_exit(self, sig, frame):
        self.manager.streams.over = True
        super().handle_exit(sig, frame)


def main(argv=None, chosen: str | None = None) -> None:
    args = parse_args(argv, chosen)
    settings = settings_of(args)
    known = [file.parent.name for file in settings.root.glob("*/train.py")]
    if args.recipe and args.recipe not in known:
        raise SystemExit(f"error: --recipe {args.recipe}: there are {', '.join(sorted(known))}")
    held = jobs.lock(settings.state)
    sock = bind(args.host, args.port)
    try:
        manager = make_manager(settings)
    except OSError as error:
        raise SystemExit(f"error: --state {settings.state} cannot be used: {error}") from None
    app = build_app(manager)
    front = Front(app, serve.own_names(args.host), settings.token, settings.max_upload)
    manager.start()
    name = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{name}:{sock.getsockname()[1]}/"
    query = f"?token={settings.token}" if settings.token else ""
    print(f"manager of {settings.root}: {address}{query}  (Ctrl-C ends; jobs go on)", flush=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has closed all and raises it again
            Server(front, manager).run(sockets=[sock])
    finally:
        manager.close()
        held.close()


if __name__ == "__main__":
    main()
