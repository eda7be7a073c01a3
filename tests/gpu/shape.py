"""A model of random weights in Qwen3-0.6B's shape, and rows to measure it on.

python tests/gpu/shape.py FOLDER [--dry-run]     # FOLDER/model and FOLDER/rows.jsonl
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import device  # before torch and transformers

# isort: split
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from common import tiny

REAL = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROWS = {"real": 4000, "small": 60}


def sentences() -> list[str]:
    """Answers of train_qwen's samples."""
    found = []
    for file in sorted((ROOT / "train_qwen/data").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found += [row["output"] for row in rows if isinstance(row.get("output"), str)]
    return found


def write_rows(file: Path, count: int, longest: int) -> None:
    """Rows with a long tail, up to `longest` sentences."""
    known = sentences()
    rng = random.Random(0)
    with open(file, "w", encoding="utf-8") as out:
        for number in range(count):
            size = max(1, round(longest ** rng.random()))
            row = {"instruction": f"{number}", "output": " ".join(rng.choices(known, k=size))}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_model(folder: Path, shape: dict) -> None:
    tokenizer = tiny.make_tokenizer(
        sentences(),
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(ROOT / "train_qwen/chat_template.jinja").read_text(encoding="utf-8"),
    )
    config = Qwen3Config(
        **shape, max_position_embeddings=4096, tie_word_embeddings=True, dtype="bfloat16"
    )
    set_seed(0)
    with device.device(0):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    size = "small" if args.dry_run else "real"
    write_rows(args.folder / "rows.jsonl", ROWS[size], longest=4 if args.dry_run else 120)
    write_model(args.folder / "model", SMALL if args.dry_run else REAL)


if __name__ == "__main__":
    main()
