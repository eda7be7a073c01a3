"""llama.cpp for tests: its converter, from the source distribution of llama-cpp-python (nothing is compiled), and its
server, from xllamacpp's wheel (a development requirement).

    python tests/support/llama_cpp.py            # fetch the converter now: 77 MB

LLAMA_CPP_CACHE names the folder that keeps it, else ~/.cache/danpu/llama_cpp.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import httpx
from filelock import FileLock

VERSION = "0.3.36"
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")


def converter() -> Path:
    """The folder of convert_hf_to_gguf.py; made on first use, safe with several processes at once.

    Errors: RuntimeError with pip's last words where it cannot be fetched.
    """
    cache = Path(os.environ.get("LLAMA_CPP_CACHE") or "~/.cache/danpu/llama_cpp").expanduser()
    folder = cache / f"converter-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.is_dir():
            made = Path(tempfile.mkdtemp(prefix="part-", dir=cache))
            try:
                unpack(made)
                (made / "converter").rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return folder


def unpack(folder: Path) -> None:
    """Fetch the source and leave the converter of it in folder/converter."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise RuntimeError(f"llama.cpp: pip download failed: {said}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    (unpacked,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    (folder / "converter").mkdir()
    for name in CONVERTER:
        shutil.move(unpacked / name, folder / "converter" / name)


class Model:
    """A GGUF file, answered by llama.cpp's own server in this process, all of it in float32."""

    def __init__(self, file: Path, window: int = 256):
        """Errors: RuntimeError where llama.cpp does not load the file."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = window
        params.verbosity = -1
        params.warmup = False
        params.cpuparams.n_threads = 1
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # its fused attention computes in half precision
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off
        self.server = xllamacpp.Server(params)
        self.client = httpx.Client(base_url=self.server.listening_address, trust_env=False)

    def ask(self, path: str, **body) -> dict:
        return self.client.post(path, json=body).raise_for_status().json()

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=add_special, parse_special=True)[
            "tokens"
        ]

    def next_token(self, ids: list[int], vocabulary: int) -> dict[int, float]:
        """The log-probability of every token behind `ids`, before anything is sampled."""
        (written,) = self.tokenize("a", add_special=False)
        found = self.ask(
            "/completion",
            prompt=ids,
            n_predict=1,
            n_probs=vocabulary,
            # the server keeps the figures of a token that ends amid a character to itself
            logit_bias=[[written, 1000.0]],
        )
        (step,) = found["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in step["top_logprobs"]}


if __name__ == "__main__":
    print(converter())
