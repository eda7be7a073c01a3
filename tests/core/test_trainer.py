"""The trainer in this process: gradients that are not finite, weights that are not, workers that
read ahead, and ends of answers that are trained although they are padding too."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from harness import make_rows, own_modules, weights_sha
from test_labels import QWEN2, byte_level
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

from common import callbacks, collators
from common.data.spelling import IGNORE
from common.runs import engine, finite
from common.trainer import RecipeTrainer

NAN = float("nan")


def model(**more):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97}
    return Qwen3ForCausalLM(Qwen3Config(**size, **heads, **more))


def trainer(folder, rows=(), net=None, kind=RecipeTrainer, **flags):
    flags = {"report_to": [], "save_strategy": "no", "use_cpu": True, "max_steps": 3} | flags
    return kind(
        model=net or model(),
        args=TrainingArguments(output_dir=str(folder), **flags),
        train_dataset=collators.NumberedRows(list(rows) or make_rows([9] * 24)),
        data_collator=collators.PaddedCollator(0),
        processing_class=byte_level(QWEN2),
    )


# ---- gradients and weights ---------------------------------------------------------------------------------------


def steps_until_the_end(one, monkeypatch, steps) -> int:
    """How many of `steps`, (gradient norm, whether the scaler skipped it), go by."""
    monkeypatch.setattr(type(one.accelerator), "optimizer_step_was_skipped", False)
    checks = finite.FiniteSteps(one)
    at = (one.args, one.state, one.control)
    for number, (norm, skipped) in enumerate(steps):
        one.state.global_step = number
        monkeypatch.setattr(checks, "gradient_norm", lambda norm=norm: norm)
        monkeypatch.setattr(type(one.accelerator), "optimizer_step_was_skipped", skipped)
        try:
            checks.on_pre_optimizer_step(*at)
            checks.on_optimizer_step(*at)
        except SystemExit as error:
            assert error.code == 1
            return number
    return len(steps)


SOUND, SKIPPED, SATURATED = (1.0, False), (float("inf"), True), (1.0, True)
GRADIENTS = {  # fp16, steps, how many go by, what is said
    "NaN": (False, [SOUND, (NAN, False)], 1, "gave a gradient norm of nan"),
    "infinite": (False, [SOUND, (float("inf"), False)], 1, "gave a gradient norm of inf"),
    "19 skipped": (True, [SKIPPED] * 19 + [SOUND] + [SKIPPED] * 19, 39, ""),
    "20 skipped": (True, [SOUND] + [SKIPPED] * 20, 20, "overflowed fp16 for the 20th step"),
    "20 saturated": (True, [SOUND] + [SATURATED] * 30, 20, "overflowed fp16 for the 20th step"),
    "fp16, not skipped": (True, [SOUND, (NAN, False)], 1, "gave a gradient norm of nan"),
}


@pytest.mark.parametrize("fp16, steps, go_by, words", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_that_are_not_finite(tmp_path, monkeypatch, capsys, fp16, steps, go_by, words):
    """fp16 may skip nineteen steps in a row."""
    one = trainer(tmp_path)
    one.args.fp16 = fp16
    assert steps_until_the_end(one, monkeypatch, steps) == go_by
    said = capsys.readouterr().err
    assert f"step {go_by + 1}: a batch {words}" in said if words else not said


class Poisoned(RecipeTrainer):
    """The loss of the second micro-batch of step 2 is NaN."""

    def loss_of(self, *args):
        loss = super().loss_of(*args)
        is_second = len(self.micro_batches) == 1
        return loss * NAN if is_second and self.state.global_step == 1 else loss


def test_a_loss_that_is_not_finite_names_the_rows_of_its_micro_batch(tmp_path, capsys):
    """It is read with the norm of the gradients: nothing of the step has been made."""
    net = model()
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one = trainer(tmp_path, net=net, kind=Poisoned, **flags)
    with pytest.raises(SystemExit):
        one.train()
    assert all(p.isfinite().all() for p in net.parameters())
    said = capsys.readouterr().err
    assert "step 2: a batch gave a loss of nan; stopped before the optimizer step" in said
    found = json.loads((tmp_path / "nan_rows_0.json").read_text())["rows"]
    assert [row["row"] for row in found] == one.micro_batches[1][1] and len(found) == 2


def test_a_step_without_a_label_ends_the_run(tmp_path, capsys):
    rows = [{**row, "labels": [IGNORE] * 9} for row in make_rows([9] * 24)]
    with pytest.raises(SystemExit):
        trainer(tmp_path, rows).train()
    said = capsys.readouterr().err
    assert "has not a single label to train on; stopped before the optimizer step" in said


def test_a_final_model_that_is_not_finite_is_not_written(tmp_path):
    net = model()
    one = trainer(tmp_path, net=net)
    earlier = one.save_final()
    sound = weights_sha(earlier)
    net.model.norm.weight.data[3] = NAN
    with pytest.raises(SystemExit, match="model.norm.weight holds NaN or infinite numbers"):
        one.save_final()
    assert weights_sha(tmp_path / "final") == sound
    assert not (tmp_path / "final.part").exists()


# ---- workers that read ahead -------------------------------------------------------------------------------------


def test_workers_change_no_number(tmp_path):
    """Dropout draws from the same generator as the sampler does, and as each epoch's loader."""
    rows = make_rows([9, 4, 7] * 8)
    shas = set()
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        flags = {"dataloader_num_workers": workers, "max_steps": 5}
        one = trainer(folder, rows, model(attention_dropout=0.3), **flags)
        one.train()
        assert one.state.global_step == 5
        shas.add(weights_sha(one.save_final()))
    assert len(shas) == 1


