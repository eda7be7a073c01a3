"""The output folder of a run: start, continue or refuse, decided before anything big is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from common import cli, device
from common.data.files import atomic_file
from common.data.labels import tokenizer_settings
from common.runs import checkpoint, digests, trust
from common.runs.engine import engine

RUN_FILE = "run.json"  # what this run is, to recognise it when the same command comes again
# settings that may differ when the same run goes on
FREE_TO_CHANGE = {
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
    "trust_checkpoint",
    "no_memory_check",
    "dataloader_num_workers",
    "ddp_timeout",
    "ddp_backend",
    "log_level",
    "local_rank",
    "deepspeed",
}

REMEDY = "Choose a new folder (OUTPUT=... or --output_dir ...)"
REPLACE = "--overwrite_output_dir true to replace it"
TRUST = "add --trust_checkpoint true, or name its key: DANPU_KEY=FILE"
UNSIGNED = (
    "DANPU_CHECKSUM=size leaves checkpoints unsigned: to continue this run add "
    "--trust_checkpoint true"
)
RESUME = "--resume_from_checkpoint true to continue it with these settings"


@dataclass
class Verdict:
    """What is to happen with a folder. say: lines for people; start: the checkpoint to continue
    from, "" for a fresh start; exit: None, or the code to end with, and the error for it."""

    say: list[str] = field(default_factory=list)
    start: str = ""
    exit: int | None = None
    error: str = ""


def open_output(
    args, settings: dict, overwrite: bool = False, keeps_order: bool = False, tokenizer=None
) -> Path | None:
    """Decide whether this run starts, continues or is refused, before the model is loaded. Call on
    every rank.

    Args:
        args: TrainingArguments.
        settings: all that defines the run (recipe arguments, data fingerprint); compared with the
            folder's last run. trust_checkpoint among them: the user vouches for the checkpoint.
        overwrite: delete what is there and start anew.
        keeps_order: rows come in one order whatever the number of processes.
        tokenizer: a run does not go on with another vocabulary or chat template.
    Returns:
        the complete checkpoint to continue from, or None for a fresh start.
    Errors: exit 2 for a folder of another run, exit 1 when no checkpoint is complete, exit 0 when
    the run is finished.
    """
    digests.method()  # a word that is none ends the run now, not at its first checkpoint
    if tokenizer is not None:
        settings = settings | tokenizer_settings(tokenizer)
    defining = {name: value for name, value in settings.items() if name not in FREE_TO_CHANGE}
    defining = json.loads(json.dumps(defining, default=str, sort_keys=True))
    trusted = settings.get("trust_checkpoint", False)

    def decide() -> Verdict:
        out = Path(args.output_dir)
        try:
            return inspect(args, out, defining, overwrite, keeps_order, trusted)
        except OSError as error:  # of another user, a disk that is full or read-only
            return Verdict(exit=1, error=f"--output_dir {out} cannot be written: {error}")

    verdict = _on_first_rank(decide)
    for line in verdict.say:
        cli.say(line)
    if verdict.exit:
        cli.fail(verdict.error, verdict.exit)
    if verdict.exit == 0:
        raise SystemExit(0)
    return Path(verdict.start) if verdict.start else None


def _on_first_rank(action: Callable[[], Verdict]) -> Verdict:
    """Run `action` on rank 0 and give its result to all ranks: they must never decide differently
    about one folder."""
    box = [action() if cli.is_main() else None]
    cli.wait_for_all("it reads the checkpoints of the output folder")
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=device.device())
    return box[0]


def inspect(
    args, out: Path, settings: dict, overwrite: bool, keeps_order: bool, trusted: bool = False
) -> Verdict:
    """What `open_output` does with the folder, decided by one process."""
    asked = str(args.resume_from_checkpoint or "false")
    explicit = asked.lower() != "false"
    try:
        out.mkdir(parents=True, exist_ok=True)
        past = read_run_file(out)
    except (OSError, ValueError) as error:
        return Verdict(exit=1, error=f"--output_dir {out} cannot be used: {error}")

    known = past.get("settings", {})
    changed = [name for name in settings if past and known.get(name) != settings[name]]
    differences = [f"{name} {known.get(name)!r} -> {settings[name]!r}" for name in changed[:6]]
    told = ", ".join(differences)
    finished = past.get("step") is not None
    occupied = bool(checkpoint.all_checkpoints(out)) or (out / "final").is_dir()

    if not explicit:
        if not past and occupied:
            # never delete or continue what this project did not write
            error = f"{out} has checkpoints or a model of another run. {REMEDY}, or {RESUME}"
            return Verdict(exit=2, error=error)
        if overwrite and past and (changed or finished):
            _clear(out)
            past = {}
            changed = []
        elif finished and not changed:
            said = f"{out} holds this very run, finished at step {past['step']}."
            return Verdict(exit=0, say=[f"{said} {REMEDY}, or {REPLACE}."])
        elif changed and occupied:
            error = f"{out} is the output of another run ({told})."
            return Verdict(exit=2, error=f"{error} {REMEDY}, or {REPLACE}, or {RESUME}")

    verdict = _choose_checkpoint(out, asked, may_replace=overwrite and bool(past))
    if runs_code(args) and not trusted and verdict.exit is None:
        _check_writer(verdict)
    if verdict.exit is None and verdict.start:
        if changed:
            verdict.say.append(f"warning: continuing with other settings: {told}")
        _check_fit(verdict, args, keeps_order)
    if verdict.exit is None:
        before = past.get("before") if verdict.start else None
        write_run_file(out, {"settings": settings, "before": before})  # no step: not finished
        (out / "report.json").unlink(missing_ok=True)
    return verdict


def _choose_checkpoint(out: Path, asked: str, may_replace: bool) -> Verdict:
    """The newest complete checkpoint, or the one that --resume_from_checkpoint names.

    may_replace: start anew where there are only damaged ones.
    """
    if asked.lower() in ("true", "1", "false"):
        start, skipped = checkpoint.last_complete(out)
        if start is not None:
            return Verdict(say=skipped, start=str(start))
        if asked.lower() != "false":
            return _nothing_to_resume(out, skipped)
        return _begin(out, skipped, may_replace)
    start = Path(asked)
    reason = checkpoint.why_incomplete(start) if start.is_dir() else "no such folder"
    if reason:
        return Verdict(exit=1, error=f"cannot resume from {start}: {reason}")
    return Verdict(start=str(start))


def _nothing_to_resume(out: Path, skipped: list[str]) -> Verdict:
    """--resume_from_checkpoint true without a complete checkpoint: a scheduler that always says so
    must be able to start, but what is there is never left behind unasked."""
    if not skipped:
        return Verdict(say=[f"nothing to resume in {out}: starting at step 0"])
    error = f"no complete checkpoint in {out}. Put back what is damaged, or leave "
    error += "--resume_from_checkpoint away: what was never complete is then replaced"
    return Verdict(say=skipped, exit=1, error=f"{error}. {REMEDY} to keep all")


def _begin(out: Path, skipped: list[str], may_replace: bool) -> Verdict:
    """No complete checkpoint: begin at step 0, or stop before that costs somebody days.

    A run that was killed in its first save has nothing that was ever complete, and the same command
    must go on by itself. A checkpoint that was complete and is damaged holds work that a person may
    still mend; a fresh start would delete it in the end.
    """
    folders = checkpoint.all_checkpoints(out)
    was_complete = any((folder / checkpoint.MARKER).exists() for folder in folders)
    if was_complete and not may_replace:
        error = f"no complete checkpoint in {out} any more. Put back what is damaged, or {REPLACE}"
        return Verdict(say=skipped, exit=1, error=f"{error} from step 0. {REMEDY} to keep both")
    if was_complete:
        _clear(out)
    elif skipped:
        skipped = [*skipped, f"no checkpoint was ever complete in {out}: starting at step 0"]
    return Verdict(say=skipped)


def _check_fit(verdict: Verdict, args, keeps_order: bool) -> None:
    """Say, or refuse with exit 1, where the checkpoint was saved by another layout of processes."""
    start = verdict.start
    facts = checkpoint.facts(start)
    anew = f"start a new run from its weights: MODEL={start} OUTPUT=<new folder>"
    if facts.get("weights_only"):
        verdict.exit = 1
        verdict.error = (
            f"{start} was saved with --save_only_model and has no optimizer state; {anew}"
        )
        return

    here = engine(args)
    there = facts.get("engine")
    processes = facts.get("world_size")
    if (here, args.world_size) != (there, processes):
        both = (
            f"{start} was saved by {processes} process(es) with {there}, this run has "
            f"{args.world_size} with {here}"
        )
        if not {here, there} <= {"ddp", "single"}:
            verdict.exit = 1
            verdict.error = (
                f"{both}; the optimizer state does not fit. "
                f"Continue with NPROC={processes} and {there}, or {anew}"
            )
            return
        if keeps_order:
            verdict.say.append(f"{both}; continuing at the same row")
        elif args.max_steps <= 0:
            verdict.exit = 1
            verdict.error = (
                f"{both}, so an epoch has other steps. "
                f"Continue with NPROC={processes}, or give --max_steps"
            )
            return
        else:
            verdict.say.append(
                f"warning: {both}; continuing, but the order of the data differs from an "
                "uninterrupted run"
            )
    verdict.say.append(f"continuing from {start}")


def runs_code(args) -> bool:
    """Whether the engine's checkpoints are pickles that may run code when they are loaded: those of
    DeepSpeed and FSDP. All others are read as tensors only."""
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    return engine(args).startswith("zero") or bool(getattr(args, "fsdp", None)) or by_accelerate


def _check_writer(verdict: Verdict) -> None:
    """Refuse, with exit 1, a checkpoint that no run of this user wrote; say at the start of a run
    whose checkpoints nobody will know again."""
    if not verdict.start:
        problem = trust.why_no_key()
        if digests.method() == "size":
            verdict.say.append(f"warning: {UNSIGNED}")
        elif problem:
            verdict.say.append(f"warning: {problem}; to continue this run {TRUST}")
        return
    reason = checkpoint.why_foreign(verdict.start)
    if reason:
        verdict.exit = 1
        verdict.error = (
            f"{verdict.start} may be another's: {reason}. Its optimizer files are pickles, which "
            f"can run any code. If you wrote it (on another machine, in a container), {TRUST}; "
            f"else start a new run from its weights: MODEL={verdict.start} OUTPUT=<new folder>"
        )


def _clear(out: Path) -> None:
    """Remove what a run of this project left; anything else in the folder stays."""
    for old in [*checkpoint.all_checkpoints(out), out / "final", out / "runs"]:
        shutil.rmtree(old, ignore_errors=True)
    for name in (RUN_FILE, "report.json", "report.md", "loss.png", "trainer_state.json"):
        (out / name).unlink(missing_ok=True)


def read_run_file(out: str | Path) -> dict:
    """What run.json says: settings, before (the first measurement), step (when finished); {} where
    there is none."""
    file = Path(out) / RUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def past_settings(out: str | Path) -> dict:
    """Settings of the run in this folder, {} without one; what is wrong with the folder is
    open_output's to say."""
    try:
        return dict(read_run_file(out).get("settings", {}))
    except (OSError, ValueError, AttributeError):
        return {}


def write_run_file(out: str | Path, content: dict) -> None:
    """Replace run.json at once, so that a kill never leaves half of it."""
    with atomic_file(Path(out) / RUN_FILE) as part:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        # a name of a file may hold bytes of another encoding, half surrogates: JSON escapes them
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
