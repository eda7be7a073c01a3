"""internlm_sft: how large a share of made rows should be, on its built-in base.

    python tests/bench/internlm_mixing.py                   # shares 0, .1, .25, .5 and .99
    python tests/bench/internlm_mixing.py --shares .99 --made identity --near_questions false
    python tests/bench/internlm_mixing.py --medical FOLDER  # identity beside rows of one's own

Each run has the same base, steps and seed. The general rows are the samples' facts in many phrasings, because a tenth of
made rows needs nine times as many general ones. --medical trains the same rows of FOLDER
with and without identity rows, for equally many passes over them, and compares the loss on held-out ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "internlm_sft"
sys.path[:0] = [str(ROOT), str(RECIPE), str(ROOT / "tests/bench")]
from common import cli  # noqa: F401, I001  (before torch: it brings the device)

import identity_phrases as phrases
import make_data
import train
from measured import say

HELD_OUT = 64
SIZES = ("model_max_length", "learning_rate", "adam_beta2", "gradient_accumulation_steps")


def phrased() -> list[dict]:
    """The samples' facts, each asked in all the ways of identity_phrases.FRAMES."""
    rows = []
    for row in make_data.rows():
        place = 0 if row["instruction"][-1] in "？。" else 1
        for frame in phrases.FRAMES.values():
            asked = row["instruction"].rstrip("。？?.")
            rows.append(row | {"instruction": frame[place].format(asked)})
    return rows


def write(rows: list[dict], path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(script: str, flags: dict) -> None:
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run([sys.executable, RECIPE / script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def trained(base: str, data: str, out: Path, args, **more) -> dict:
    """Metrics of a run's end, those of its questions too."""
    flags = {name: train.TINY[name] for name in SIZES}
    flags |= {"model_name_or_path": base, "data_path": data, "output_dir": out, "seed": args.seed}
    flags |= {"per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
    flags |= {"persona": RECIPE / "data/persona.yaml", "eval_ratio": 0.1}
    flags |= {"eval_generate": args.questions, "max_new_tokens": 32, "max_eval_samples": HELD_OUT}
    words = [str(word) for name, value in (flags | more).items() for word in (f"--{name}", value)]
    command = [sys.executable, RECIPE / "train.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((out / "report.json").read_text())["metrics"]["after"]


def shares(args, base: str, work: Path) -> None:
    general = write(phrased(), work / "general.jsonl")
    for share in args.shares:
        data = f"{args.made} {general}" if share else str(general)
        more = {"identity_ratio": share} if share else {}
        more |= {"near_questions": args.near_questions, "max_steps": args.steps}
        say(share=share, **trained(base, data, work / f"share-{share}", args, **more))


def medical(args, base: str, work: Path) -> None:
    found = []
    for made in ("", args.made):
        out = work / (made.replace(" ", "-") or "alone")
        more = {"num_train_epochs": args.epochs, "model_max_length": 512}
        metrics = trained(base, f"{made} {args.medical}".strip(), out, args, **more)
        found.append(metrics["loss"])
        say(made=made, **metrics)
    say(loss_beside_identity=found[1] / found[0] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 0.99])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--near_questions", default="true")
    parser.add_argument("--made", default="identity refusal")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--medical", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    base = train.tiny_model([], taught=True)
    with tempfile.TemporaryDirectory() as work:
        if args.medical:
            medical(args, base, Path(work))
        else:
            shares(args, base, Path(work))


if __name__ == "__main__":
    main()
