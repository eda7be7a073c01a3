"""The checks of the acceptance run on one card, and their table; acceptance.sh starts it.

Every check is a function that starts processes and yields rows. One that fails or takes too long is a row with FAIL and
ends no other; all together stop after --minutes. Checks that measure speed run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)
RECIPES = {  # recipe: the data it is told to take (of samples named by the user no tiny base is taught first)
    "train_qwen": "train_qwen/data",
    "chinese_bloom": "chinese_bloom/data/sft",
    "chatglm_lora": "chatglm_lora/data",
    "baichuan2_dpo": "baichuan2_dpo/data",
}
ENGINES = ("single", "zero2", "zero3")
OF_THE_CALLER = (
    "MODEL",
    "DATA",
    "OUTPUT",
    "NPROC",
    "DEVICES",
    "NNODES",
    "HOSTFILE",
    "RANK",
    "DANPU_DEVICE",
)
VARIANTS = {  # of the 0.6B shape: flags of train_qwen/train.py
    "plain": "--dataloader_num_workers 0",
    "2 loader workers": "--dataloader_num_workers 2",
    "checkpointing": "--gradient_checkpointing true",
    "LoRA": "--use_lora true",
    "ZeRO-2": "--deepspeed train_qwen/ds_zero2.json",
    "ZeRO-3": "--deepspeed train_qwen/ds_zero3.json",
}
SPEEDS = {  # tokens per second, as a share of the plain run's
    "2 loader workers": 0.97,
    "checkpointing": 0.65,
    "LoRA": 1.0,
    "ZeRO-2": 0.8,
    "ZeRO-3": 0.5,
}
LIGHTER = ("checkpointing", "LoRA")  # these need less memory than the plain run
PARAMETERS = 596_000_000  # of the 0.6B shape, the head counted once
SHARE_OF_A_PRODUCT = 0.30  # 55,000 tokens/s on an H100, whose bf16 product makes about 650 TFLOP/s
SYNCS_PER_MICRO_BATCH = 2.0  # transformers looks at the positions of a packed row, and one to spare
LOSS_LIMIT = 0.02
MINIMIND = {  # flags of minimind_npu/train.py
    "64m eager": "--size 64m --torch_compile false",
    "64m compiled": "--size 64m --torch_compile true",
    "64m Muon": "--size 64m --torch_compile false --optimizer muon",
    "198m MoE": "--size 198m-moe --torch_compile false",
}
MINIMIND_SPEEDS = {"64m compiled": 1.4, "64m Muon": 0.75, "198m MoE": 0.3}  # times the eager run's


class Failed(Exception):
    """What a check has to say instead of a figure."""


@dataclass
class Row:
    check: str
    figure: str
    target: str = "-"
    ok: bool | None = None  # None: a figure without a target

    def verdict(self) -> str:
        return {True: "ok", False: "FAIL", None: "-"}[self.ok]


@dataclass
class Sizes:
    """Steps and shapes of a run."""

    recipes: tuple[str, ...] = tuple(RECIPES)
    loss_steps: int = 60
    logged_every: int = 10
    save_every: int = 20
    shape_steps: tuple[int, int, int] = (5, 25, 30)  # measured from, measured to, all
    shape_flags: str = "--model_max_length 2048 --per_device_train_batch_size 2"
    micro_batches: int = 4
    minimind_steps: tuple[int, int] = (10, 60)  # logged every, all
    minimind_flags: str = "--model_max_length 512 --per_device_train_batch_size 32"
    at_once: int = 4  # of the runs whose speed does not matter


DRY = Sizes(
    recipes=("train_qwen",),
    loss_steps=6,
    logged_every=2,
    save_every=2,
    shape_steps=(1, 2, 3),
    shape_flags="--model_max_length 64 --per_device_train_batch_size 1",
    micro_batches=1,
    minimind_steps=(1, 2),
    minimind_flags="--model_max_length 32 --per_device_train_batch_size 1 "
    "--hidden_size 64 --num_hidden_layers 1 --data_path minimind_npu/data/pretrain/records.jsonl",
    at_once=2,
)


@dataclass
class Session:
    """What the checks share."""

    work: Path
    dry: bool
    ends: float  # of the whole run, seconds of time.monotonic()
    sizes: Sizes
    check_ends: float = float("inf")  # of the check that runs
    found: dict = field(default_factory=dict)  # what a later check compares with

    def environment(self, more: dict) -> dict:
        env = {name: value for name, value in os.environ.items() if name not in OF_THE_CALLER}
        env |= {
            "DANPU_CACHE": str(self.work / "cache"),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if not self.dry:
            env["HF_HUB_OFFLINE"] = "1"
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return env | more

    def start(self, *words, **more) -> subprocess.Popen:
        """A process in a group of its own, both outputs in one pipe."""
        return subprocess.Popen(
            [str(word) for word in (PYTHON, *words)],
            cwd=ROOT,
            env=self.environment(more),
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def judged(self, good: bool) -> bool | None:
        """Speeds and memory of tiny shapes say nothing."""
        return None if self.dry else good

    def seconds_left(self) -> float:
        return min(self.ends, self.check_ends) - time.monotonic()

    def run(self, *words, code: int = 0, **more) -> str:
        """A command's output. Errors: Failed where it outlasts its check, or ends with another exit
        code."""
        process = self.start(*words, **more)
        try:
            output, _ = process.communicate(timeout=max(0.1, self.seconds_left()))
        except subprocess.TimeoutExpired:
            kill(process)
            raise Failed("stopped: no time left") from None
        if process.returncode != code:
            raise Failed(f"exit {process.returncode}: {last_words(output)}")
        return output


def kill(process: subprocess.Popen) -> None:
    """The process and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error: ", "launch: "))]
    return (errors or lines or ["no output"])[-1][:160]


