"""A training manager in a process of its own, over a folder with a stub recipe that trains nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import serving
from harness import ROOT, environment

from tools.manager.job import is_runner
from tools.manager.processes import kill_below

# speaks like a training, stops like one, and does what its flags say
TRAIN = """
import argparse, os, signal, subprocess, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
add = parser.add_argument
add("--steps", type=int, default=3, help="how many")
add("--pause", type=float, default=0.05)
add("--code", type=int, default=0)
add("--learning_rate", type=float, default=1e-3)
add("--kind", choices=["a", "b"], default="a")
add("--packing", type=lambda text: text == "true", default=True)
add("--names", nargs="+", default=[])
add("--teacher", default="")
add("--report_to", default="")
add("--deaf", type=int, default=0, help="1: SIGTERM does nothing, and a child has a session of its own")
add("--size", "--model_name_or_path", dest="model_name_or_path", default="tiny")
add("--data_path", default="")
add("--output_dir", default="")
args = parser.parse_args()
out = Path(args.output_dir)
out.mkdir(parents=True, exist_ok=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
if args.deaf:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (out / "child").write_text(str(child.pid))
done = out / "done"
first = int(done.read_text()) if done.exists() else 0
print("data:", args.data_path, "names:", args.names, "words:", sys.argv[1:], "DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
for step in range(first + 1, args.steps + 1):
    time.sleep(args.pause)
    share = step / args.steps
    print(f"step {step}/{args.steps} {share:4.0%} | loss {4 / step:.4f} | lr 1.0e-03 | 12,345 tok/s | left 2 min 训练", flush=True)
    done.write_text(str(step))
    if asked and not args.deaf:
        print("interrupted")
        sys.exit(75)
if args.code:
    print("error: --code says so", file=sys.stderr)
(out / "report.md").write_text("# stub")
(out / "report.json").write_text('{"recipe": "stub", "metrics": {"before": {"loss": 2.0}, "after": {"loss": 1.0}}}')
(out / "run.json").write_text('{"step": 1}')
(out / "loss.png").write_bytes(b"\\x89PNG")
sys.exit(args.code)
"""
# counts in a file the answers that were given up; streams until its client goes
SERVER = """
import argparse, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--host", "--port", "--model"):
    parser.add_argument(name, default="")
args = parser.parse_args()
if args.model and not Path(args.model).is_dir():
    sys.exit("error: no such model")

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.whole(b'{"data": [{"id": "stub"}]}')
    def whole(self, body):
        known = self.headers["authorization"] == "Bearer " + os.environ["DANPU_API_KEY"]
        self.send_response(200 if known else 401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if b"stream" not in body:
            return self.whole(body)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"data: x\\n\\n")
                time.sleep(0.02)
        except OSError:
            Path("left").write_text("1")
    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"serving stub on CPU: http://127.0.0.1:{server.server_port}/v1  (Ctrl-C ends)", flush=True)
server.serve_forever()
"""
LAUNCHER = """#!/usr/bin/env bash
# as those that source launch.sh
here=$(cd "$(dirname "$0")" && pwd)
exec python "$here/train.py" --output_dir "$OUTPUT" "$@"
"""
ENDED = ("done", "failed", "stopped")
ROWS = "".join(f'{{"instruction": "第{i}问", "output": "答{i}"}}\n' for i in range(7))


def make_root(folder: Path) -> Path:
    """A project with one recipe, called stub."""
    recipe = folder / "stub"
    (recipe / "data").mkdir(parents=True)
    (recipe / "train.py").write_text(TRAIN)
    (recipe / "train_both.sh").write_text(LAUNCHER)
    (recipe / "serve_openai_api.py").write_text(SERVER)
    (recipe / "data/rows.jsonl").write_text(ROWS)
    (recipe / "README.md").write_text(
        "# stub\n\nEnglish | [中文](README_zh.md)\n\nTrains nothing. At all.\n"
    )
    return folder


def begin(command: list[str], **env: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(**env), **pipes)


class Manager:
    """`python tools/manager/serve.py` over a root; `ask` speaks JSON with it.

    start: of harness, for one whose own processes are forks.
    """

    def __init__(self, root: Path, *flags: str, start=None, **env: str):
        self.root = root
        self.start_process = start or begin
        self.flags = ["--root", root, "--port", "0", *flags]
        self.env = {"DANPU_DEVICE": "cpu"} | env
        self.start()

    def start(self) -> None:
        command = [sys.executable, ROOT / "tools/manager/serve.py", *self.flags]
        self.process = self.start_process([str(word) for word in command], **self.env)
        said = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said + self.process.stdout.read()
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def ask(self, method: str, path: str, code: int = 200, **options) -> dict:
        answer = self.client.request(method, path, **options)
        assert answer.status_code == code, (answer.status_code, answer.text)
        return answer.json()

    def get(self, path: str, code: int = 200, **query) -> dict:
        return self.ask("GET", path, code, params=query)

    def post(self, path: str, code: int = 200, **body) -> dict:
        return self.ask("POST", path, code, json=body)

    def train(self, code: int = 201, **what) -> dict:
        args = what.pop("args", {})
        found = self.post("/api/train/start", code, recipe="stub", args=args, **what)
        return found["job"] if code == 201 else found["error"]

    def job(self, name: str) -> dict:
        return next(job for job in self.get("/api/status")["jobs"] if job["id"] == name)

    def step(self, name: str) -> int:
        return (self.job(name)["progress"] or {}).get("step") or 0

    def until(self, name: str, *states: str) -> dict:
        """The job once it is in one of these states; fails as soon as it has ended in another."""

        def found() -> dict | None:
            job = self.job(name)
            if job["state"] in states:
                return job
            assert job["state"] not in ENDED, f"{name} is {job['state']}, not {states}"
            return None

        return serving.until(found, 60)

    def log(self, name: str, **headers: str) -> list[tuple[str, str, dict]]:
        """(id, event, data) of all that /api/train/logs sends."""
        text = self.client.get("/api/train/logs", params={"job": name}, headers=headers).text
        return events(text)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """The manager, and its jobs, which would go on."""
        self.client.close()
        self.process.terminate()
        self.process.wait(30)
        for file in self.root.glob("output/manager/jobs/*/pid"):
            pid = int(file.read_text())
            if is_runner(pid, file.parent):
                kill_below(pid)


@contextmanager
def managing(folder: Path, *flags: str, **env: str):
    """A manager over a new root in `folder`."""
    started = Manager(make_root(folder), *flags, **env)
    try:
        yield started
    finally:
        started.end()


def events(text: str) -> list[tuple[str, str, dict]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line[:8])
        if "event" in fields:
            found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
    return found


def text_of(found: list[tuple[str, str, dict]]) -> str:
    return "".join(data["text"] for _, event, data in found if event == "log")


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be counted does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
