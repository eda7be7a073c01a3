"""The output folder of a run: start, continue, or refuse, decided before anything large is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from . import checkpoint, cli, device

RUN_FILE = "run.json"  # in the output folder: what this run is, to recognise it when the same command comes again
FREE_TO_CHANGE = {  # settings that may differ when the same run goes on
    "logging_steps", "logging_strategy", "save_steps", "save_strategy", "save_total_limit", "eval_steps",
    "eval_strategy", "eval_generate", "per_device_eval_batch_size", "max_new_tokens", "report_to", "run_name",
    "disable_tqdm", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dataloader_num_workers",
    "ddp_timeout", "ddp_backend", "log_level", "local_rank", "deepspeed",
}  # fmt: skip


def engine(args) -> str:
    """ "zero-2", "zero-3", "ddp" or "single": how the optimizer state is laid out over ranks."""
    plugin = getattr(args, "hf_deepspeed_config", None)
    if plugin is not None:
        return f"zero-{plugin.config.get('zero_optimization', {}).get('stage', 0)}"
    return "ddp" if args.world_size > 1 else "single"


def open_output(args, settings: dict, overwrite: bool = False) -> Path | None:
    """Decide whether this run starts, continues or is refused, before the model is loaded. Call on every rank.

    Args:
        args: TrainingArguments.
        settings: all that defines the run (recipe arguments, data fingerprint); compared with the folder's last run.
        overwrite: delete what is there and start anew.
    Returns:
        the whole checkpoint to continue from, or None for a fresh start.
    Errors: exit 2 for a folder of another run, exit 1 when no checkpoint is whole, exit 0 when the run is finished.
    """
    out = Path(args.output_dir)
    settings = json.loads(
        json.dumps({k: v for k, v in settings.items() if k not in FREE_TO_CHANGE}, default=str, sort_keys=True)
    )
    verdict = _on_first_rank(lambda: _inspect_output(args, out, settings, overwrite))
    for line in verdict["say"]:
        cli.say(line)
    if "exit" in verdict:
        if verdict["exit"]:
            cli.fail(verdict["error"], verdict["exit"])
        raise SystemExit(0)
    return Path(verdict["start"]) if verdict["start"] else None


def _on_first_rank(action: Callable[[], dict]) -> dict:
    """Run `action` on rank 0 and give its result to all ranks: they must never decide differently about one folder."""
    box = [action() if cli.is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=device.device())
    return box[0]


def _inspect_output(args, out: Path, settings: dict, overwrite: bool) -> dict:
    asked = args.resume_from_checkpoint
    explicit = asked not in (None, "", "false", "False")
    if overwrite and not explicit and out.is_dir():
        for old in [*checkpoint.all_checkpoints(out), out / "final", out / "runs"]:
            shutil.rmtree(old, ignore_errors=True)
        for name in (RUN_FILE, "report.json", "report.md", "loss.png"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    past = json.loads((out / RUN_FILE).read_text()) if (out / RUN_FILE).is_file() else None
    changed = [k for k in settings if past and past["settings"].get(k) != settings[k]]
    told = ", ".join(f"{k} {past['settings'].get(k)!r} -> {settings[k]!r}" for k in changed[:6]) if changed else ""
    remedy = "Choose a new folder (OUTPUT=... or --output_dir ...), or --overwrite_output_dir true to replace it"
    if explicit and str(asked).lower() not in ("true", "1"):
        start, skipped = Path(asked), []
        reason = checkpoint.why_torn(start) if start.is_dir() else "no such folder"
        if reason:
            return {"say": [], "exit": 1, "error": f"cannot resume from {start}: {reason}"}
    elif past and (out / "report.json").is_file() and not changed:
        return {"say": [f"{out} holds this very run, finished at step {past.get('step')}. {remedy}."], "exit": 0}
    elif changed and not explicit and (checkpoint.all_checkpoints(out) or (out / "final").is_dir()):
        return {"say": [], "exit": 2, "error": f"{out} is the output of another run ({told}). {remedy}, "
                "or --resume_from_checkpoint true to continue it with these settings"}  # fmt: skip
    else:
        start, skipped = checkpoint.last_whole(out)
        if start is None and skipped and explicit:
            return {"say": skipped, "exit": 1, "error": f"no whole checkpoint in {out}. {remedy}"}
        if start is not None and past is None and not explicit:
            return {"say": [], "exit": 2, "error": f"{out} has checkpoints of another run. {remedy}, "
                    "or --resume_from_checkpoint true to continue it"}  # fmt: skip
    say = skipped + ([f"warning: continuing with other settings: {told}"] if changed and start else [])
    if start is not None:
        problem = _world_size_problem(args, checkpoint.facts(start), start)
        if problem and problem.startswith("error"):
            return {"say": say, "exit": 1, "error": problem.removeprefix("error: ")}
        say += [problem] if problem else []
        say.append(f"continuing from {start}")
    if start is None or changed:
        before = past.get("before") if past and start else None
        write_run_file(out, {"settings": settings, "before": before})
    return {"say": say, "start": str(start) if start else None}


def _world_size_problem(args, facts: dict, start: Path) -> str | None:
    here, there = (engine(args), args.world_size), (facts.get("engine"), facts.get("world_size"))
    if here == there:
        return None
    both = f"{start} was saved by {there[1]} process(es) with {there[0]}, this run has {here[1]} with {here[0]}"
    if {here[0], there[0]} <= {"ddp", "single"}:
        return f"warning: {both}; continuing, but the order of the data differs from an uninterrupted run"
    return (
        f"error: {both}; the optimizer state does not fit. Continue with NPROC={there[1]} and {there[0]}, or start a "
        f"new run from its weights: MODEL={start} OUTPUT=<new folder>"
    )


def write_run_file(out: Path, content: dict) -> None:
    """Replace run.json at once, so that a kill never leaves half of it."""
    part = out / (RUN_FILE + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False))
    os.replace(part, out / RUN_FILE)
