"""DPO throughput and memory of this project beside TRL's DPOTrainer: JSON lines, ratios within one run.

    python tests/bench/dpo.py                                        # all variants, fp32 and the device's best dtype
    python tests/bench/dpo.py --only ours trl_precompute --dtypes float32 --rounds 1
    python tests/bench/dpo.py --batch 1                              # forward batches of 1 pair, 8 to a step as before:
                                                                     # the best that TRL's padding can do on a CPU
    python tests/bench/dpo.py --vocab 16000 --hidden 512 --prompts 4 # layers outweigh the head as in a large model, and
                                                                     # prompts have several rounds: sharing them pays
    python tests/bench/dpo.py --profile --only ours                  # torch's profile of each variant instead

TRL is pinned in requirements-dev.txt. One random Qwen2 of 152k tokens with LoRA on all linear layers, pairs as long as
Chinese preference data, the same for all; no gradient checkpointing, a frozen base in the half dtype on both sides.

    ours              train.py's defaults: packed, a pair's prompt once, the reference's log-probs computed beforehand
    ours_unshared     --share_prompt false        ours_adapter   --reference adapter (switched off in each step)
    trl               its defaults: padded, the reference in each step (adapter off)
    trl_precompute    precompute_ref_log_probs    trl_padding_free   padding_free
    trl_labels        trl_precompute that scores labelled positions only, which TRL does where Triton runs, not on a CPU

times_trl and memory_of_trl compare with the best of TRL as it is (trl_labels is patched, so it has ratios of its own).
pairs/s are of training steps after the first; pass_* are of the pass over the pairs that comes before them. The `same`
line tells that both compute the same: loss and gradients of one batch, and how far each is from fp32 on the same
weights. Every variant runs in a process of its own; the best round counts. On a CPU, pairs per CPU second stay
comparable when others use the machine; a round takes half an hour on a free core, nearly all of it TRL's. On a CPU
TRL's head runs in plain torch; how the two compare on an accelerator, where it has a Triton kernel, this does not tell.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BORN = time.time()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "baichuan2_dpo"), str(Path(__file__).parent)]
import sft
from sft import WINDOW

OURS = {
    "ours": (True, "precomputed"),
    "ours_unshared": (False, "precomputed"),
    "ours_adapter": (True, "adapter"),
}
TRL = ("trl", "trl_precompute", "trl_padding_free", "trl_labels")
VARIANTS = ("same", *OURS, *TRL)
STEP = 8  # pairs of an optimizer step


# ---- pairs ----------------------------------------------------------------------------------------------------------


def lengths_like_preferences(
    count: int, rng: random.Random, times: float
) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) tokens per pair; a rejected answer has 0.9 times the chosen one's in the median."""
    found = []
    for prompt, answer in sft.lengths_like_chinese_data(count, rng):
        prompt = min(WINDOW // 2, round(prompt * times))
        rejected = max(8, round(answer * rng.lognormvariate(-0.1, 0.5)))
        found.append((prompt, min(answer, WINDOW - prompt), min(rejected, WINDOW - prompt)))
    return found


def fill(lengths: list[tuple[int, int, int]], batch: int) -> float:
    """Share of real tokens when the answers of `batch` pairs are padded to the longest."""
    totals = [(prompt + a, prompt + b) for prompt, a, b in lengths]
    batches = [sum(totals[i : i + batch], ()) for i in range(0, len(totals), batch)]
    return sum(map(sum, totals)) / sum(max(one) * len(one) for one in batches)


def make_pairs(count: int, args) -> list[dict]:
    """Pairs of ids whose padding is that of a long run; the first one fills the window, as some pair soon does."""
    rng = random.Random(args.round)
    draw = lambda n: lengths_like_preferences(n, rng, args.prompts)
    usual = fill(draw(20_000), args.batch)
    draws = [[(40, WINDOW - 40, WINDOW - 200), *draw(count - 1)] for _ in range(200)]
    lengths = min(
        draws, key=lambda one: abs(fill(one[STEP:], args.batch) - usual)
    )  # after the warm-up step
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = lambda n: [rng.randrange(10, args.vocab) for _ in range(n)]
    return [dict(zip(names, map(ids, one), strict=True)) for one in lengths]


def as_rows(pairs: list[dict]) -> list[dict]:
    """TRL's columns -> the recipe's."""
    rows = []
    for pair in pairs:
        prompt, row = pair["prompt_ids"], {}
        for side in ("chosen", "rejected"):
            row[f"{side}_input_ids"] = prompt + pair[f"{side}_ids"]
            row[f"{side}_labels"] = [-100] * len(prompt) + pair[f"{side}_ids"]
        rows.append(row)
    return rows


# ---- both sides -----------------------------------------------------------------------------------------------------


def load_model(args, ours: bool):
    """The same random weights on both sides."""
    import torch

    torch.manual_seed(0)
    model = sft.fresh_model(args).to(getattr(torch, args.dtype))
    if ours:
        from common.fast import losses, shared_start

        model.set_attn_implementation(shared_start.register())
        model.config.use_cache = False
        losses.use_chunked_loss(model)
    return model


def shared_settings(args) -> dict:
    return {"bf16": args.dtype == "bfloat16", "fp16": args.dtype == "float16"} | {
        "output_dir": args.output, "max_steps": args.steps, "gradient_accumulation_steps": STEP // args.batch,
        "learning_rate": 1e-4, "per_device_train_batch_size": args.batch, "per_device_eval_batch_size": args.batch,
        "seed": 0, "save_strategy": "no", "report_to": [], "logging_steps": 1, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip


def our_trainer(args, pairs: list[dict], meter, share: bool, reference: str):
    import train
    from datasets import Dataset
    from preference import PairCollator, Pairs, PreferenceTrainer
    from transformers import TrainingArguments, set_seed

    from common import device

    model = meter.loaded(load_model(args, ours=True))
    training = TrainingArguments(
        **device.training_defaults({"bf16", "fp16"}) | shared_settings(args)
    )
    multiple = device.length_multiple(device.train_dtype(training))
    set_seed(0)  # as TRL does: both adapters begin with the same numbers
    trainer = PreferenceTrainer(
        model=train.add_lora(model, train.Args(lora_r=16, lora_alpha=32), training), args=training,
        train_dataset=Pairs(Dataset.from_list(as_rows(pairs))),
        data_collator=PairCollator(0, share_prompt=share, multiple=multiple),
        loss={"kind": "sigmoid"}, reference=reference, load_reference=None, callbacks=[meter.callback()],
    )  # fmt: skip
    trainer.precompute = meter.watch_pass(trainer.precompute)
    return trainer


def trl_trainer(args, pairs: list[dict], meter, variant: str):
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from common import device

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # token ids already

        def _precompute_ref_logps(self, *args):
            return meter.watch_pass(super()._precompute_ref_logps)(*args)

        def _send_telemetry(self):
            pass

    if variant == "trl_labels":
        trl.trainer.utils._use_triton = lambda device: True  # asked there only for this choice
    training = DPOConfig(
        **shared_settings(args), use_cpu=device.kind() == "cpu", gradient_checkpointing=False, max_length=WINDOW,
        padding_free=variant == "trl_padding_free",
        precompute_ref_log_probs=variant in ("trl_precompute", "trl_labels"),
    )  # fmt: skip
    trainer = OnIds(
        meter.loaded(load_model(args, ours=False)), args=training, train_dataset=Dataset.from_list(pairs),
        processing_class=sft.toy_tokenizer(), peft_config=sft.lora_config(), callbacks=[meter.callback()],
    )  # fmt: skip
    if training.padding_free and not trainer.padding_free:
        raise SystemExit(
            f"TRL {trl.__version__} switches padding_free off: unavailable since a refactor, it warns"
        )
    return trainer


class Meter:
    """Times of the steps, the cost of the pass over the reference, peak memory above the loaded model."""

    def __init__(self, pairs: int):
        self.pairs, self.marks, self.columns, self.found = pairs, [], [], {}

    def loaded(self, model):
        self.forget_peak()
        self.start = sft.memory_mb("VmRSS")
        return model

    @staticmethod
    def forget_peak():
        Path("/proc/self/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        return sft.memory_mb("VmHWM") - self.start

    def watch_pass(self, compute):
        def run(*args):
            self.forget_peak()
            start = time.process_time()
            result = compute(*args)
            rate = self.pairs / (time.process_time() - start)
            self.found = {"pass_pairs_per_cpu_s": rate, "pass_memory_mb": self.peak_mb()}
            self.forget_peak()
            return result

        return run

    def watch(self, collator):
        """Keeps how many columns each batch makes the model compute."""

        def counting(rows):
            batch = collator(rows)
            self.columns.append(batch["input_ids"].numel())
            return batch

        return counting

    def callback(self):
        from transformers import TrainerCallback

        marks = self.marks

        class Marks(TrainerCallback):
            def on_step_end(self, training, state, control, **kwargs):
                marks.append((time.process_time(), time.time()))

        return Marks()


# ---- one variant in a process ---------------------------------------------------------------------------------------


def train_child(args) -> dict | None:
    import torch

    pairs = make_pairs(STEP * args.steps, args)
    meter, peak = Meter(len(pairs)), sft.matmul_peak(getattr(torch, args.dtype))
    if args.variant in OURS:
        trainer = our_trainer(args, pairs, meter, *OURS[args.variant])
    else:
        trainer = trl_trainer(args, pairs, meter, args.variant)
    trainer.data_collator = meter.watch(trainer.data_collator)
    if args.profile:
        return sft.profile(trainer)
    trainer.train()
    memory = meter.peak_mb()
    (cpu0, wall0), (cpu1, wall1) = meter.marks[0], meter.marks[-1]
    timed, batches = pairs[STEP:], STEP // args.batch
    tokens = sum(
        2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in timed
    )
    columns = sum(meter.columns[-batches * args.steps :][batches:])
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "pairs_per_cpu_s": len(timed) / (cpu1 - cpu0), "pairs_per_s": len(timed) / (wall1 - wall0),
        "tokens_per_cpu_s": tokens / (cpu1 - cpu0), "memory_mb": memory, **meter.found, "pairs": len(timed),
        "tokens_a_pair": tokens / len(timed), "columns_a_pair": columns / len(timed), "first_step_s": wall0 - BORN,
        "matmul_gflops": max(peak, sft.matmul_peak(getattr(torch, args.dtype))) / 1e9, "losses": log,
    }  # fmt: skip


def same_child(args) -> dict:
    """Loss and adapter gradients of one batch on both sides, and in fp32 on weights rounded in the same way."""
    found = {side: loss_and_gradient(args, side, args.dtype) for side in ("trl", "ours")}
    line = {f"loss_{side}": loss for side, (loss, _) in found.items()}
    line["gradient_apart"] = apart(found["ours"][1], found["trl"][1])
    if args.dtype != "float32":
        exact, gradient = loss_and_gradient(args, "ours", "float32")
        line["loss_float32"] = exact
        line |= {f"{side}_from_float32": apart(found[side][1], gradient) for side in found}
    return line


def apart(one: dict, other: dict) -> float:
    """Norm of the difference over the norm."""
    import torch

    assert one.keys() == other.keys()
    a, b = (
        torch.cat([grads[name].flatten().float() for name in sorted(one)]) for grads in (one, other)
    )
    return ((a - b).norm() / b.norm()).item()


def loss_and_gradient(args, side: str, dtype: str) -> tuple[float, dict]:
    """Computed in `dtype`, on weights that args.dtype can hold."""
    import torch

    pairs = make_pairs(2 * STEP, args)[
        -args.batch :
    ]  # a usual batch, not the one that fills the window
    build, how = (trl_trainer, ["trl"]) if side == "trl" else (our_trainer, OURS["ours_adapter"])
    trainer = build(
        argparse.Namespace(**vars(args) | {"dtype": dtype}), pairs, Meter(len(pairs)), *how
    )
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:  # B starts at 0: A would have no gradient, and d would be 0
            torch.nn.init.normal_(
                weight, std=0.02, generator=torch.Generator().manual_seed(len(name))
            )
        else:
            weight.data = weight.data.to(getattr(torch, args.dtype)).to(weight.dtype)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.item(), {
        name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def child(args) -> None:
    import torch

    import common.device
    from common import cli

    cli.say = lambda text: None
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    found = same_child(args) if args.variant == "same" else train_child(args)
    if found:
        print(
            json.dumps(
                {"variant": args.variant, "dtype": args.dtype, "device": common.device.kind()}
                | found
            )
        )


# ---- running all of it ----------------------------------------------------------------------------------------------

SIZES = {"vocab": 151936, "hidden": 256, "intermediate": 704, "layers": 12, "steps": 3, "batch": 4}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def run_child(args, variant: str, dtype: str, number: int) -> dict | None:
    with tempfile.TemporaryDirectory() as output:
        env = {"OMP_NUM_THREADS": "1"} | os.environ | QUIET | {"DANPU_CACHE": f"{output}/cache"}
        flags = [f"--{name}={getattr(args, name)}" for name in (*SIZES, "prompts")]
        flags += ["--variant", variant, "--dtype", dtype, "--output", output, f"--round={number}"]
        flags += ["--profile"] if args.profile else []
        run = subprocess.run(
            [sys.executable, __file__, *flags], env=env, text=True, capture_output=True
        )
    if run.returncode:
        print(
            json.dumps(
                {
                    "variant": variant,
                    "dtype": dtype,
                    "failed": run.stderr.strip().splitlines()[-1][-400:],
                }
            ),
            flush=True,
        )
    elif args.profile:
        print(variant, dtype, run.stdout, sep="\n")
    return (
        None if run.returncode or args.profile else json.loads(run.stdout.strip().splitlines()[-1])
    )


def report(results: dict) -> None:
    """One line per variant and dtype, best round; ours with its ratios to TRL of the same dtype."""
    done = {key: sft.best_of(found) for key, found in results.items() if found and key[0] != "same"}
    for (variant, dtype), line in done.items():
        for name, rivals in {"trl": TRL[:3], "trl_labels": TRL[3:]}.items():
            found = [done[rival, dtype] for rival in rivals if (rival, dtype) in done]
            if found and variant in OURS:
                line[f"times_{name}"] = line["pairs_per_cpu_s"] / max(
                    r["pairs_per_cpu_s"] for r in found
                )
                line[f"memory_of_{name}"] = line["memory_mb"] / min(r["memory_mb"] for r in found)
    for line in [found[0] for key, found in results.items() if found and key[0] == "same"] + list(
        done.values()
    ):
        print(json.dumps({k: tidy(v) for k, v in line.items()}), flush=True)


def tidy(value):
    return (
        round(value, 5)
        if isinstance(value, float)
        else list(map(tidy, value))
        if isinstance(value, list)
        else value
    )


def main():
    from common import device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument(
        "--dtypes", nargs="*", default=None, help="default: float32 and the device's best"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--prompts", type=float, default=1, help="prompts are so many times as long as in SFT data"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print torch's profile of each variant instead"
    )
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("variant", "dtype", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.arch = "qwen"
    if args.variant:
        return child(args)
    best = str(device.half_dtype() or "torch.float32").removeprefix("torch.")
    dtypes, variants = args.dtypes or list(dict.fromkeys(["float32", best])), list(args.only)
    if importlib.util.find_spec("trl") is None:
        print(
            json.dumps(
                {"skipped": "trl", "reason": "not installed: pip install --no-deps trl==1.16.0"}
            )
        )
        variants = [variant for variant in variants if variant in OURS]
    results: dict = {(variant, dtype): [] for dtype in dtypes for variant in variants}
    for number in range(args.rounds):
        for (variant, dtype), lines in results.items():
            if variant == "same" and number:
                continue
            line = run_child(args, variant, dtype, number)
            lines += [line] if line else []
            print(json.dumps({"round": number} | (line or {})), file=sys.stderr, flush=True)
    report(results)


if __name__ == "__main__":
    main()
