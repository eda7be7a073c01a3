"""The output folder of a run: start, continue, or refuse, decided before anything large is
loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from common import cli, device
from common.runs import checkpoint

# in the output folder: what this run is, to recognise it when the same command comes again
RUN_FILE = "run.json"
FREE_TO_CHANGE = {  # settings that may differ when the same run goes on
    "logging_steps",
    "logging_strategy",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "eval_steps",
    "eval_strategy",
    "eval_generate",
    "per_device_eval_batch_size",
    "max_new_tokens",
    "report_to",
    "run_name",
    "disable_tqdm",
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "dataloader_num_workers",
    "ddp_timeout",
    "ddp_backend",
    "log_level",
    "local_rank",
    "deepspeed",
}


def engine(args) -> str:
    """ "zero-2", "zero-3", "ddp" or "single": how the optimizer state is laid out over ranks."""
    config = getattr(args, "hf_deepspeed_config", None)
    if (
        config is None and getattr(args, "deepspeed_plugin", None) is not None
    ):  # from `accelerate launch`
        config = args.deepspeed_plugin.hf_ds_config
    if config is not None:
        return f"zero-{config.config.get('zero_optimization', {}).get('stage', 0)}"
    return "ddp" if args.world_size > 1 else "single"


def open_output(args, settings: dict, overwrite: bool = False) -> Path | None:
    """Decide whether this run starts, continues or is refused, before the model is loaded. Call on
    every rank.

    Args:
        args: TrainingArguments; `keeps_order` on it: rows come in one order whatever the number of
            processes.
        settings: all that defines the run (recipe arguments, data fingerprint); compared with the
            folder's last run.
        overwrite: delete what is there and start anew.
    Returns:
        the whole checkpoint to continue from, or None for a fresh start.
    Errors: exit 2 for a folder of another run, exit 1 when no checkpoint is whole, exit 0 when the
    run is finished.
    """
    out = Path(args.output_dir)
    settings = json.loads(
        json.dumps(
            {k: v for k, v in settings.items() if k not in FREE_TO_CHANGE},
            default=str,
            sort_keys=True,
        )
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
    """Run `action` on rank 0 and give its result to all ranks: they must never decide differently
    about one folder."""
    box = [action() if cli.is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=device.device())
    return box[0]


REMEDY = "Choose a new folder (OUTPUT=... or --output_dir ...)"
REPLACE = "--overwrite_output_dir true to replace it"
RESUME = "--resume_from_checkpoint true to continue it with these settings"


def _inspect_output(args, out: Path, settings: dict, overwrite: bool) -> dict:
    """On rank 0: {"say": lines, "start": folder or None} or {"say", "exit": code, "error":
    line}."""
    asked = str(args.resume_from_checkpoint or "false")
    explicit = asked.lower() != "false"
    try:
        out.mkdir(parents=True, exist_ok=True)
        past = json.loads((out / RUN_FILE).read_text()) if (out / RUN_FILE).is_file() else None
    except (OSError, ValueError) as error:
        return {"say": [], "exit": 1, "error": f"--output_dir {out} cannot be used: {error}"}
    known = (past or {}).get("settings", {})
    changed = [k for k in settings if past and known.get(k) != settings[k]]
    told = ", ".join(f"{k} {known.get(k)!r} -> {settings[k]!r}" for k in changed[:6])
    finished = past is not None and past.get("step") is not None
    occupied = bool(checkpoint.all_checkpoints(out)) or (out / "final").is_dir()

    if (
        past is None and occupied and not explicit
    ):  # never delete or continue what this project did not write
        return {
            "say": [],
            "exit": 2,
            "error": f"{out} has checkpoints or a model of another run. {REMEDY}, or {RESUME}",
        }
    if overwrite and not explicit and past and (changed or finished):
        _clear(out)
        past, changed = None, []
    elif finished and not changed and not explicit:
        return {
            "say": [
                f"{out} holds this very run, finished at step {past['step']}. {REMEDY}, or {REPLACE}."
            ],
            "exit": 0,
        }
    elif changed and not explicit and occupied:
        error = f"{out} is the output of another run ({told}). {REMEDY}, or {REPLACE}, or {RESUME}"
        return {"say": [], "exit": 2, "error": error}

    if asked.lower() in ("true", "1", "false"):
        start, skipped = checkpoint.last_complete(out)
        if start is None and skipped and explicit:
            return {
                "say": skipped,
                "exit": 1,
                "error": f"no whole checkpoint in {out}. {REMEDY}, or {REPLACE}",
            }
    else:
        start, skipped = Path(asked), []
        reason = checkpoint.why_incomplete(start) if start.is_dir() else "no such folder"
        if reason:
            return {"say": [], "exit": 1, "error": f"cannot resume from {start}: {reason}"}
    say = skipped + (
        [f"warning: continuing with other settings: {told}"] if changed and start else []
    )
    if start is not None:
        problem = _misfit(args, checkpoint.facts(start), start)
        if problem.startswith("error: "):
            return {"say": say, "exit": 1, "error": problem.removeprefix("error: ")}
        say += [*filter(None, [problem]), f"continuing from {start}"]
    before = past.get("before") if past and start else None
    write_run_file(out, {"settings": settings, "before": before})  # without a step: not finished
    (out / "report.json").unlink(missing_ok=True)
    return {"say": say, "start": str(start) if start else None}


def _clear(out: Path) -> None:
    """Remove what a run of this project left; anything else in the folder stays."""
    for old in [*checkpoint.all_checkpoints(out), out / "final", out / "runs"]:
        shutil.rmtree(old, ignore_errors=True)
    for name in (RUN_FILE, "report.json", "report.md", "loss.png", "trainer_state.json"):
        (out / name).unlink(missing_ok=True)


def _misfit(args, facts: dict, start: Path) -> str:
    """ "" when the checkpoint fits this run, else a line that starts with warning: or error:."""
    anew = f"start a new run from its weights: MODEL={start} OUTPUT=<new folder>"
    if facts.get("weights_only"):
        return f"error: {start} was saved with --save_only_model and has no optimizer state; {anew}"
    here, there = (engine(args), args.world_size), (facts.get("engine"), facts.get("world_size"))
    if here == there:
        return ""
    both = f"{start} was saved by {there[1]} process(es) with {there[0]}, this run has {here[1]} with {here[0]}"
    if not {here[0], there[0]} <= {"ddp", "single"}:
        return f"error: {both}; the optimizer state does not fit. Continue with NPROC={there[1]} and {there[0]}, or {anew}"
    if getattr(args, "keeps_order", False):
        return f"{both}; continuing at the same row"
    if args.max_steps <= 0:
        return f"error: {both}, so an epoch has other steps. Continue with NPROC={there[1]}, or give --max_steps"
    return (
        f"warning: {both}; continuing, but the order of the data differs from an uninterrupted run"
    )


def write_run_file(out: Path, content: dict) -> None:
    """Replace run.json at once, so that a kill never leaves half of it."""
    part = out / (RUN_FILE + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False))
    os.replace(part, out / RUN_FILE)
