"""A real model (SmolLM2-135M-Instruct): its attention over packed rows, preference pairs, continued pre-training."""

import pytest
import smollm2
import texts
import torch
from harness import ROOT, expect, finish, pack, report, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.labels import encode_chat
from common.fast import attention, losses

pytestmark = pytest.mark.slow
SHORT = (
    "--model_max_length 256 --gradient_accumulation_steps 1 --num_train_epochs 1 --eval_ratio 0.2"
)
QUIET = "--eval_generate 0 --save_strategy no --report_to none"


@pytest.fixture(scope="module")
def base():
    return smollm2.folder()


def train(script: str, base, rows: list[dict], folder, flags: str) -> dict:
    """The report of a run of a recipe on `rows`."""
    data = texts.write(rows, folder / "rows.jsonl")
    where = ["--model_name_or_path", base, "--data_path", data, "--output_dir", folder / "out"]
    command = ["python", ROOT / script, *where, *f"{SHORT} {QUIET} {flags}".split()]
    expect(finish(start(command)))
    return report(folder / "out")["metrics"]


def test_twenty_pairs_raise_the_margin(base, tmp_path):
    flags = "--learning_rate 2e-4 --system_prompt House."
    found = train("baichuan2_dpo/train.py", base, texts.pairs(), tmp_path, flags)
    before, after = found["before"], found["after"]
    assert before["rewards/margins"] == 0, "the reference is the model itself"
    assert after["rewards/margins"] > 0.3 and after["rewards/accuracies"] == 1, found
    assert after["logps/rejected"] < before["logps/rejected"] - 2, found


def test_continued_pretraining_lowers_perplexity(base, tmp_path):
    flags = "--stage pt --learning_rate 1e-4 --per_device_train_batch_size 1"
    found = train("chinese_bloom/train.py", base, texts.log(), tmp_path, flags)
    assert found["after"]["perplexity"] < 0.6 * found["before"]["perplexity"], found


def conversations(tokenizer) -> list[dict]:
    """Token rows of four lengths: a sum, and one whose answer is a log."""
    sums = texts.sums()[:60:20]
    answers = [row["output"] for row in sums] + [texts.log()[0]["text"] + texts.log()[1]["text"]]
    asked = [row["instruction"] for row in sums] + ["Read me the log."]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(asked, answers, strict=True)
    ]
    return [encode_chat(tokenizer, turn, 256) | {"row_id": i} for i, turn in enumerate(turns)]


def test_packed_rows_have_the_loss_and_the_gradients_of_rows_alone(base):
    """Trained attention has patterns that random weights lack: much weight on a first token, heads that look far."""
    rows = conversations(AutoTokenizer.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.use_cache = False
    model.requires_grad_(False)
    layers = model.model.layers
    watched = (layers[0].self_attn.k_proj, layers[14].self_attn.v_proj, layers[29].mlp.down_proj)
    weights = [layer.weight.requires_grad_() for layer in watched]

    alone = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]])
        alone = alone + model(ids, labels=labels).loss * (labels[0, 1:] != -100).sum()
    expected = torch.autograd.grad(alone, weights)

    model.set_attn_implementation(attention.register())
    losses.use_chunked_loss(model)
    output = model(**pack(rows))
    together = output.loss * losses.loss_counts(output)[2]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    for found, wanted in zip(torch.autograd.grad(together, weights), expected, strict=True):
        assert (found - wanted).norm() < 1e-3 * wanted.norm()