def losses(output: Path) -> dict[int, float]:
    """step -> training loss, from a finished run."""
    return {entry["step"]: entry["loss"] for entry in history(output) if "loss" in entry}


def history(output: Path) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def largest_share(found: dict, wanted: dict) -> float:
    """The largest relative difference of two runs' losses at the same steps."""
    if found.keys() != wanted.keys() or not found:
        raise Failed(f"losses of steps {sorted(found)}, not of {sorted(wanted)}")
    return max(abs(found[step] - loss) / abs(loss) for step, loss in wanted.items())


# ---- kernels ----
def kernels(session: Session) -> Iterator[Row]:
    flags = ["--dry-run"] if session.dry else []
    output = session.run(HERE / "kernels.py", *flags)
    for line in output.splitlines():
        if line.startswith("{"):
            said = json.loads(line)
            if "product_flops" in said:
                session.found |= said
            else:
                yield Row(**said)


# ---- the recipes' own runs ----
def recipe_command(session: Session, recipe: str, engine: str, output: Path) -> list:
    """A run of the built-in model."""
    sizes = session.sizes
    flags = (
        f"--max_steps {sizes.loss_steps} --logging_steps {sizes.logged_every} --eval_generate 0 "
        f"--save_steps {sizes.save_every} --report_to none --max_eval_samples 16"
    ).split()
    flags += ["--data_path", RECIPES[recipe], "--output_dir", output]
    script = f"{recipe}/train.py"
    if engine == "single":
        return [script, *flags]
    config = f"{recipe}/ds_{engine}.json"
    return ["common/launch.py", "1", script, "--deepspeed", config, *flags]


def same_losses(session: Session) -> Iterator[Row]:
    """Single, ZeRO-2 and ZeRO-3 of each recipe, several at once."""

    def run(recipe: str, engine: str) -> dict | Failed:
        output = session.work / f"losses-{recipe}-{engine}"
        try:
            session.run(*recipe_command(session, recipe, engine, output))
            return losses(output)
        except (Failed, OSError, ValueError) as error:
            return Failed(f"{engine}: {error}")

    pairs = [(recipe, engine) for recipe in session.sizes.recipes for engine in ENGINES]
    with ThreadPoolExecutor(session.sizes.at_once) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: run(*pair), pairs), strict=True))
    session.found["losses"] = found
    for recipe in session.sizes.recipes:
        for engine in ENGINES[1:]:
            name = f"{recipe}: {engine} against single, {session.sizes.loss_steps} steps"
            yield loss_row(name, found[recipe, engine], found[recipe, "single"])


