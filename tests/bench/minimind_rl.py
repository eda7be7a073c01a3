"""minimind_npu's GRPO beside TRL's GRPOTrainer and a plain re-statement of MiniMind's loop: JSON lines, ratios.

    OMP_NUM_THREADS=1 python tests/bench/minimind_rl.py                 # 26M, groups of 8, at most 64 new tokens
    OMP_NUM_THREADS=1 python tests/bench/minimind_rl.py --only ours trl --steps 2 --prompts 2      # a quick look
    OMP_NUM_THREADS=1 python tests/bench/minimind_rl.py --side ours --profile                      # where it goes

The same weights (for the others as a Llama of transformers), prompts and reward for all, one update a rollout.
Prompts are 31 to 264 tokens long, half of them below 90 (more of them spread further). --case ends: each thirtieth token of the vocabulary ends an
answer, which for random weights means some 27 tokens on average; --case full: none does, all have 64; both: default.

ours          as train_rl.py runs by default here: bf16 where the CPU has it, without a reference (--kl_coef 0)
trl           GRPOTrainer with its defaults (no reference; bf16 autocast, batches of 8, gradient checkpointing)
trl_half, trl_fp32     the same without checkpointing, a step as one batch: the fastest that it has here
restated      MiniMind's train_grpo.py as it runs on a CPU: fp32, prompts two at a time, transformers' generate() with
              top_p and top_k, full logits of policy, old policy and reference
ours_kl       with a reference, as `restated`; ours_fp32, ours_kl_fp32: without half precision

Every side runs in a process of its own with one thread. answers_per_cpu_s: over whole steps, the first left out;
generation: new tokens per CPU second of the rollout alone; memory: what a side needs above its loaded weights.
"""

import argparse
import copy
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

