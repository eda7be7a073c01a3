"""The report card of a road: what it ran on, each stage, all evaluations side by side, curves.

    python minimind_npu/road/report.py reset --output_dir output/road --dollars_per_hour 24
    python minimind_npu/road/report.py generate --output_dir output/road

`reset` notes machine, commit and price and takes away an earlier card, no run; `generate` writes
report.md and its pictures from what the stages and evaluations have left (report.json,
trainer_state.json, eval/STAGE/*.json), and may be called at any time: what is not there yet is
left out.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this folder
from common import cli, device  # noqa: I001  (device before torch and transformers)

import json
import os
import platform
import subprocess
import time

from road import curves

from common.callbacks import clock
from common.data.files import atomic_file
from common.runs import memory, report
from common.runs.memory_plan import gib

STAGES = {"pretrain": "BASE", "mid": "MID", "sft": "SFT", "rl": "RL"}
NOTES = "road.json"
CARD = "report.md"
PICTURES = ("loss.png", "bits_per_byte.png")
SHOWN = 3  # samples of a stage
CELL = 60  # characters of a sample


# ---- reset ---------------------------------------------------------------------------------------


def reset(out: Path, dollars_per_hour: float | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in (CARD, *PICTURES):
        (out / name).unlink(missing_ok=True)
    notes = {
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "devices": devices(),
        "host": f"{os.cpu_count()} CPU cores, {gib(memory.host_bytes())} of memory free",
        "platform": f"Python {platform.python_version()}, {platform.platform()}",
        "versions": report.versions(),
        "dollars_per_hour": dollars_per_hour,
    }
    write(out / NOTES, json.dumps(notes, indent=1))


def devices() -> str:
    if device.kind() == "cpu":
        return device.name()
    return f"{device.module().device_count()} x {device.name()}"


def commit() -> str:
    """Of the code, and whether it was changed since; "" outside of git."""
    try:
        found = git("rev-parse", "--short", "HEAD")
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found + changed


def git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(HERE), *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout.strip()


# ---- what is there -------------------------------------------------------------------------------


def read_json(file: Path) -> dict:
    """{} where it is not there; SystemExit where it is torn."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{file}: no JSON ({error}); run its stage again") from None


def stages_of(out: Path) -> dict[str, dict]:
    """Stage -> the facts of its finished run."""
    found = {stage: read_json(out / stage / "report.json") for stage in STAGES}
    return {stage: facts for stage, facts in found.items() if facts}


def evaluations_of(out: Path) -> dict[str, dict[str, float]]:
    """Evaluation -> {stage: its figure}, in the order of the files."""
    rows: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        for name, value in figures_of(out / "eval" / stage).items():
            rows.setdefault(name, {})[stage] = value
    return rows


def figures_of(folder: Path) -> dict[str, float]:
    chat = read_json(folder / "results.json")
    core = read_json(folder / "core.json")
    found = {}
    if "bits_per_byte" in chat:
        found["bits per byte"] = chat["bits_per_byte"]
    for name in core.get("tasks", {}):
        found[f"{name}, in context"] = core["tasks"][name]["accuracy"]
    for name, title in (("core", "CORE"), ("core_zh", "CORE-zh")):
        if name in core:
            found[title] = core[name]
    for name, row in chat.get("tasks", {}).items():
        found[name] = row["accuracy"]
        for k, share in row.get("pass_at", {}).items():
            found[f"{name}, pass@{k}"] = share
    if "chatcore" in chat:
        found["ChatCORE"] = chat["chatcore"]
    return found


# ---- the card ------------------------------------------------------------------------------------