def loss_row(name: str, found: dict | Failed, wanted: dict | Failed) -> Row:
    target = f"losses within {LOSS_LIMIT:.0%}"
    for one in (wanted, found):
        if isinstance(one, Failed):
            return Row(name, str(one), target, False)
    try:
        share = largest_share(found, wanted)
    except Failed as error:
        return Row(name, str(error), target, False)
    return Row(name, f"{share:.2%}", target, share <= LOSS_LIMIT)


# ---- a 0.6B shape ----
def shape(session: Session) -> Iterator[Row]:
    """The folder with its random weights."""
    flags = ["--dry-run"] if session.dry else []
    session.run(HERE / "shape.py", session.work / "shape", *flags)
    yield Row("0.6B shape of random weights", "saved")


def variant(name: str) -> Callable[[Session], Iterator[Row]]:
    def check(session: Session) -> Iterator[Row]:
        return measured(session, name)

    return check


def measured(session: Session, name: str) -> Iterator[Row]:
    sizes = session.sizes
    first, last, steps = sizes.shape_steps
    output = session.work / f"shape-{name.replace(' ', '-')}"
    flags = (
        f"--max_steps {steps} --logging_steps {first} --gradient_accumulation_steps "
        f"{sizes.micro_batches} --eval_generate 0 --eval_ratio 0.01 --learning_rate 1e-5 "
        f"--save_strategy no --report_to none --max_eval_samples 8 {sizes.shape_flags} "
        f"{VARIANTS[name]}"
    ).split()
    folder = session.work / "shape"
    flags += ["--model_name_or_path", folder / "model", "--data_path", folder / "rows.jsonl"]
    command = ["train_qwen/train.py", *flags, "--output_dir", output]
    if name.startswith("ZeRO"):
        command = ["common/launch.py", "1", *command]
    elif name == "plain":
        watched = ["--count-syncs", output.with_suffix(".syncs"), "--steps", last, steps]
        command = [HERE / "watched.py", *watched, *command]
    session.run(*command)
    found = speed_and_memory(output, first, last) | {"losses": losses(output)}
    session.found[name] = found
    yield from speed_rows(session, name, found)
    if name == "plain":
        yield sync_row(session, output.with_suffix(".syncs"))


def speed_and_memory(output: Path, first: int, last: int) -> dict:
    """tokens per second of the steps from `first` to `last`, GiB of the whole run."""
    at = {entry["step"]: entry for entry in history(output) if "total_tokens" in entry}
    if not {first, last} <= at.keys():
        raise Failed(f"steps {first} and {last} are not in the log")
    tokens = at[last]["total_tokens"] - at[first]["total_tokens"]
    seconds = at[last]["train_seconds"] - at[first]["train_seconds"]
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {"speed": tokens / max(seconds, 1e-9), "gib": report["peak_memory_mb"] / 1024}


def speed_rows(session: Session, name: str, found: dict) -> Iterator[Row]:
    title = f"0.6B, {name}"
    figure = f"{found['speed']:,.0f} tokens/s"
    if name == "plain":
        yield plain_row(session, title, figure, found["speed"])
        yield Row(f"{title}: memory", f"{found['gib']:.1f} GiB")
        return
    plain = session.found.get("plain")
    if plain is None:
        yield Row(title, f"{figure}, {found['gib']:.1f} GiB", "beside plain, which failed", False)
        return
    share = found["speed"] / plain["speed"]
    yield Row(
        title,
        f"{figure}, {share:.2f} of plain",
        f">= {SPEEDS[name]:.2f}",
        session.judged(share >= SPEEDS[name]),
    )
    lighter = name in LIGHTER
    yield Row(
        f"{title}: memory",
        f"{found['gib']:.1f} GiB",
        f"< {plain['gib']:.1f}" if lighter else "-",
        session.judged(found["gib"] < plain["gib"]) if lighter else None,
    )
    if name != "LoRA":  # it trains other weights
        yield loss_row(f"{title}: losses of plain", found["losses"], plain["losses"])


