"""What a training loop is for a test of faults: a run of a few steps that saves at each of them.

LOOPS: those of the Trainer recipes, of minimind_npu's pre-training under --depth and of each stage
after it, and of its quick start. All end within two or three seconds, and do the same whenever they
are started anew.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, finish, history, report, start, weights_sha

from common.runs import checkpoint

FAULTY = ROOT / "tests/support/faults/faulty_loop.py"
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}
STEPS = 6
SHORT = [
    "--max_steps", STEPS, "--save_steps", 1, "--save_total_limit", 2, "--logging_steps", 1,
    "--report_to", "none", "--eval_ratio", 0.02, "--max_eval_samples", 8, "--bf16", "false",
    "--model_max_length", 64, "--per_device_train_batch_size", 2,
]  # fmt: skip
ANSWERS = ["--eval_generate", 0]  # of those that generate
SMALL = ["--hidden_size", 32, "--num_hidden_layers", 2, "--optimizer", "adamw"]
SAMPLES = {  # of minimind_npu's stages
    "sft": "sft/sums.jsonl",
    "lora": "lora_identity.jsonl",
    "dpo": "dpo.jsonl",
    "distill": "sft/words.jsonl",
    "reason": "reason.jsonl",
}
# nanochat's network and Muon; then a mixture of two files
ROAD = {
    "depth": ("minimind_npu/data/pretrain/sums_1.jsonl", "--depth", 1, "--arch", "nanochat"),
    "mid": ("tests/support/faults/mid.yaml", "--stage", "mid"),
}
STAGES = (*ROAD, *SAMPLES)


@dataclass(frozen=True)
class Loop:
    """data: what it trains on, below the root, "" for text that it makes itself; batch: the flag
    that says how large a step is."""

    script: str
    flags: tuple
    data: str = ""
    batch: str = "--per_device_train_batch_size"

    def start(
        self, out: Path, *more, data: Path | None = None, nproc: int = 1, fault: str = ""
    ) -> subprocess.Popen:
        script = [FAULTY, ROOT / self.script, fault] if fault else [ROOT / self.script]
        launcher = [ROOT / "common/launch.py", nproc] if nproc > 1 or "--deepspeed" in more else []
        flags = [*self.flags, "--output_dir", out, *more]
        if self.data:
            flags += ["--data_path", data or ROOT / self.data]
        return start(["python", *launcher, *script, *flags], **QUIET)

    def run(self, out: Path, *more, **how) -> subprocess.CompletedProcess:
        return finish(self.start(out, *more, **how))


def of_trainer(recipe: str, data: str, *more) -> Loop:
    return Loop(f"{recipe}/train.py", (*SHORT, *ANSWERS, *more), f"{recipe}/data/{data}")


def of_stage(stage: str) -> Loop:
    flags = (*SHORT, *ANSWERS, *SMALL, "--stage", stage, "--size", "tiny")
    return Loop("minimind_npu/train.py", flags, f"minimind_npu/data/{SAMPLES[stage]}")


def of_road(stage: str) -> Loop:
    data, *flags = ROAD[stage]
    return Loop("minimind_npu/train.py", (*SHORT, *ANSWERS, *flags), data)


# of MiniMind's network, as it was before there was --depth
PRETRAIN = Loop(
    "minimind_npu/train.py", (*SHORT, *ANSWERS, *SMALL, "--size", "tiny"), ROAD["depth"][0]
)
LOOPS = {
    "train_qwen": of_trainer("train_qwen", "units.jsonl"),
    "chinese_bloom": of_trainer("chinese_bloom", "sft/extract.jsonl"),
    "chatglm_lora": of_trainer("chatglm_lora", "orders.jsonl"),
    "baichuan2_dpo": of_trainer("baichuan2_dpo", "service.jsonl"),
    "internlm_sft": of_trainer("internlm_sft", "general.jsonl"),
    "chinese_clip_ddp": Loop("chinese_clip_ddp/train.py", tuple(SHORT), "chinese_clip_ddp/data"),
    "train_llava": of_trainer("train_llava", "captions", "--train_type", "projector"),
    **{f"minimind_npu-{stage}": of_road(stage) for stage in ROAD},
    **{f"minimind_npu-{stage}": of_stage(stage) for stage in SAMPLES},
    "minimind_npu-quickstart": Loop(
        "minimind_npu/quickstart/quickstart.py",
        ("--num_samples", 100, "--epochs", STEPS, "--warmup_steps", 2, "--dtype", "fp32"),
        batch="--batch_size",
    ),
}


def outcome(out: Path) -> dict:
    """All that must be equal in a run and in the same run after faults."""
    told = report(out)
    kept = {name: told[name] for name in ("tokens", "metrics", "steps", "loss")}
    return kept | {"history": history(out), "weights": weights_sha(out / "final")}


def newest_step(out: Path) -> int:
    """Of the newest complete checkpoint; 0 where there is none."""
    newest, _ = checkpoint.last_complete(out)
    return checkpoint.step_of(newest) if newest else 0


def without_end(finished: Path, out: Path) -> Path:
    """What a run killed after its last step has left: a copy of a finished one's folder without
    its end."""
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("final", "report.*", "loss.png"))
    return out
