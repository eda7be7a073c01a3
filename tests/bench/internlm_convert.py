"""Conversion of a published InternLM2 checkpoint of 1 GB, with a tokenizer of 92,544 pieces: seconds and memory.

    python tests/bench/internlm_convert.py [WORK_FOLDER]

Bounds: at most 10 s and 1.5 GB. The checkpoint has the width, the heads and the vocabulary of InternLM2-1.8B
and two of its layers, in one file; the command runs in a process of its own, whose time includes its imports. `cpu` is
user and system time: on a machine with other work only that says what the conversion takes. The memory counts pages of
the mapped source as well, which the system takes back when it needs them; `anonymous` is without them.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "internlm_sft"), str(ROOT / "tests/bench")]
import fast_tokenizer
import torch
from measured import say
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from common import cli  # noqa: F401  (before torch: it brings the device)

VOCABULARY = 92_544
CONFIG = {
    "model_type": "internlm2",
    "hidden_size": 2048,
    "intermediate_size": 7808,  # of 8192: the files have 1.00 GB
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "bias": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "vocab_size": VOCABULARY,
    "pad_token_id": 2,
}
CHARACTERS = 6000


def tokenizer_file() -> bytes:
    """A sentencepiece BPE of the layout and size of InternLM2's, of characters and random joins."""
    source = random.Random(0)
    proto = model_pb2.ModelProto()
    kinds = model_pb2.ModelProto.SentencePiece
    for name in fast_tokenizer.FIRST:
        kind = kinds.UNKNOWN if name == "<unk>" else kinds.CONTROL
        proto.pieces.add(piece=name, score=0.0, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kinds.BYTE)
    last = [name for name in fast_tokenizer.STANDARD if name.startswith("[")]
    pieces = [chr(code) for code in range(0x4E00, 0x4E00 + CHARACTERS)] + list("▁abcdefgh")
    known = set(pieces)
    while len(pieces) + len(proto.pieces) + len(last) < VOCABULARY:
        joined = source.choice(pieces) + source.choice(pieces)
        if len(joined) <= 8 and joined not in known:
            pieces.append(joined)
            known.add(joined)
    joins = pieces[CHARACTERS + 9 :]
    for i, piece in enumerate(joins + pieces[: CHARACTERS + 9]):
        proto.pieces.add(piece=piece, score=float(-i), type=kinds.NORMAL)
    for name in last:
        proto.pieces.add(piece=name, score=0.0, type=kinds.USER_DEFINED)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def checkpoint(folder: Path) -> int:
    """Write it -> bytes of its weights."""
    width, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    rows = (CONFIG["num_attention_heads"] + 2 * CONFIG["num_key_value_heads"]) * 128
    shapes = {"model.tok_embeddings.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        own = {
            "attention.wqkv": (rows, width),
            "attention.wo": (width, width),
            "feed_forward.w1": (ffn, width),
            "feed_forward.w3": (ffn, width),
            "feed_forward.w2": (width, ffn),
            "attention_norm": (width,),
            "ffn_norm": (width,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    shapes["output.weight"] = (VOCABULARY, width)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for tensor in tensors.values():
        tensor.view(-1)[:1000] = torch.randn(1000)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.model").write_bytes(tokenizer_file())
    return sum(tensor.numel() * 2 for tensor in tensors.values())


def watched(command: list) -> dict:
    """Run it -> seconds, CPU seconds, and the highest of its memory in GB, of it what is no file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        anonymous = max(anonymous, int(fields.get("RssAnon", "0 kB").split()[0]))
        time.sleep(0.02)
    assert process.wait() == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": time.time() - began,
        "cpu": cpu,
        "memory_gb": after.ru_maxrss * 1024 / 1e9,
        "anonymous_gb": anonymous * 1024 / 1e9,
    }


def main() -> None:
    place = sys.argv[1] if len(sys.argv) > 1 else None
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=place) as work:
        source = Path(work, "published")
        source.mkdir()
        size = checkpoint(source)
        convert = [sys.executable, ROOT / "internlm_sft/convert.py", "--model", source]
        for pickled in (False, True):
            if pickled:
                from safetensors.torch import load_file

                file = source / "model.safetensors"
                torch.save(load_file(file), source / "pytorch_model.bin")
                file.unlink()
            out = Path(work, "native")
            found = watched([*convert, "--output_dir", out])
            say(checkpoint_gb=size / 1e9, file=".bin" if pickled else ".safetensors", **found)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