from measured import forget_peak, memory_mb, say

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "minimind_npu")]
SIDES = ("ours", "ours_fp32", "ours_kl", "ours_kl_fp32", "trl", "trl_half", "trl_fp32", "restated")
RATIOS = (
    ("ours", "trl"),
    ("ours", "trl_half"),
    ("ours", "trl_fp32"),
    ("ours_fp32", "trl_fp32"),
    ("ours_kl", "restated"),
    ("ours_kl_fp32", "restated"),
)
CASES = ("ends", "full")
VOCABULARY = 6400  # MiniMind's; the sample tokenizer has no words for most of it
ENDS = list(range(1000, 1000 + VOCABULARY // 30))  # token ids
RATE = 1e-6


def prompts_of(tokenizer, count: int) -> list[str]:
    """Questions of the sample data one after another, cut at lengths like those of questions that people ask."""
    rows = (ROOT / "minimind_npu/data/sft/sums.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(row)["conversations"][0]["content"] for row in rows]
    rng = random.Random(0)
    found = []
    lengths = NormalDist(4.5, 0.7)  # of their logarithms
    for i in range(count):
        length = round(math.exp(lengths.inv_cdf((i + 0.5) / count)))
        ids = tokenizer("".join(rng.choices(asked, k=length)), add_special_tokens=False).input_ids
        found.append(tokenizer.decode(ids[:length]))
    return found


def reward(text: str) -> float:
    return sum(text.encode()) % 11 / 10


class Clock:
    """CPU seconds of steps and, within them, of generation."""

    def __init__(self):
        self.steps = []
        self.generation = 0.0
        self.tokens = 0

    def around(self, generate):
        def timed(*args, **settings):
            began = time.process_time()
            out = generate(*args, **settings)
            self.generation += time.process_time() - began
            return out

        return timed

    def step(self) -> None:
        self.steps.append((time.process_time(), self.generation, self.tokens))

    def told(self, answers: int) -> dict:
        """answers: of a step. The first step is left out."""
        (began, made, counted), (ended, made_all, counted_all) = self.steps[1], self.steps[-1]
        steps = len(self.steps) - 2
        return {
            "answers_per_cpu_s": steps * answers / (ended - began),
            "generated_tokens_per_cpu_s": (counted_all - counted) / max(1e-9, made_all - made),
            "tokens_of_an_answer": (counted_all - counted) / steps / answers,
            "share_of_generation": (made_all - made) / (ended - began),
        }


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(args, tokenizer, folder: str, half: bool, kl: float) -> dict:
    import torch
    import train_rl
    from model import MiniMindForCausalLM
    from rl import learner as learners
    from rl.prompts import Prompt
    from rl.rewards import Rewards
    from rl.rollout import Sampler

    from common.fast import losses, shared_start

    name = shared_start.register()
    model = MiniMindForCausalLM.from_pretrained(f"{folder}/own", attn_implementation=name)
    losses.use_chunked_loss(model)
    model.config.use_cache = False
    dtype = torch.bfloat16 if half else torch.float32
    settings = SimpleNamespace(
        algorithm="grpo", temperature=1.0, kl_coef=kl, group_size=args.group, slots=128, model_max_length=512,
        max_new_tokens=args.new, mini_batches=1, num_iterations=1, clip_low=0.2, clip_high=0.2, target_kl=0,
        no_std=False, mask_cut=False, prompts_per_step=args.prompts,
    )  # fmt: skip
    training = SimpleNamespace(
        per_device_train_batch_size=4, world_size=1, process_index=0, device=torch.device("cpu"), seed=0,
        learning_rate=RATE, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", deepspeed=None,
        bf16=half, fp16=False,
    )  # fmt: skip
    before = forget_peak()
    learner = learners.make_learner(settings, training, model, None, 0)
    learner.policy.train()
    sampler = Sampler(model, tokenizer, settings, dtype, 0)
    sampler.ends = frozenset(ENDS if args.case == "ends" else ())
    rewards = Rewards()
    rewards.parts["bytes"] = (1.0, lambda answers: [reward(one.text) for one in answers])
    clock = Clock()
    sampler.play = clock.around(sampler.play)
    asked = {}
    for place, text in enumerate(prompts_of(tokenizer, args.prompts)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        asked[place] = Prompt(place, ids, "", "", "", "bench")
    clock.step()
    for step in range(args.steps + 1):
        answers, total, seen = train_rl.roll_out(settings, training, sampler, rewards, asked, step)
        experiences = learners.make_experiences(learner, answers)
        train_rl.set_advantages(settings, training, experiences, total, None)
        train_rl.learn(learner, experiences, step)
        clock.tokens += int(seen["tokens"])
        clock.step()
    return clock.told(args.prompts * args.group) | {"memory_mb": memory_mb("VmHWM") - before}


# ---- TRL ------------------------------------------------------------------------------------------------------------


def trl(args, tokenizer, folder: str, kind: str) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/native")
    model.generation_config.eos_token_id = ENDS if args.case == "ends" else None
    tokenizer.eos_token = (
        tokenizer.convert_ids_to_tokens(ENDS[0]) if args.case == "ends" else "<|im_end|>"
    )
    answers = args.prompts * args.group
    fastest = dict(
        per_device_train_batch_size=answers, gradient_accumulation_steps=1, gradient_checkpointing=False,
        bf16=kind == "trl_half",
    )  # fmt: skip
    defaults = dict(per_device_train_batch_size=8, gradient_accumulation_steps=answers // 8)
    before = forget_peak()
    asked = prompts_of(tokenizer, args.prompts)
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", max_steps=args.steps + 1,
        num_generations=args.group, max_completion_length=args.new, learning_rate=RATE, save_strategy="no",
        **(defaults if kind == "trl" else fastest),
    )  # fmt: skip
    clock = Clock()

    def given(completions, completion_ids, **_):
        clock.tokens += sum(map(len, completion_ids))
        return [reward(text) for text in completions]

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.step()

        def on_step_end(self, *_, **__):
            clock.step()

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=given,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": asked}),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    model.generate = clock.around(model.generate)
    trainer.train()
    return clock.told(args.prompts * args.group) | {"memory_mb": memory_mb("VmHWM") - before}


# ---- MiniMind's loop, stated again ----------------------------------------------------------------------------------


def restated(args, tokenizer, folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/native")
    before = forget_peak()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    asked = prompts_of(tokenizer, args.prompts)
    tokenizer.padding_side = "left"
    clock = Clock()
    generate = clock.around(model.generate)

    ends = torch.tensor(ENDS) if args.case == "ends" else torch.tensor([-1])
    how = dict(eos_token_id=ENDS) if args.case == "ends" else dict(min_new_tokens=args.new)

    def log_probs(net, ids, mask, new):
        logits = net(ids, attention_mask=mask).logits[:, :-1]
        every = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return every[:, -new:]

    clock.step()
    for _ in range(args.steps + 1):
        for start in range(0, len(asked), 2):
            batch = tokenizer(
                asked[start : start + 2],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            with torch.no_grad():
                ids = generate(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=args.new,
                    do_sample=True, temperature=0.8, top_p=0.85, top_k=50, num_return_sequences=args.group,
                    pad_token_id=0, **how,
                )  # fmt: skip
            made = ids[:, batch.input_ids.shape[1] :]
            size = made.shape[1]
            ended = torch.isin(made, ends).int()
            own = (ended.cumsum(1) - ended == 0).long()  # up to the first end token
            mask = torch.cat([batch.attention_mask.repeat_interleave(args.group, 0), own], 1)
            clock.tokens += int(own.sum())
            with torch.no_grad():
                old = log_probs(model, ids, mask, size)
                distance = log_probs(reference, ids, mask, size)
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            given = torch.tensor([reward(text) for text in texts]).view(-1, args.group)
            gained = (given - given.mean(1, keepdim=True)) / (given.std(1, keepdim=True) + 1e-4)
            new = log_probs(model, ids, mask, size)
            ratio = (new - old).exp()
            gained = gained.view(-1, 1)
            kl = (distance - new).exp() - (distance - new) - 1
            each = -torch.min(ratio * gained, ratio.clamp(0.8, 1.2) * gained) + 0.1 * kl
            ((each * own).sum(1) / own.sum(1)).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        clock.step()
    return clock.told(args.prompts * args.group) | {"memory_mb": memory_mb("VmHWM") - before}


# ---- all of them ----------------------------------------------------------------------------------------------------


def measure(args) -> dict:
    import torch
    from transformers import AutoTokenizer

    from common import device

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(f"{args.folder}/own")
    if args.side.startswith("trl"):
        return trl(args, tokenizer, args.folder, args.side)
    if args.side == "restated":
        return restated(args, tokenizer, args.folder)
    half = not args.side.endswith("fp32") and device.half_dtype() is torch.bfloat16
    return ours(args, tokenizer, args.folder, half, 0.1 * ("kl" in args.side))


def write_models(size: str, folder: str) -> None:
    import torch
    from export import write_native
    from model import build
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "minimind_npu/tokenizer")
    model = build(size, VOCABULARY)
    model.save_pretrained(f"{folder}/own")
    tokenizer.save_pretrained(f"{folder}/own")
    write_native(model, tokenizer, f"{folder}/native")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SIDES, nargs="+", default=SIDES)
    parser.add_argument("--size", default="26m")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--cases", choices=CASES, nargs="+", default=CASES, help="how answers end")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--profile", action="store_true", help="of the only side: where its time goes"
    )
    parser.add_argument("--side", choices=SIDES, help="what a process of its own measures")
    parser.add_argument("--case", choices=CASES, help="of it")
    parser.add_argument("--folder")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if args.side:
        with profiled() if args.profile else nullcontext():
            found = measure(args)
        say(side=args.side, case=args.case, **found)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(args.size, folder)
        for case in args.cases:
            compare(args, case, folder)


def compare(args, case: str, folder: str) -> None:
    found = {}
    for side in args.only:
        own = ["--side", side, "--case", case, "--folder", folder]
        command = [sys.executable, __file__, *sys.argv[1:], *own]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side}: {done.stderr[-3000:]}")
        if args.profile:
            print(done.stdout)
        line = done.stdout.strip().splitlines()[-1]
        print(line, flush=True)
        found[side] = json.loads(line)
    for one, other in RATIOS:
        if one in found and other in found:
            names = ("answers_per_cpu_s", "generated_tokens_per_cpu_s", "memory_mb")
            ratios = {name: found[one][name] / found[other][name] for name in names}
            say(ratio=f"{one} / {other}", case=case, **ratios)


@contextmanager
def profiled():
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


if __name__ == "__main__":
    main()