def test_workers_leave_signals_to_the_process_that_trains(capfd):
    """Ctrl-C reaches them too."""
    stop = callbacks.SafeStop()
    stop.process += 1
    stop.handle(2, None)
    assert not stop.asked and not capfd.readouterr().out


# ---- locks of killed builds --------------------------------------------------------------------------------------


def test_a_stale_build_lock_is_removed_with_a_note_and_a_young_one_stays(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale = tmp_path / "py311/cpu_adam/lock"
    young = tmp_path / "py311/utils/lock"
    for lock in (stale, young):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(stale, (time.time() - 90,) * 2)
    os.utime(young, (time.time() - 30,) * 2)
    engine.remove_stale_build_locks()
    assert young.exists() and not stale.exists()
    assert capsys.readouterr().out.startswith(f"removed {stale}, left by a killed build")


# ---- pad = eos ---------------------------------------------------------------------------------------------------

SHORT = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
LONG = [*SHORT, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "是二。" * 9}]
ANSWERS = 3
ROWS = [{"messages": SHORT}, {"messages": LONG}]
WINDOW = 400


def settings(**more):
    base = {"model_max_length": WINDOW, "system_prompt": "", "packing": True, "stage": "sft"}
    return SimpleNamespace(**base | more)


def batch_of(collate, data) -> dict:
    return collate([data[i] for i in range(len(data))])


def of_qwen(tokenizer, train, packing):
    args = settings(packing=packing)
    rows = [train.encode(row, tokenizer, args, {}) for row in ROWS]
    data = train.windows(args, SimpleNamespace(seed=0), rows)
    padded = collators.PaddedCollator(tokenizer.pad_token_id)
    return batch_of(collators.PackedCollator() if packing else padded, data), ANSWERS


def of_bloom(tokenizer, train, packing):
    args = settings(packing=packing)
    rows = [train.encode(row, tokenizer, args) for row in ROWS]
    data = train.windows(args, SimpleNamespace(seed=0), rows)
    padded = collators.PaddedCollator(tokenizer.pad_token_id)
    return batch_of(collators.PackedCollator() if packing else padded, data), ANSWERS


def of_documents(tokenizer, train, packing):
    args = settings(stage="pt")
    rows = [train.encode({"text": text}, tokenizer, args) for text in ("你好吗", "1+1=2")]
    data = train.windows(args, SimpleNamespace(seed=0), rows)
    return batch_of(collators.PackedCollator(), data), 2


def of_chatglm(tokenizer, train, packing):
    args = settings(packing=packing)
    rows = [one for row in ROWS for one in train.encode(row, tokenizer, args, every_answer=False)]
    data = train.windows(args, SimpleNamespace(seed=0), rows)
    half = SimpleNamespace(bf16=True, fp16=False)
    return batch_of(train.collator(args, half, tokenizer, model().config), data), ANSWERS


def of_dpo(tokenizer, train, packing):
    pair = {"prompt": LONG[:1], "chosen": [LONG[1]], "rejected": [LONG[3]]}
    row = train.encode(pair, tokenizer, WINDOW) | {"row_id": 0}
    collate = train.PairCollator(tokenizer.pad_token_id, packing, share_prompt=False, multiple=64)
    return collate([row]), 2


RECIPES = {
    "train_qwen": ("train_qwen", of_qwen),
    "chinese_bloom": ("chinese_bloom", of_bloom),
    "chinese_bloom, documents": ("chinese_bloom", of_documents),
    "chatglm_lora": ("chatglm_lora", of_chatglm),
    "baichuan2_dpo": ("baichuan2_dpo", of_dpo),
}


def check_ends(batch: dict, ends: int, eos: int) -> None:
    labels = batch["labels"]
    assert int((labels == eos).sum()) == ends, "each answer ends with a trained eos"
    assert int((batch["input_ids"] == eos).sum()) > ends or "attention_mask" not in batch
    if "attention_mask" in batch:
        padding = batch["attention_mask"] == 0
        assert padding.any() and (labels[padding] == IGNORE).all()
        assert (batch["input_ids"][padding] == eos).all()


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_pad_token_that_is_eos_keeps_eos_trained(name, packing):
    recipe, make = RECIPES[name]
    tokenizer = byte_level(QWEN2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (train,) = own_modules(recipe, "train")
    batch, ends = make(tokenizer, train, packing)
    check_ends(batch, ends, tokenizer.eos_token_id)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora", "distill", "reason", "dpo"])
def test_a_pad_token_that_is_eos_keeps_eos_trained_in_the_stages(stage):
    tokenizer = byte_level(QWEN2)
    eos = tokenizer.eos_token_id
    module, batches = own_modules("minimind_npu", f"stages.{stage}", "loop.batches")
    rows = {"pretrain": {"text": "你好吗"}, "dpo": {"prompt": SHORT[:1]}}.get(stage, ROWS[1])
    if stage == "dpo":
        rows |= {"chosen": [SHORT[1]], "rejected": [LONG[3]]}
    found = module.encode(rows, tokenizer, WINDOW)
    found = found if isinstance(found, list) else [found]
    columns = {name: [row[name] for row in found] for name in module.COLUMNS}
    data = batches.TokenRows(int32(columns), module.COLUMNS)
    batch = batches.collate(data, [list(range(len(data)))], 1, WINDOW, eos)
    padding = batch["token_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == eos).all()
    assert (batch["labels"][padding] == IGNORE).all()
    ends = 1 if stage == "pretrain" else 2
    assert int((batch["labels"] == eos).sum()) == ends


def int32(columns: dict) -> Dataset:
    from datasets import Features, List, Value

    return Dataset.from_dict(columns, Features({name: List(Value("int32")) for name in columns}))
