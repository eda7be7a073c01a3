"""What the stages of run_all.sh came to: one table of times and scores, printed and written to
summary.md.

python minimind_npu/summary.py output/minimind_npu
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this one
from settings import STAGES

from common import cli

SCORES = (
    "bits_per_byte",
    "exact_match",
    "accuracy",
    "in_form",
    "loss",
)  # the telling ones, best first


def lines(root: Path) -> list[str]:
    """A Markdown table of the stages whose report is there."""
    table = [
        "| stage | seconds | tokens/s | held out | before | after |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for stage in STAGES:
        file = root / stage / "report.json"
        if not file.is_file():
            continue
        facts = json.loads(file.read_text(encoding="utf-8"))
        before, after = facts["metrics"]["before"], facts["metrics"]["after"]
        for i, name in enumerate([name for name in SCORES if name in after]):
            old = f"{before[name]:.4f}" if name in before else "-"
            head = (
                (stage, f"{facts['seconds']:.0f}", f"{facts['tokens_per_second']:,.0f}")
                if not i
                else ("", "", "")
            )
            table.append(
                f"| {' | '.join(head)} | {name.replace('_', ' ')} | {old} | {after[name]:.4f} |"
            )
    return table


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise cli.usage_error(f"python {sys.argv[0]} FOLDER, the output folder of run_all.sh")
    root = Path(sys.argv[1])
    table = lines(root)
    if len(table) == 2:
        raise SystemExit(f"{root}: no stage has finished there")
    seen = root / "eval" / "eval.md"
    text = "\n".join([*table, *(["", seen.read_text(encoding="utf-8")] if seen.is_file() else [])])
    (root / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nsummary {root / 'summary.md'}")


if __name__ == "__main__":
    cli.run(main)