def plain_row(session: Session, title: str, figure: str, speed: float) -> Row:
    target = f">= {SHARE_OF_A_PRODUCT:.0%} of a product (55,000 on an H100)"
    product = session.found.get("product_flops")
    if product is None:
        return Row(title, figure, target + ", which failed", False)
    share = 6 * PARAMETERS * speed / product
    enough = session.judged(share >= SHARE_OF_A_PRODUCT)
    return Row(title, f"{figure}, {share:.0%}", target, enough)


def sync_row(session: Session, file: Path) -> Row:
    counted = json.loads(file.read_text(encoding="utf-8"))
    each = sum(counted["places"].values()) / counted["steps"] / session.sizes.micro_batches
    shown = ", ".join(f"{place} {times}" for place, times in list(counted["places"].items())[:4])
    return Row(
        "0.6B: waits of the host per micro-batch",
        f"{each:.1f}" + (f" ({shown})" if shown else ""),
        f"<= {SYNCS_PER_MICRO_BATCH:.0f}",
        each <= SYNCS_PER_MICRO_BATCH,
    )


# ---- minimind ----
def minimind(name: str) -> Callable[[Session], Iterator[Row]]:
    def check(session: Session) -> Iterator[Row]:
        return minimind_rows(session, name)

    return check


def minimind_rows(session: Session, name: str) -> Iterator[Row]:
    every, steps = session.sizes.minimind_steps
    output = session.work / f"minimind-{name.replace(' ', '-')}"
    flags = (
        f"--stage pretrain {MINIMIND[name]} {session.sizes.minimind_flags} --max_steps {steps} "
        f"--logging_steps {every} --eval_generate 0 --eval_steps 0 --save_strategy no "
        f"--report_to none --max_eval_samples 16 --gradient_accumulation_steps 1"
    ).split()
    watched = [HERE / "watched.py", "--log-recompiles"]
    watched += ["--no-compile"] if session.dry else []  # it takes longer than all else
    command = [*watched, "minimind_npu/train.py", *flags, "--output_dir", output]
    text = session.run(*command)
    speeds = re.findall(r"^step .*?([\d,]+) tok/s \| MFU", text, re.MULTILINE)
    if not speeds:
        raise Failed(f"no line of a step: {last_words(text)}")
    speed = float(speeds[-1].replace(",", ""))
    session.found[name] = speed
    title = f"minimind {name}"
    if name in MINIMIND_SPEEDS:
        yield times_eager(session, title, name, speed)
    else:
        yield Row(title, f"{speed:,.0f} tokens/s")
    if "compiled" in name:
        late = text.split(f"\nstep {every}/")[-1].count("Recompiling function")
        yield Row(f"{title}: recompiled after step {every}", f"{late} times", "0", late == 0)


def times_eager(session: Session, title: str, name: str, speed: float) -> Row:
    eager = session.found.get("64m eager")
    target = f">= {MINIMIND_SPEEDS[name]:.2f} of eager"
    if eager is None:
        return Row(title, f"{speed:,.0f} tokens/s", f"{target}, which failed", False)
    share = speed / eager
    figure = f"{speed:,.0f} tokens/s, {share:.2f} of eager"
    return Row(title, figure, target, session.judged(share >= MINIMIND_SPEEDS[name]))


# ---- a killed run, a hidden card ----
def kill_and_resume(session: Session) -> Iterator[Row]:
    """Killed behind its first checkpoint, and the same command again."""
    output = session.work / "killed"
    command = recipe_command(session, "train_qwen", "single", output)
    first = output / f"checkpoint-{session.sizes.save_every}" / "complete.json"
    process = session.start(*command)
    while not first.is_file() and process.poll() is None and session.seconds_left() > 0:
        time.sleep(0.01)
    finished = process.poll()
    kill(process) if finished is None else process.communicate()
    if finished is not None or not first.is_file():
        raise Failed(f"no checkpoint to kill it behind (exit {finished})")
    text = session.run(*command)
    went_on = "continuing from" in text
    yield Row("killed and started again", "continues" if went_on else "anew", "continues", went_on)
    whole = session.found.get("losses", {}).get(("train_qwen", "single"))
    wanted = whole if whole is not None else Failed("the run to compare with did not run")
    yield loss_row("losses as if never killed", losses(output), wanted)