def generate(out: Path) -> str:
    """Write the card; -> the table of evaluations, for the terminal."""
    stages = stages_of(out)
    rows = evaluations_of(out)
    if not stages and not rows:
        raise SystemExit(f"{out}: no stage has finished there")
    table = table_of(rows)
    histories = {stage: read_json(out / stage / "trainer_state.json") for stage in stages}
    drawn = curves.draw(out, stages, histories, PICTURES)
    lines = [*header(out, stages), "", "## Evaluations", "", *table, ""]
    for name in drawn:
        lines += [f"![{name}]({name})", ""]
    for stage, facts in stages.items():
        lines += section(stage, facts)
    write(out / CARD, "\n".join(lines).rstrip() + "\n")
    return "\n".join(table)


def header(out: Path, stages: dict[str, dict]) -> list[str]:
    notes = read_json(out / NOTES)
    seconds = sum(facts["seconds"] for facts in stages.values())
    lines = [f"# Report card: {out.resolve().name}", ""]
    for name in ("began", "commit", "devices", "host", "platform"):
        if notes.get(name):
            lines.append(f"- {name}: {notes[name]}")
    lines.append(f"- training: {clock(seconds)} in {len(stages)} stages")
    price = notes.get("dollars_per_hour")
    if price:
        cost = price * seconds / 3600
        lines.append(f"- cost: ${cost:,.2f} of training at ${price:,.2f} an hour")
    return lines


def table_of(rows: dict[str, dict[str, float]]) -> list[str]:
    present = [stage for stage in STAGES if any(stage in values for values in rows.values())]
    if not present:
        return ["no evaluation yet"]
    titles = " | ".join(STAGES[stage] for stage in present)
    lines = [f"| evaluation | {titles} |", f"|---|{'---:|' * len(present)}"]
    for name, values in rows.items():
        cells = [f"{values[stage]:.4f}" if stage in values else "-" for stage in present]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def section(stage: str, facts: dict) -> list[str]:
    rows = facts["rows"]
    tokens = facts["tokens"]["total"]
    lines = [f"## {STAGES[stage]}: {stage}", ""]
    lines += [
        f"- {facts['parameters']['total']:,} parameters, {facts['dtype']}, "
        f"{facts['world_size']} x {facts['device']}",
        f"- {rows['used']:,} rows, {rows.get('held_out', 0):,} held out; {facts['steps']:,} steps, "
        f"{tokens:,} tokens",
        f"- {clock(facts['seconds'])}, {facts['tokens_per_second']:,.0f} tokens/s, "
        f"{facts.get('flops', 0):.2e} FLOP, MFU {facts['mfu']:.0%} of a measured product",
        "",
        report.metrics_table(facts["metrics"]),
        "",
        "```bash",
        facts["command"],
        "```",
        "",
    ]
    samples = facts.get("samples", [])[:SHOWN]
    if samples:
        lines += ["| prompt | wanted | answer |", "|---|---|---|"]
    for sample in samples:
        cells = [cell(sample[name]) for name in ("prompt", "reference", "after")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def cell(text: str) -> str:
    words = " ".join(text.split()).replace("|", "\\|")
    return words if len(words) <= CELL else words[: CELL - 1] + "…"


def write(file: Path, text: str) -> None:
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


# ---- command line --------------------------------------------------------------------------------


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("action", choices=("reset", "generate"))
    add(
        "--output_dir",
        default=str(HERE.parent / "output" / "road"),
        help="of the road: its stages are folders there",
    )
    add("--dollars_per_hour", type=float, help="reset: what the machine costs")
    args = parser.parse_args()
    price = args.dollars_per_hour
    if price is not None and not 0 < price < float("inf"):
        raise cli.usage_error(f"--dollars_per_hour {price}: above 0")
    if price is not None and args.action != "reset":
        raise cli.usage_error("--dollars_per_hour: reset notes the price")
    out = Path(args.output_dir)
    if args.action == "reset":
        reset(out, price)
        cli.say(f"noted: {out / NOTES}")
        return
    if not out.is_dir():
        raise SystemExit(f"{out}: no such folder")
    table = generate(out)
    print(f"\n{table}\n\nreport card {out / CARD}")


if __name__ == "__main__":
    cli.run(main)
