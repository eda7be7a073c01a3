"""minimind_npu's server beside upstream's way (a thread a request, batch 1), and under many clients: JSON lines.

    OMP_NUM_THREADS=1 python tests/bench/serving.py                   # 26M, 16 clients, both ways
    python tests/bench/serving.py --clients 100 --seconds 300 --only ours      # five minutes of a hundred clients

Both servers are processes of their own with the same random weights without an end token; each client asks again as
soon as it has its answer of 64 tokens. `tokens_per_cpu_s` counts generated tokens of a second of the server's own CPU
time, so others on the machine matter little; `first_token_s` is the 95th percentile, `times_one_client` its ratio to a
single client's; `lost` are answers that did not come whole; `memory_growth` is RSS after / before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import openai
import psutil
from measured import say

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "minimind_npu"
NEW_TOKENS = 64

UPSTREAM = """
import sys, threading, json, time, uuid
sys.path[:0] = [{root!r}, {recipe!r}]
import torch, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from queue import Queue
from transformers import AutoTokenizer, AutoModelForCausalLM
import model as _
from transformers import TextStreamer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}).eval()
app = FastAPI()

class Streamer(TextStreamer):
    def __init__(self, queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue = queue
    def on_finalized_text(self, text, stream_end=False):
        self.queue.put(text)
        if stream_end:
            self.queue.put(None)

@app.get("/health")
def health():
    return {{"status": "ok"}}

@app.post("/v1/chat/completions")
def answer(body: dict):
    ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    queue = Queue()
    def work():
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"],
                           min_new_tokens=body["max_tokens"], do_sample=False, streamer=Streamer(queue))
    threading.Thread(target=work, daemon=True).start()
    def events():
        while (text := queue.get()) is not None:
            chunk = {{"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m",
                      "choices": [{{"index": 0, "delta": {{"content": text}}, "finish_reason": None}}]}}
            yield "data: " + json.dumps(chunk) + "\\n\\n"
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")

uvicorn.run(app, host="127.0.0.1", port={port}, log_level="warning")
"""


def random_model(folder: Path, size: str) -> None:
    """A folder of random weights that never ends an answer."""
    sys.path[:0] = [str(ROOT), str(RECIPE)]
    import model as models
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(0)
    built = models.build(size, 6400)
    built.generation_config.eos_token_id = None
    built.generation_config.do_sample = False
    tokenizer.eos_token = "<|endoftext|>"
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(side: str, folder: Path, slots: int) -> tuple[subprocess.Popen, int]:
    port = free_port()
    if side == "ours":
        command = [sys.executable, RECIPE / "serve_openai_api.py", "--model", folder, "--name", "m"]
        command += ["--port", port, "--slots", slots, "--max_length", 512]
    else:
        code = UPSTREAM.format(root=str(ROOT), recipe=str(RECIPE), folder=str(folder), port=port)
        command = [sys.executable, "-c", code]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x").get(
                f"http://127.0.0.1:{port}/health", cast_to=object
            )
            return process, port
        except openai.APIConnectionError:
            time.sleep(0.2)
    raise SystemExit(f"{side} does not start")


class Client(threading.Thread):
    """Asks until the time is over; keeps what it saw."""

    def __init__(self, number: int, port: int, until: float):
        super().__init__()
        self.number = number
        self.until = until
        url = f"http://127.0.0.1:{port}/v1"
        self.api = openai.OpenAI(base_url=url, api_key="x", max_retries=20, timeout=600)
        self.first: list[float] = []
        self.whole = 0
        self.lost = 0

    def run(self) -> None:
        turn = 0
        while time.monotonic() < self.until:
            turn += 1
            question = f"第{self.number}个人的第{turn}个问题：今天吃什么好？"
            began = time.monotonic()
            try:
                stream = self.api.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": question}],
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                    stream=True,
                )
                for i, _chunk in enumerate(stream):
                    if i == 1:  # the first has the role
                        self.first.append(time.monotonic() - began)
                self.whole += 1
            except openai.OpenAIError as error:
                print(f"lost: {error}", file=sys.stderr)
                self.lost += 1


def measure(side: str, folder: Path, clients: int, seconds: float, slots: int) -> dict:
    process, port = start(side, folder, slots)
    try:
        server = psutil.Process(process.pid)
        run_clients(port, 1, 3)  # kernels are chosen
        rss = server.memory_info().rss
        used = sum(server.cpu_times()[:2])
        began = time.monotonic()
        asked = run_clients(port, clients, seconds)
        spent = sum(server.cpu_times()[:2]) - used
        whole = sum(client.whole for client in asked)
        first = sorted(second for client in asked for second in client.first)
        return {
            "side": side,
            "clients": clients,
            "answers": whole,
            "lost": sum(client.lost for client in asked),
            "tokens_per_cpu_s": whole * NEW_TOKENS / spent,
            "tokens_per_s": whole * NEW_TOKENS / (time.monotonic() - began),
            "first_token_s": first[int(0.95 * (len(first) - 1))],
            "memory_growth": server.memory_info().rss / rss,
        }
    finally:
        process.kill()
        process.wait()


def run_clients(port: int, count: int, seconds: float) -> list[Client]:
    until = time.monotonic() + seconds
    clients = [Client(number, port, until) for number in range(count)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="26m")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=["ours", "upstream"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), args.size)
        found = {}
        for side in args.only:
            one = measure(side, Path(folder), 1, min(10, args.seconds), args.slots)
            many = measure(side, Path(folder), args.clients, args.seconds, args.slots)
            many["times_one_client"] = many["first_token_s"] / one["first_token_s"]
            found[side] = many
            say(**one)
            say(**many)
        if len(found) == 2:
            ratio = found["ours"]["tokens_per_cpu_s"] / found["upstream"]["tokens_per_cpu_s"]
            say(bench="serving", times_upstream=ratio)


if __name__ == "__main__":
    main()