def hidden_card(session: Session) -> Iterator[Row]:
    """CUDA_VISIBLE_DEVICES= must not train on the CPU."""
    watched = [HERE / "watched.py", "--hide-cards"]
    if session.dry:  # there may be no driver
        driver = session.work / "driver"
        driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  today\n")
        watched += ["--driver", driver]
    command = [*watched, "train_qwen/train.py", "--output_dir", session.work / "hidden"]
    text = session.run(*command, code=1)
    refused = "hides it" in text and not (session.work / "hidden").exists()
    figure = "refused" if refused else last_words(text)
    yield Row("CUDA_VISIBLE_DEVICES=", figure, "refused", refused)


LIMITS = {  # seconds, by the first word of a check's name
    "kernels": 90,
    "hidden": 60,
    "losses": 180,
    "resume": 120,
    "shape": 90,
    "minimind": 90,
}
CHECKS = {
    "kernels": kernels,
    "hidden": hidden_card,
    "losses": same_losses,
    "resume": kill_and_resume,
    "shape": shape,
    **{f"shape {name}": variant(name) for name in VARIANTS},
    **{f"minimind {name}": minimind(name) for name in MINIMIND},
}


# ---- the run and its table ----
def collect(session: Session, chosen: list[str]) -> list[Row]:
    rows = []
    for name in chosen:
        began = time.monotonic()
        if began >= session.ends:
            rows.append(Row(name, "not begun: no time left", "-", False))
            continue
        session.check_ends = began + LIMITS[name.split()[0]] * (5 if session.dry else 1)
        found = []
        try:
            for row in CHECKS[name](session):
                found.append(row)
        except Failed as error:
            found.append(Row(name, str(error), "runs", False))
        except Exception as error:  # of files that a check should have left
            words = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            found.append(Row(name, words, "runs", False))
        for row in found:
            print(f"{row.verdict():4} {row.check}: {row.figure} ({row.target})", flush=True)
        print(f"     {name} took {time.monotonic() - began:.0f} s", flush=True)
        rows += found
    return rows


def text_table(rows: list[Row]) -> str:
    lines = [("check", "figure", "target", "")]
    lines += [(row.check, row.figure, row.target, row.verdict()) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)
        ).rstrip()
        for line in lines
    )


def markdown_table(rows: list[Row], title: str) -> str:
    lines = [f"# {title}", "", "| check | figure | target | |", "|---|---|---|---|"]
    for row in rows:
        cells = (row.check, row.figure, row.target, row.verdict())
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def choose(only: list[str] | None) -> list[str]:
    """Checks by the first word of their names."""
    if not only:
        return list(CHECKS)
    return [name for name in CHECKS if name in only or name.split()[0] in only]


def card(dry: bool) -> str:
    """What is tested; SystemExit where there is no card and one is wanted."""
    sys.path.insert(0, str(ROOT))
    from common import device

    # isort: split
    import torch

    message, _ = device.install_problem()
    if device.kind() != "cuda" and not dry:
        raise SystemExit(message or "error: no CUDA card is visible; --dry-run takes tiny shapes")
    return f"{device.name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output/acceptance")
    parser.add_argument("--minutes", type=float, default=10, help="limit of the whole run")
    names = sorted({name.split()[0] for name in CHECKS})
    parser.add_argument("--only", nargs="*", metavar="CHECK", help=", ".join(names))
    args = parser.parse_args()
    title = f"Acceptance{' (dry run)' if args.dry_run else ''}: {card(args.dry_run)}"
    print(title, flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="danpu-acceptance-") as work:
        sizes = DRY if args.dry_run else Sizes()
        session = Session(Path(work), args.dry_run, began + 60 * args.minutes, sizes)
        rows = collect(session, choose(args.only))
    print(f"\n{text_table(rows)}\n")
    file = args.output_dir / "acceptance.md"
    file.write_text(markdown_table(rows, title), encoding="utf-8")
    failed = sum(row.ok is False for row in rows)
    seconds = time.monotonic() - began
    print(f"{failed} of {len(rows)} failed, {seconds:.0f} s; the table is in {file}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
