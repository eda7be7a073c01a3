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
import shutil
import subprocess
import time

from road import curves

from common.callbacks import clock
from common.data.files import atomic_file
from common.runs import memory, report
from common.runs.memory_plan import gib

STAGES = {"pretrain": "BASE", "mid": "MID", "sft": "SFT", "rl": "RL"}
EXPLAINED = (
    "Shares of right answers: `in context` by text, with examples before the question (core.py), "
    "the others without (chat_eval.py). CORE, CORE-zh and ChatCORE are means of such shares, each "
    "centred to 0 for guessing. Bits per byte: of held-out text."
)
NOTES = "road.json"
CARD = "report.md"
PICTURES = ("loss.png", "bits_per_byte.png")
OWN_PICTURES = {"rl": ("reward.png",)}  # of stages, shown beside them
RESULTS = ("results.json", "core.json")  # of evaluations
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
        "host": host(out),
        "platform": platform.platform(),
        "versions": report.versions(),
        "dollars_per_hour": dollars_per_hour,
    }
    write(out / NOTES, json.dumps(notes, indent=1))


def devices() -> str:
    if device.kind() == "cpu":
        return device.name()
    count = device.module().device_count()
    return f"{count} x {device.name()}, {gib(memory.free_bytes())} of memory free"


def host(out: Path) -> str:
    disk = gib(shutil.disk_usage(out).free)
    free = gib(memory.host_bytes())
    return f"{os.cpu_count()} CPU cores, {free} of memory free, {disk} of disk free"


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
    chat, core = (read_json(folder / name) for name in RESULTS)
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
    price = read_json(out / NOTES).get("dollars_per_hour")
    commands = {facts["command"] for facts in stages.values()}
    lines = [*header(out, stages, price), ""]
    if len(commands) == 1:
        lines += shown_command(*commands)
    lines += ["## Evaluations", "", *table, ""]
    if rows:
        lines += [EXPLAINED, ""]
    for name in drawn:
        lines += [f"![{name}]({name})", ""]
    for stage, facts in stages.items():
        lines += section(stage, facts, price)
        if len(commands) > 1:
            lines += shown_command(facts["command"])
        lines += pictures_of(out, stage)
        lines += samples_of(facts)
    write(out / CARD, "\n".join(lines).rstrip() + "\n")
    return "\n".join(table)


def header(out: Path, stages: dict[str, dict], price: float | None) -> list[str]:
    notes = read_json(out / NOTES)
    lines = [f"# Report card: {out.resolve().name}", ""]
    for name in ("began", "commit", "devices", "host", "platform"):
        if notes.get(name):
            lines.append(f"- {name}: {notes[name]}")
    if notes.get("versions"):
        known = [f"{name} {version}" for name, version in notes["versions"].items()]
        lines.append(f"- software: {', '.join(one for one in known if 'commit' not in one)}")
    if model_of(out):
        lines.append(f"- model: {model_of(out)}")
    seconds = sum(facts["seconds"] for facts in stages.values())
    flops = sum(facts.get("flops", 0.0) for facts in stages.values())
    tokens = sum(facts["tokens"]["total"] for facts in stages.values())
    peak = max((facts.get("peak_memory_mb", 0.0) for facts in stages.values()), default=0.0)
    lines.append(
        f"- training: {clock(seconds)} in {len(stages)} stages, {tokens:,} tokens, {flops:.2e} "
        f"FLOP; at most {gib(peak * 2**20)} of memory in a process"
    )
    measured = seconds_of_evaluation(out)
    if measured:
        lines.append(f"- evaluation: {clock(measured)}")
    if price:
        lines.append(
            f"- cost: ${cost(price, seconds):,.2f} of training and ${cost(price, measured):,.2f} "
            f"of evaluation at ${price:,.2f} an hour"
        )
    return lines


def cost(price: float, seconds: float) -> float:
    """price: of an hour."""
    return price * seconds / 3600


def model_of(out: Path) -> str:
    """Its sizes, as the pre-trained one has them."""
    config = read_json(out / "pretrain" / "final" / "config.json")
    if not config:
        return ""
    return (
        f"{config['model_type']}, {config['num_hidden_layers']} layers, {config['hidden_size']} "
        f"wide, {config['num_attention_heads']} heads, {config['vocab_size']:,} tokens in the "
        "vocabulary"
    )


def seconds_of_evaluation(out: Path) -> float:
    """Of those that are in the table; of one that was continued, its last start."""
    files = [out / "eval" / stage / name for stage in STAGES for name in RESULTS]
    return sum(read_json(file).get("seconds", 0.0) for file in files)


def shown_command(command: str) -> list[str]:
    return ["```bash", command, "```", ""]


def table_of(rows: dict[str, dict[str, float]]) -> list[str]:
    present = [stage for stage in STAGES if any(stage in values for values in rows.values())]
    if not present:
        return ["no evaluation yet"]
    titles = " | ".join(STAGES[stage] for stage in present)
    lines = [f"| evaluation | {titles} |", f"|---|{'---:|' * len(present)}"]
    for name, values in rows.items():
        cells = [figure(values.get(stage)) for stage in present]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def figure(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 4) + 0.0:.4f}"  # never -0.0000


def section(stage: str, facts: dict, price: float | None) -> list[str]:
    rows = facts["rows"]
    tokens = facts["tokens"]["total"]
    own = f"; ${cost(price, facts['seconds']):,.2f}" if price else ""
    lines = [f"## {STAGES[stage]}: {stage}", ""]
    lines += [
        f"- {facts['parameters']['total']:,} parameters, {facts['dtype']}, "
        f"{facts['world_size']} x {facts['device']}",
        f"- {rows['used']:,} rows, {rows.get('held_out', 0):,} held out; {facts['steps']:,} steps, "
        f"{tokens:,} tokens",
        f"- {clock(facts['seconds'])}, {facts['tokens_per_second']:,.0f} tokens/s, "
        f"{facts.get('flops', 0):.2e} FLOP, MFU {facts['mfu']:.0%} of a measured product{own}",
    ]
    mixture = rows.get("mixture", [])
    if mixture:
        parts = [f"{Path(part['file']).name} {part['drawn']:,}" for part in mixture]
        lines.append(f"- rows of an epoch: {', '.join(parts)}")
    return [*lines, "", report.metrics_table(facts["metrics"]), ""]


def pictures_of(out: Path, stage: str) -> list[str]:
    """Of what the pictures of the whole road do not show."""
    lines = []
    for name in OWN_PICTURES.get(stage, ()):
        if (out / stage / name).is_file():
            lines += [f"![{stage}: {name}]({stage}/{name})", ""]
    return lines


def samples_of(facts: dict) -> list[str]:
    samples = facts.get("samples", [])[:SHOWN]
    if not samples:
        return []
    lines = ["| prompt | wanted | answer |", "|---|---|---|"]
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
