"""A real model (SmolLM2-135M-Instruct) under LoRA: it learns, the merged model is the adapted one, and the recipes'
generation is transformers' own."""

import pytest
import smollm2
import texts
import torch
from harness import ROOT, expect, finish, report, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.convert import adapter
from common.data.labels import encode_prompt
from common.runs.generate import generate_answers

pytestmark = pytest.mark.slow
SYSTEM = "Sums."  # else the template writes a long one into each row


@pytest.fixture(scope="module")
def base():
    return smollm2.folder()


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """One epoch of sixty sums: the output folder."""
    folder = tmp_path_factory.mktemp("lora")
    rows = texts.write(texts.sums(), folder / "sums.jsonl")
    sizes = "--model_max_length 256 --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
    learning = "--use_lora true --num_train_epochs 1 --learning_rate 1e-3 --eval_ratio 0.25"
    measuring = "--eval_generate 12 --max_new_tokens 10 --save_strategy no --report_to none"
    where = ["--model_name_or_path", base, "--data_path", rows, "--output_dir", folder / "out"]
    flags = [*where, "--system_prompt", SYSTEM, *f"{sizes} {learning} {measuring}".split()]
    expect(finish(start(["python", ROOT / "train_qwen/train.py", *flags])))
    return folder / "out"


@pytest.fixture(scope="module")
def prompts(base):
    """Token ids that answers to six sums of different lengths start from."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = texts.sums()[::15]
    turns = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    return [
        encode_prompt(tokenizer, [{"role": "system", "content": SYSTEM}, *turn], None)
        for turn in turns
    ]


def test_sixty_sums_raise_held_out_exact_answers(run):
    found = report(run)
    assert found["rows"]["used"] < 70, "most are trained on, a quarter is held out"
    before, after = found["metrics"]["before"], found["metrics"]["after"]
    assert before["exact_match"] <= 0.1, "the form is the rows' own"
    assert after["exact_match"] >= 0.75 and after["loss"] < 0.3 * before["loss"], found["metrics"]


@pytest.fixture(scope="module")
def merged(run, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    adapter.merge(str(run / "final"), str(folder), None)
    return folder


@torch.no_grad()
def test_merged_is_the_adapted_model(run, merged, base, prompts):
    from peft import PeftModel

    ids = torch.tensor([prompts[0]])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untrained = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, run / "final").eval()(ids).logits
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    moved = (adapted - untrained).norm()
    # the merged weights are rounded to the base's bf16
    assert (adapted - found).norm() < 0.2 * moved, f"{(adapted - found).norm()} of {moved}"


@torch.no_grad()
def test_batched_answers_are_those_of_transformers_one_by_one(merged, prompts):
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    model.config.use_cache = False  # as in training
    mine = generate_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=4)
    for prompt, answer in zip(prompts, mine, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        assert tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True) == answer
    assert len(set(mine)) > 1 and all("=" in answer for answer in mine)
