"""How loss falls with compute: small depths for a few budgets, a line through the best of them, and
a prediction of the next depth that is then tested.

    python minimind_npu/road/scaling.py --tokenizer output/road/tokenizer
    python minimind_npu/road/scaling.py --data_path texts.jsonl --tokenizer output/tokenizer \\
        --depths 2 3 4 5 --budgets 2e12 4e12 8e12 16e12 --predict 6

Every run is a train.py --depth of its own and stays in --output_dir, so the same command goes on
where it stopped. For each budget (FLOP of forward and backward) every depth is trained on as many
tokens as it pays for; the best of a budget stand for it. The law is L = A * C^-alpha in bits per
byte of held-out text, fitted to them in logarithms: with few and small budgets it is a straight
line and no more. Before --predict is run, scaling.json says what the line expects of it; its budget
is the last one times the step between the last two. Result: scaling.png, scaling.json, scaling.md.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this folder
from common import cli  # noqa: I001  (before torch and transformers)

import argparse
import json
import math
import os
import subprocess
from dataclasses import asdict, dataclass

import numpy as np
import weights
from road import dial
from transformers import AutoTokenizer

from common.convert import models
from common.data.files import atomic_file


@dataclass(frozen=True)
class Trained:
    """A finished run: its budget and what it came to."""

    depth: int
    flops: float
    tokens: int
    parameters: int
    bits_per_byte: float


# ---- runs ----------------------------------------------------------------------------------------


def steps_of(args, depth: int, flops: float, vocab_size: int) -> int:
    """Steps that a budget pays for."""
    sizes = dial.sizes_of(depth)
    config = weights.config_of_sizes(args.arch, vocab_size, sizes, args.window)
    of_token = dial.flops_of_token(config, dial.count(config), args.window)
    return max(1, round(flops / of_token / (args.window * args.windows)))


def train(args, depth: int, flops: float, vocab_size: int) -> Trained:
    """One run of train.py, or what it left when it had ended before."""
    out = Path(args.output_dir, f"d{depth}_{flops:.2g}")
    steps = steps_of(args, depth, flops, vocab_size)
    command = [sys.executable, str(HERE / "train.py"), "--depth", str(depth), "--arch", args.arch]
    command += ["--max_steps", str(steps), "--model_max_length", str(args.window)]
    command += ["--per_device_train_batch_size", str(args.windows), "--eval_generate", "0"]
    command += ["--save_strategy", "no", "--report_to", "none", "--eval_steps", "0"]
    command += ["--tokenizer", args.tokenizer, "--output_dir", str(out)]
    if args.data_path:
        command += ["--data_path", args.data_path]
    if args.muon_lr:
        command += ["--muon_lr", str(args.muon_lr)]
    cli.say(f"== depth {depth}, {flops:.2g} FLOP: {steps:,} steps")
    if not (out / "report.json").is_file():
        done = subprocess.run(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False)
        if done.returncode:
            raise SystemExit(f"depth {depth} ended with {done.returncode}; see above")
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return Trained(
        depth,
        flops,
        facts["tokens"]["total"],
        facts["parameters"]["total"],
        facts["metrics"]["after"]["bits_per_byte"],
    )


# ---- the law -------------------------------------------------------------------------------------


def best_of(runs: list[Trained]) -> list[Trained]:
    """Of each budget the run with the lowest loss, in their order."""
    found: dict[float, Trained] = {}
    for run in sorted(runs, key=lambda one: (one.flops, one.bits_per_byte)):
        found.setdefault(run.flops, run)
    return list(found.values())


def fit(runs: list[Trained]) -> tuple[float, float]:
    """-> A, alpha of L = A * C^-alpha: least squares in logarithms."""
    compute = np.log([run.flops for run in runs])
    loss = np.log([run.bits_per_byte for run in runs])
    slope, start = np.polyfit(compute, loss, 1)
    return math.exp(start), -slope


def expected(law: tuple[float, float], flops: float) -> float:
    scale, alpha = law
    return scale * flops**-alpha


# ---- what people see -----------------------------------------------------------------------------


def picture(file: Path, runs: list[Trained], law: tuple, tested: Trained | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    for depth in sorted({run.depth for run in runs}):
        own = sorted((run.flops, run.bits_per_byte) for run in runs if run.depth == depth)
        axes.plot(*zip(*own, strict=True), marker="o", linewidth=1, label=f"depth {depth}")
    first = min(run.flops for run in runs)
    last = tested.flops if tested else max(run.flops for run in runs)
    line = np.geomspace(first, last, 50)
    axes.plot(line, [expected(law, c) for c in line], "k--", label=f"{law[0]:.3g} C^-{law[1]:.3f}")
    if tested:
        told = {"marker": "x", "s": 60, "color": "k", "label": f"depth {tested.depth}, predicted"}
        axes.scatter([last], [expected(law, last)], zorder=3, **told)
        found = {"marker": "*", "s": 140, "label": f"depth {tested.depth}, measured"}
        axes.scatter([last], [tested.bits_per_byte], zorder=3, **found)
    axes.set(xscale="log", yscale="log", xlabel="FLOP", ylabel="held-out bits per byte")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    with atomic_file(file) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def table(runs: list[Trained], law: tuple, flops: float, depth: int, tested) -> str:
    lines = ["| FLOP | depth | parameters | tokens | bits per byte |", "|---:|---:|---:|---:|---:|"]
    best = best_of(runs)
    for run in sorted(runs, key=lambda one: (one.flops, one.depth)):
        mark = "**" if run in best else ""
        cells = [f"{run.flops:.2g}", str(run.depth), f"{run.parameters / 1e6:.1f} M"]
        cells += [f"{run.tokens:,}", f"{mark}{run.bits_per_byte:.4f}{mark}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"bits per byte = {law[0]:.4g} * FLOP^-{law[1]:.4f}", ""]
    told = f"depth {depth} at {flops:.2g} FLOP: predicted {expected(law, flops):.4f}"
    if tested:
        told += f", measured {tested.bits_per_byte:.4f}"
    return "\n".join([*lines, told])


def keep(out: Path, facts: dict, text: str) -> None:
    contents = {"scaling.json": json.dumps(facts, indent=1), "scaling.md": text + "\n"}
    for name, content in contents.items():
        with atomic_file(out / name) as part:
            part.write_text(content, encoding="utf-8")


# ---- command line --------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[2, 3, 4], help="that are trained")
    add("--budgets", type=float, nargs="+", default=[1e12, 2e12, 4e12], help="FLOP, rising")
    add("--predict", type=int, default=5, help="depth that is predicted, then trained; 0: none")
    add("--data_path", default="", help="texts; unset: the built-in ones")
    add("--tokenizer", default=str(HERE / "tokenizer"), help="folder")
    add("--arch", choices=weights.ARCHITECTURES, default="minimind")
    add("--window", type=int, default=256, help="tokens of a row")
    add("--windows", type=int, default=8, help="of a step")
    add("--muon_lr", type=float, help="the one rate; unset: as --depth has it")
    add("--output_dir", default=str(HERE.parent / "output" / "scaling"))
    args = parser.parse_args()
    if min(args.depths) < 1 or args.predict < 0:
        raise cli.usage_error("--depths and --predict: 1 or more")
    if len(args.budgets) < 2 or args.budgets != sorted(set(args.budgets)) or args.budgets[0] <= 0:
        raise cli.usage_error("--budgets: two or more, rising, above 0")
    if args.window < 16 or args.windows < 1:
        raise cli.usage_error("--window: 16 or more; --windows: 1 or more")
    return args


def main() -> None:
    args = parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    vocab_size = len(models.load(AutoTokenizer, args.tokenizer, "--tokenizer"))
    runs = []
    for flops in args.budgets:
        for depth in args.depths:
            runs.append(train(args, depth, flops, vocab_size))
    law = fit(best_of(runs))
    next_flops = args.budgets[-1] ** 2 / args.budgets[-2]
    told = expected(law, next_flops)
    facts = {"runs": [asdict(run) for run in runs], "law": law}
    facts |= {"predicted": {"depth": args.predict, "flops": next_flops, "bits_per_byte": told}}
    keep(out, facts, table(runs, law, next_flops, args.predict, None))
    tested = None
    if args.predict:
        cli.say(f"predicted for depth {args.predict} at {next_flops:.2g} FLOP: {told:.4f}")
        tested = train(args, args.predict, next_flops, vocab_size)
        facts["measured"] = asdict(tested)
    text = table(runs, law, next_flops, args.predict, tested)
    keep(out, facts, text)
    picture(out / "scaling.png", runs, law, tested)
    print(f"\n{text}\n\n{out / 'scaling.png'}")


if __name__ == "__main__":
    cli.run(main)
