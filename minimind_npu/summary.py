"""What the stages of run_all.sh came to: one table of times and scores, printed and written to
summary.md.

    python minimind_npu/summary.py output/minimind_npu
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this one
from named import STAGES

from common import cli

# the telling ones, best first
SCORES = ("bits_per_byte", "exact_match", "accuracy", "in_form", "loss")


def table(root: Path) -> list[str]:
    """A Markdown table of the stages whose report is there."""
    lines = [
        "| stage | seconds | tokens/s | held out | before | after |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for stage in STAGES:
        file = root / stage / "report.json"
        if file.is_file():
            lines += rows(stage, json.loads(file.read_text(encoding="utf-8")))
    return lines


def rows(stage: str, facts: dict) -> list[str]:
    """One line a score; stage and speed stand in the first."""
    before = facts["metrics"]["before"]
    after = facts["metrics"]["after"]
    head = [stage, f"{facts['seconds']:.0f}", f"{facts['tokens_per_second']:,.0f}"]
    lines = []
    for name in SCORES:
        if name in after:
            old = f"{before[name]:.4f}" if name in before else "-"
            cells = [*head, name.replace("_", " "), old, f"{after[name]:.4f}"]
            lines.append(f"| {' | '.join(cells)} |")
            head = ["", "", ""]
    return lines


def tools(root: Path) -> list[str]:
    """How the model used tools before it was trained on them, and after."""
    found = []
    for when in ("before", "after"):
        file = root / "eval_toolcall" / when / "eval_toolcall.json"
        if not file.is_file():
            return []
        found.append(json.loads(file.read_text(encoding="utf-8"))["figures"])
    lines = ["", "| tools | before | after | of |", "|---|---:|---:|---:|"]
    for name, after in found[1].items():
        shares = [figures[name]["share"] for figures in found]
        shown = ["-" if share is None else f"{share:.1%}" for share in shares]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(shown)} | {after['of']:,} |")
    return lines


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise cli.usage_error(f"python {sys.argv[0]} FOLDER, the output folder of run_all.sh")
    root = Path(sys.argv[1])
    lines = table(root)
    if len(lines) == 2:
        raise SystemExit(f"{root}: no stage has finished there")
    evaluation = root / "eval" / "eval.md"
    if evaluation.is_file():
        lines += ["", evaluation.read_text(encoding="utf-8")]
    text = "\n".join(lines + tools(root))
    (root / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nsummary {root / 'summary.md'}")


if __name__ == "__main__":
    cli.run(main)
