"""internlm_sft: how large a share of made rows should be, on its built-in base.

    python tests/bench/internlm_mixing.py                   # shares 0, .1, .25, .5, 1; a table
    python tests/bench/internlm_mixing.py --shares .5 --near_questions false
    python tests/bench/internlm_mixing.py --medical FOLDER  # identity beside rows of one's own

Each run has the same base, steps and seed, and is asked by evaluate.py; the general rows are the samples' facts in many
phrasings, because a tenth of made rows needs nine times as many general ones. --medical trains the same rows of FOLDER
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
from common.data.load import load_rows
from common.data.split import split_rows
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


def trained(base: str, data: str, out: Path, **more) -> dict:
    """Metrics of a run's end."""
    flags = {name: train.TINY[name] for name in SIZES}
    flags |= {
        "model_name_or_path": base,
        "data_path": data,
        "output_dir": out,
        "save_strategy": "no",
    }
    flags |= {"per_device_train_batch_size": 4, "report_to": "none", "eval_generate": 0}
    flags |= {"persona": RECIPE / "data/persona.yaml"}
    run("train.py", flags | more)
    return json.loads((out / "report.json").read_text())["metrics"]["after"]


def answered(out: Path, general: Path) -> dict:
    """{"before": metrics, "after": metrics} of a run, by evaluate.py."""
    figures = out / "figures.json"
    run("evaluate.py", {"model": out, "general": general, "output": figures, "max_new_tokens": 48})
    return json.loads(figures.read_text())


def shares(args, base: str, work: Path) -> None:
    rows = phrased()
    step = len(rows) // HELD_OUT
    held_out = write(rows[::step], work / "held_out.jsonl")
    general = write([row for i, row in enumerate(rows) if i % step], work / "general.jsonl")
    before_is_said = False
    for share in args.shares:
        made = "identity refusal" if args.refusal == "true" else "identity"
        data = f"{made} {general}" if share else str(general)
        more = {"max_steps": args.steps, "seed": args.seed, "max_eval_samples": 32}
        more |= {"near_questions": args.near_questions}
        if share < 1:
            more |= {"identity_ratio": share} if share else {}
        else:
            data = made
        out = work / f"share-{share}"
        trained(base, data, out, **more)
        found = answered(out, held_out)
        if not before_is_said:
            say(share="before", **found["before"])
        before_is_said = True
        say(share=share, **found["after"])


def medical(args, base: str, work: Path) -> None:
    rows, _ = load_rows(args.medical, "chat")
    _, apart = split_rows(rows, 0.1, 64, seed=args.seed)
    held_out = [json.loads(row) for row in apart["row"]]
    general = write(held_out, work / "held_out.jsonl")
    losses = []
    for made in ("", "identity refusal"):
        out = work / (made.replace(" ", "-") or "alone")
        more = {"num_train_epochs": args.epochs, "seed": args.seed, "model_max_length": 512}
        data = f"{made} {args.medical}".strip()
        metrics = trained(base, data, out, eval_ratio=0.1, max_eval_samples=64, **more)
        losses.append(metrics["loss"])
        say(made=made, loss=metrics["loss"], **answered(out, general)["after"])
    say(loss_beside_identity=losses[1] / losses[0] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 1])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--near_questions", default="true")
    parser.add_argument("--refusal", default="true")
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
