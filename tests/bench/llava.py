"""Training, memory and first tokens of the LLaVA recipe beside a plain re-statement of the upstream way: JSON lines,
ratios within one run.

    python tests/bench/llava.py                              # all parts; about 45 minutes of one core
    python tests/bench/llava.py --parts page                 # some of them
    python tests/bench/llava.py --parts train --only upstream_lora ours_lora --rounds 1

train: samples per CPU second of one thread. 43.9 M parameters: CLIP tower 6 x 384 (336/14, 576 tokens a picture), Qwen3 6 x
384 (vocabulary 60,000, tied); rows of about 620 tokens, 20 of them labels, two rows a step; random weights, the same for
all, stored in bf16 for ours in bf16 (frozen parts stay as they are stored).
The upstream way: the processor and the tower in every step, padding on the left, all logits through the stock loss, fp32;
LoRA by the plain names q, k, v, o, which stand in the tower too. Ours is train.py itself, with its flags; what a frozen tower
says is computed before the first step and not timed, as it is once for all epochs (ours_*_live: the tower in every step).
trl_*: TRL's SFTTrainer (pinned in requirements-dev.txt) with its chunked loss, LoRA in the language model only, as ours; it
scores labelled positions only where Triton runs and all of them on a CPU: here it is told to leave the others out too.
four: four questions a picture. Variants run in processes of their own, the rounds interleave them, the best counts.
memory: the highest resident memory of a step above that before it, four rows a step, LoRA.
page: from a question to its first token, CPU seconds, the second question about one picture; with what was kept, and without.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import forget_peak, memory_mb, say

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train_llava"
sys.path[:0] = [str(ROOT), str(RECIPE)]
PARTS = ("train", "memory", "page")
STEPS = 8  # after one that warms up
BATCH = 2
LORA = ["--train_type", "lora", "--lora_r", "16"]
FREEZE = ["--train_type", "freeze_vision"]
PROJECTOR = ["--train_type", "projector"]
BF16 = ["--bf16", "true"]
LIVE = ["--feature_cache_gb", "0"]
VARIANTS = {  # name -> flags of train.py, or None for those of others
    "upstream_lora": None,
    "upstream_freeze": None,
    "upstream_projector": None,
    "upstream_four": None,
    "trl_lora": None,
    "trl_four": None,
    "ours_lora": LORA,
    "ours_lora_live": LORA + LIVE,
    "ours_lora_bf16": LORA + BF16,
    "ours_freeze": FREEZE,
    "ours_freeze_bf16": FREEZE + BF16,
    "ours_projector": PROJECTOR,
    "ours_projector_bf16": PROJECTOR + BF16,
    "ours_four": LORA,
    "ours_four_live": LORA + LIVE,
    "ours_four_bf16": LORA + BF16,
}
BARS = {  # (variant, against): the least ratio
    ("ours_lora", "upstream_lora"): 3.0,
    ("ours_lora_bf16", "upstream_lora"): 5.0,
    ("ours_projector", "upstream_projector"): 4.0,
    ("ours_projector_bf16", "upstream_projector"): 6.0,
    ("ours_freeze", "upstream_freeze"): 2.8,
    ("ours_freeze_bf16", "upstream_freeze"): 4.0,
    ("ours_four", "upstream_four"): 8.0,
    ("ours_four_bf16", "upstream_four"): 12.0,
    ("ours_lora", "trl_lora"): 1.3,
    ("ours_four", "trl_four"): 1.3,
    ("ours_lora_live", "upstream_lora"): None,
    ("ours_four_live", "upstream_four"): None,
}


# ---- data and model ------------------------------------------------------------------------------


def words(rng: random.Random, count: int) -> str:
    return "".join(chr(0x4E00 + rng.randrange(500)) for _ in range(count))


def make_data(folder: Path, pictures: int, questions: int) -> None:
    """LLaVA rows, `questions` of them about each picture (JPEG, 640 x 480), to one.json or
    four.json."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0)
    rng = random.Random(0)
    rows = []
    for i in range(pictures):
        small = Image.fromarray(pixels.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        large = small.resize((640, 480), Image.Resampling.BICUBIC)
        large.save(folder / f"{i:03d}.jpg", quality=85)
        for _ in range(questions):
            turns = [
                {"from": "human", "value": "<image>\n" + words(rng, rng.randint(8, 16))},
                {"from": "gpt", "value": words(rng, rng.randint(16, 22))},
            ]
            rows.append({"image": f"{i:03d}.jpg", "conversations": turns})
    (folder / name_of(questions > 1)).write_text(
        json.dumps(rows, ensure_ascii=False), encoding="utf-8"
    )


def make_model(folder: Path) -> None:
    """folder/model: a LLaVA of random weights, built as any; folder/model-bf16: rounded, as models are published."""
    import build_model
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Qwen3Config

    from common import tiny

    rng = random.Random(1)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = tiny.make_tokenizer(
        [chr(0x4E00 + i) for i in range(500)] + [words(rng, 30) for _ in range(50)],
        vocab_size=1200,
        special_tokens=special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(RECIPE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    size = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6)
    kinds = dict(vocab_size=60_000, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)
    text = Qwen3Config(**size, **kinds, intermediate_size=1024)
    llm = tiny.save_tiny(text, tokenizer, folder / "parts")
    sight = CLIPVisionConfig(**size, intermediate_size=1536, image_size=336, patch_size=14)
    side = {"height": 336, "width": 336}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
    tower = tiny.save_tiny(sight, processor, folder / "parts", model_class=CLIPVisionModel)
    build_model.build(llm, tower, folder / "model")
    build_model.build(llm, tower, folder / "model-bf16", dtype=torch.bfloat16)


# ---- the upstream way ----------------------------------------------------------------------------


def upstream(folder: Path, what: str, batch: int) -> dict:
    """Its step, re-stated. what: lora, freeze (the tower stands still), projector or four (lora)."""
    import model as llava
    import torch
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "model", backend="pil")
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    if what in ("lora", "four"):
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        settings = {"target_modules": names, "modules_to_save": ["multi_modal_projector"]}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, **settings))
    else:
        for name, parameter in model.named_parameters():
            is_projector = "multi_modal_projector" in name
            moves = is_projector if what == "projector" else "vision_tower" not in name
            parameter.requires_grad_(moves)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    image_tokens = llava.tokens_per_picture(processor)
    rows = json.loads((folder / name_of(what == "four")).read_text(encoding="utf-8"))

    def step(rows) -> None:
        texts, prompts, pictures = [], [], []
        for row in rows:
            question, answer = (turn["value"] for turn in row["conversations"])
            asked = [{"role": "user", "content": question}]
            prompts.append(processor.apply_chat_template(asked, add_generation_prompt=True))
            texts.append(prompts[-1] + answer + "<|im_end|>\n")
            pictures.append(Image.open(folder / row["image"]).convert("RGB"))
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        labels = torch.full_like(inputs["input_ids"], -100)
        for i, prompt in enumerate(prompts):
            own = inputs["attention_mask"][i].bool()
            asked = len(processor.tokenizer(prompt)["input_ids"]) - 1 + image_tokens
            kept = inputs["input_ids"][i, own].clone()
            kept[:asked] = -100
            labels[i, own] = kept
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    base = forget_peak()
    marks = []
    for number in range(STEPS + 1):
        step([rows[(number * batch + i) % len(rows)] for i in range(batch)])
        marks.append(time.process_time())
    peak = memory_mb("VmHWM") - base
    return {"samples": batch * STEPS, "cpu_s": marks[-1] - marks[0], "peak_mb": peak}


