"""What quickstart.py shows, and leaves on disk: exact checkpoints, whole or not there; the model;
the report."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loop.state import barrier, random_state, restore_random
from tqdm.auto import tqdm

from common import cli, device
from common.runs import checkpoint, report, run_folder


def display(total: int, done: int, tokens: int) -> Callable[[int, float], None]:
    """A function that shows step and loss: a bar on a terminal, lines elsewhere. `tokens`: of a
    step on all ranks."""
    bar = tqdm(
        total=total,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        disable=None if cli.is_main() else True,
    )
    began = time.time()

    def show(step: int, loss: float) -> None:
        speed = (step - done) / (time.time() - began)
        text = f"loss {loss:.4f} | {speed * tokens:,.0f} tok/s"
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)
        if bar.disable:
            left = tqdm.format_interval((total - step) / speed)
            cli.say(f"step {step}/{total} {step / total:4.0%} | {text} | left {left}")
        if step == total:
            bar.close()

    return show


def note(text: str) -> None:
    """cli.say above a bar that is still running."""
    if cli.is_main():
        tqdm.write(text)


def save(out: Path, model, tokenizer, parts: dict, progress: dict, rank: int, world: int) -> None:
    """OUT/checkpoint-<step>: weights, `parts` (optimizer, scaler), progress, each rank's random
    state. All ranks call.

    It counts once complete.json, written last, names every file with its sha256; then the older
    ones go."""
    folder = out / f"checkpoint-{progress['step']}"
    if cli.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # torn: from a whole one this run had continued
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(states | {"progress": progress}, folder / "training.pt")
    barrier()
    torch.save(random_state(), folder / f"random_{rank}.pt")
    barrier()
    if cli.is_main():
        engine = "ddp" if world > 1 else "single"
        checkpoint.mark_complete(
            folder, step=progress["step"], world_size=world, engine=engine, weights_only=False
        )
        for old in checkpoint.all_checkpoints(out):
            if old != folder:
                shutil.rmtree(old)


def restore(folder: Path, parts: dict, where: torch.device) -> dict:
    """Put back what `save` wrote beside the weights; returns the progress."""
    saved = torch.load(folder / "training.pt", map_location=where, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    restore_random(folder, 0)
    return saved["progress"]


def save_final(out: Path, model, tokenizer) -> Path:
    """OUT/final, for from_pretrained; it appears whole."""
    part, final = out / "final.part", out / "final"
    shutil.rmtree(part, ignore_errors=True)
    model.config.use_cache = True
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    return final


def finish(
    args, model, tokenizer, facts: dict, progress: dict, after: dict, asked: list[tuple[str, str]]
) -> None:
    """Rank 0, at the end: the model, loss.png, report.md, report.json, and what to look at."""
    out, before = Path(args.output_dir), progress["before"]
    final = save_final(out, model, tokenizer)
    losses = [entry["loss"] for entry in progress["history"] if "loss" in entry]
    tokens, seconds = len(losses) * facts["tokens_a_step"], progress["seconds"]
    facts |= {
        "recipe": "quickstart",
        "model": args.model_name,
        "device": device.name(),
        "steps": progress["step"],
        "tokens": {"total": tokens, "label": tokens // args.max_length * (args.max_length - 1)},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_memory_mb": round(device.peak_memory_mb(), 1),
        "loss": {"first": losses[0], "last": losses[-1]},
        "metrics": {"before": before["metrics"], "after": after["metrics"]},
        "command": cli.resume_command(),
    }
    said = zip(asked, before["answers"], after["answers"], strict=True)
    samples = [{"prompt": a, "reference": b, "before": c, "after": d} for (a, b), c, d in said]
    start = {"step": 0, "eval_loss": before["metrics"]["loss"]}
    table = report.write_report(out, facts, [start, *progress["history"]], samples[:12])
    run = json.loads((out / run_folder.RUN_FILE).read_text())
    run_folder.write_run_file(out, run | {"step": progress["step"]})
    print(f"\n{table}\n\nthe model goes on after the bar:")
    shown = samples[:: max(1, len(samples) // 3)][:3]
    print(*(f"  {sample['prompt']}|{sample['after']}" for sample in shown), sep="\n")
    print(f"\nmodel   {final}\nreport  {out / 'report.md'}, {out / 'loss.png'}", flush=True)
