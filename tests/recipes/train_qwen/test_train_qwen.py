"""train_qwen: what its default run learns and leaves, generation in training, merging."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from harness import ROOT, error_line, expect, finish, report, shell, start, weights

from common.runs.report import KEYS


@pytest.mark.slow
def test_default_run_learns_and_reports(tiny_run):
    """`bash train_qwen/train_zero2.sh`: trained by DeepSpeed, and it shows."""
    out, printed = tiny_run
    facts = report(out)
    assert facts.keys() >= set(KEYS)
    assert (
        facts["world_size"] >= 1 and facts["engine"] == "zero-2" and facts["recipe"] == "train_qwen"
    )
    before, after = facts["metrics"]["before"], facts["metrics"]["after"]
    assert before["exact_match"] < 0.05 and after["exact_match"] > 0.9, facts["metrics"]
    assert after["loss"] < 0.2 * before["loss"]
    assert facts["loss"]["last"] < 0.2 * facts["loss"]["first"]
    assert "| exact match |" in printed and "| held out | before | after |" in printed
    assert facts["tokens"]["total"] > facts["tokens"]["label"] > 0 and facts["peak_memory_mb"] > 100
    assert "![loss](loss.png)" in (out / "report.md").read_text()
    from PIL import Image

    assert Image.open(out / "loss.png").size[0] > 600


@pytest.mark.slow
def test_saved_model_opens_with_plain_transformers_and_answers(tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = tiny_run
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "final"),
        AutoTokenizer.from_pretrained(out / "final"),
    )
    chat = [{"role": "user", "content": "你是谁"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert "小丹" in tokenizer.decode(
        answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )


SHORT = [
    "--max_steps",
    "6",
    "--logging_steps",
    "2",
    "--eval_generate",
    "8",
    "--report_to",
    "none",
    "--save_steps",
    "6",
]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_zero3.sh", "train_lora.sh"])
def test_generation_of_the_saved_model_equals_that_of_the_model_in_training(tmp_path, script):
    """The answers in the report came from the model in training (spread over two ranks under ZeRO-3)."""
    expect(
        shell(ROOT / "train_qwen" / script, *SHORT, "--bf16", "false", OUTPUT=tmp_path, fork=True)
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.data.labels import encode_prompt
    from common.runs.generate import generate_answers

    final = tmp_path / "final"
    if script == "train_lora.sh":
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(final)
        assert all("lora_" in name for name in weights(final))
    else:
        model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    samples = report(tmp_path)["samples"]
    prompts = [encode_prompt(tokenizer, sample["messages"], sample["tools"]) for sample in samples]
    answers = [
        answer.split("</think>")[-1].strip()
        for answer in generate_answers(model, tokenizer, prompts, 48)
    ]
    assert len(samples) == 8 and answers == [sample["after"] for sample in samples]


OFFLOAD = ["--deepspeed", ROOT / "train_qwen/ds_zero3_offload.json", "--eval_generate", "0"]


@pytest.mark.slow
def test_an_optimizer_in_host_memory_learns_the_same(tmp_path):
    """With torch's AdamW there: DeepSpeed's own takes two minutes of processor time to compile."""
    settings = json.loads(OFFLOAD[1].read_text(encoding="utf-8"))
    settings["optimizer"]["params"]["torch_adam"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    host = tmp_path / "host.json"
    host.write_text(json.dumps(settings), encoding="utf-8")
    card = ROOT / "train_qwen/ds_zero3.json"
    flags = ["--max_steps", "4", "--save_strategy", "no", "--bf16", "false", "--eval_generate", "0"]
    found = {}
    for file in (card, host):
        output = tmp_path / file.stem
        more = ["--deepspeed", file, "--output_dir", output]
        launch = ["python", ROOT / "common/launch.py", 2, ROOT / "train_qwen/train.py"]
        expect(finish(start([*launch, *flags, *more])))
        found[file] = report(output)["metrics"]
    before, after = (found[host][when]["loss"] for when in ("before", "after"))
    assert after < before - 0.5
    assert abs(after - found[card]["after"]["loss"]) < 1e-3


def test_offloading_without_a_compiler_ends_in_one_line_before_the_data(tmp_path):
    """DeepSpeed would end in a traceback of ninja's, behind the loading of the model."""
    env = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": tmp_path / "ext"}
    script = ROOT / "train_qwen/train_zero3.sh"
    done = shell(script, *OFFLOAD, OUTPUT=tmp_path / "out", fork=True, **env)
    assert "It needs a C++ compiler (apt-get install g++) and ninja" in error_line(done, 1)
    assert "rows:" not in done.stdout


@pytest.mark.slow
def test_merge_checks_the_base_and_gives_equal_logits(tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    expect(
        shell(
            ROOT / "train_qwen/train_lora.sh",
            *SHORT,
            "--use_dora",
            "true",
            "--bf16",
            "false",
            OUTPUT=tmp_path / "run",
            fork=True,
        )
    )
    adapter, merged = tmp_path / "run/final", tmp_path / "merged"
    merge = [sys.executable, ROOT / "train_qwen/merge.py", "--adapter", adapter, "--output_dir"]
    done = finish(start([*merge, merged]))
    expect(done)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
        logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert torch.allclose(expected, logits, atol=1e-4)

    from common.convert import adapter as adapters

    base = Path(json.loads((adapter / adapters.BASE_FILE).read_text())["base_model"])
    other = tmp_path / "other"
    shutil.copytree(base, other)
    stranger = AutoModelForCausalLM.from_pretrained(base)
    stranger.model.layers[0].mlp.up_proj.weight.data.normal_()
    stranger.save_pretrained(other)
    line = error_line(
        finish(start([*merge, tmp_path / "m2", "--base", other])),
        1,
    )
    assert "weights" in line and str(other) in line and not (tmp_path / "m2").exists()