# ---- TRL -----------------------------------------------------------------------------------------


def by_trl(folder: Path, four: bool, batch: int) -> dict:
    """Its SFT on prompts and completions; the tower runs in every step, rows are padded."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import utils

    utils._use_triton = lambda device: True  # asked there only for this choice
    rows = []
    for row in json.loads((folder / name_of(four)).read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in row["conversations"])
        asked = [{"role": "user", "content": question.removeprefix("<image>\n")}]
        said = [{"role": "assistant", "content": answer}]
        shown = [str(folder / row["image"])]
        rows.append({"prompt": asked, "completion": said, "images": shown})
    data = datasets.Dataset.from_list(rows)
    data = data.cast_column("images", datasets.List(datasets.Image()))
    output = folder / f"output-{os.getpid()}"
    training = SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=batch,
        max_steps=STEPS + 1,
        learning_rate=1e-4,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
    )
    marks = []
    found = {}

    class Meter(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            found["base"] = forget_peak()

        def on_step_end(self, args, state, control, **kwargs):
            marks.append(time.process_time())
            found["peak_mb"] = memory_mb("VmHWM") - found["base"]

    names = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32),
        args=training,
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(folder / "model", backend="pil"),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            target_modules=names,
            modules_to_save=["multi_modal_projector"],
        ),
        callbacks=[Meter],
    )
    trainer.train()
    shutil.rmtree(output, ignore_errors=True)
    samples = batch * (len(marks) - 1)
    return {"samples": samples, "cpu_s": marks[-1] - marks[0], "peak_mb": found["peak_mb"]}


def name_of(four: bool) -> str:
    return "four.json" if four else "one.json"


# ---- ours ----------------------------------------------------------------------------------------


def ours(folder: Path, flags: list[str], four: bool, batch: int) -> dict:
    """train.py with these flags; the steps after the first are timed."""
    import transformers
    from transformers.trainer import DEFAULT_CALLBACKS

    marks = []
    found = {}

    class Meter(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            found["windows"] = len(train_dataloader.dataset)
            found["base"] = forget_peak()

        def on_step_end(self, args, state, control, **kwargs):
            marks.append(time.process_time())
            found["peak_mb"] = memory_mb("VmHWM") - found["base"]

    DEFAULT_CALLBACKS.append(Meter)
    data = folder / name_of(four)
    window = 1600 if four else 640 * batch
    output = folder / f"output-{os.getpid()}"
    settings = {
        "model_name_or_path": folder / ("model-bf16" if "--bf16" in flags else "model"),
        "data_path": data,
        "output_dir": output,
        "model_max_length": window,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS + 1,
        "learning_rate": 1e-4,
        "eval_ratio": 0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
    }
    if "--bf16" not in flags:
        settings["bf16"] = "false"
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    sys.argv = [str(RECIPE / "train.py"), *argv, *flags]
    import train

    try:
        train.main()
    finally:
        shutil.rmtree(output, ignore_errors=True)
    rows = len(json.loads(data.read_text(encoding="utf-8")))
    samples = rows / found["windows"] * (len(marks) - 1)
    return {"samples": samples, "cpu_s": marks[-1] - marks[0], "peak_mb": found["peak_mb"]}


def child(args) -> None:
    """One variant in this process."""
    import torch

    torch.set_num_threads(1)
    folder = Path(args.folder)
    flags = VARIANTS[args.variant]
    whose, what = args.variant.split("_")[:2]
    if whose == "trl":
        found = by_trl(folder, what == "four", args.batch)
    elif whose == "upstream":
        found = upstream(folder, what, args.batch)
    else:
        found = ours(folder, flags, what == "four", args.batch)
    speed = found["samples"] / found["cpu_s"]
    say(variant=args.variant, samples_per_cpu_s=speed, peak_mb=found["peak_mb"])


def run(folder: str, variant: str, batch: int) -> dict:
    """-> {"samples_per_cpu_s", "peak_mb"}, {} where it failed."""
    command = [sys.executable, __file__, "--variant", variant, "--folder", folder]
    command += ["--batch", str(batch)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DANPU_CACHE": f"{folder}/cache"}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    if done.returncode:
        say(variant=variant, failed=(done.stderr.strip() or done.stdout.strip())[-600:])
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


def train_part(args, folder: str) -> None:
    found: dict[str, float] = {}
    for number in range(args.rounds):
        for variant in args.only:
            speed = run(folder, variant, BATCH).get("samples_per_cpu_s")
            if speed is not None:
                print(f"round {number}: {variant} {speed:.3g}", file=sys.stderr, flush=True)
                found[variant] = max(speed, found.get(variant, 0.0))
    for variant, speed in found.items():
        say(part="train", variant=variant, samples_per_cpu_s=speed)
    for (variant, against), bar in BARS.items():
        if variant in found and against in found:
            ratio = found[variant] / found[against]
            say(part="train", variant=variant, against=against, times=ratio, bar=bar)


def memory_part(args, folder: str) -> None:
    peaks = {name: run(folder, name, 4).get("peak_mb") for name in ("upstream_lora", "ours_lora")}
    if all(peaks.values()):
        ratio = peaks["ours_lora"] / peaks["upstream_lora"]
        say(part="memory", **peaks, ratio=ratio, bar=0.3)


# ---- the page ------------------------------------------------------------------------------------


def page_part(args, folder: str) -> None:
    """First token of a second question about a picture."""
    import torch
    from talk import LlavaChatModel, Seen, user_turn

    torch.set_num_threads(1)
    chat_model = LlavaChatModel(str(Path(folder) / "model"))
    rng = random.Random(2)
    seen = Seen.of(str(Path(folder) / "000.jpg"), chat_model.image_processor)
    first = [user_turn(words(rng, 12), [seen])]
    answer, _ = list(chat_model.stream(first, max_new_tokens=16))[-1]
    second = [*first, {"role": "assistant", "content": answer}, user_turn(words(rng, 12), [])]
    kept = list(chat_model.beginnings.kept)

    def first_token(keeps: bool) -> float:
        """CPU seconds."""
        chat_model.beginnings.kept = list(kept) if keeps else []
        chat_model.features.clear()
        prompt = chat_model.prompt(second, 16)
        start = time.process_time()

        def heard(tokens, *_, **__):
            return tokens.new_full((1,), 1).bool()

        with chat_model.turn():
            chat_model._generate(prompt, 16, heard)
        return time.process_time() - start

    ways = {keeps: min(first_token(keeps) for _ in range(5)) for keeps in (True, False)}
    say(
        part="page",
        kept_ms=1000 * ways[True],
        anew_ms=1000 * ways[False],
        times=ways[False] / ways[True],
        bar=3.0,
        tokens=len(chat_model.prompt(second, 16)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        child(args)
        return
    with tempfile.TemporaryDirectory() as name:
        os.environ["DANPU_CACHE"] = f"{name}/cache"
        make_data(Path(name), 8 * (STEPS + 1), 1)
        make_data(Path(name), 2 * (STEPS + 1), 4)
        make_model(Path(name))
        for part in args.parts:
            globals()[f"{part}_part"](args, name)


if __name__ == "__main__":
    main()
