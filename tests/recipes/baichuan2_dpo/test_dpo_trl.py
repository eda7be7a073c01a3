"""baichuan2_dpo beside TRL's DPOTrainer: loss, gradients, rewards of one batch; simpo and orpo beside their formulas.

TRL computes with its own collator and loss from our token ids, in a trainer of its own. Nothing is downloaded or sent.
"""

import copy
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from common.fast import losses, shared_start

RECIPE = str(ROOT / "baichuan2_dpo")
sys.path.insert(0, RECIPE)
import preference

sys.path.remove(RECIPE)  # other recipes have files of the same names

VOCAB = 89
LENGTHS = [(9, 14, 5), (30, 3, 21), (1, 7, 7), (17, 40, 33)]  # prompt, chosen, rejected
LAYOUTS = {
    "shared": (True, True),
    "packed": (True, False),
    "padded": (False, False),
}  # packing, share_prompt


def close(ours, theirs, what="", tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(theirs), atol=tolerance, rtol=tolerance, check_dtype=False,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def make_pairs(lengths=LENGTHS):
    """Pairs of random ids in TRL's columns; the answers of the last one begin with the same tokens."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(2, VOCAB, (count,), generator=generator).tolist()
    pairs = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(draw, one), strict=True))
        for one in lengths
    ]
    pairs[-1]["rejected_ids"][:2] = pairs[-1]["chosen_ids"][:2]
    return pairs


def as_rows(pairs):
    """The same pairs as the recipe's token rows."""
    from datasets import Dataset

    return Dataset.from_list([
        {f"{side}_{name}": (pair["prompt_ids"] if name == "input_ids" else [-100] * len(pair["prompt_ids"]))
         + pair[f"{side}_ids"] for side in ("chosen", "rejected") for name in ("input_ids", "labels")}
        for pair in pairs
    ])  # fmt: skip


@pytest.fixture(scope="module")
def base():
    """A random Llama whose weights are large enough for answers of clearly different probability."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, max_position_embeddings=128, pad_token_id=0,
    ))  # fmt: skip


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def fill_adapter(model):
    """The same random adapter in every model: policy and reference differ, and A has a gradient."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return model


def gradients(model):
    found = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    assert found and all("lora_" in name for name in found)
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.fixture(scope="module")
def trl_step(base, tmp_path_factory):
    """trl_step(pairs, **settings) -> TRL's loss, gradients and metrics of one batch."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # token ids already

        def _send_telemetry(self):
            pass

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )

    def step(pairs, **settings):
        args = DPOConfig(
            str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            per_device_train_batch_size=len(pairs), **settings,
        )  # fmt: skip
        trainer = OnIds(
            copy.deepcopy(base), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
            peft_config=lora_config(),
        )  # fmt: skip
        model = fill_adapter(trainer.model).train()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        return (
            loss.item(),
            gradients(model),
            {name: value[0] for name, value in trainer._metrics["train"].items()},
        )

    return step


@pytest.fixture
def our_step(base, tmp_path, monkeypatch):
    """our_step(pairs, layout, reference, **loss) -> the recipe's, in the same form."""
    from peft import get_peft_model
    from transformers import TrainingArguments

    monkeypatch.setenv("DANPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(losses, "CPU_ROWS", 16)  # several chunks in each batch

    def prepared():
        model = copy.deepcopy(base)
        model.set_attn_implementation(shared_start.register())
        model.config.use_cache = False
        return losses.use_chunked_loss(model)

    def step(pairs, layout="shared", reference="adapter", **loss):
        model = fill_adapter(get_peft_model(prepared(), lora_config())).train()
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=3
        )
        trainer = preference.PreferenceTrainer(
            model=model, args=args, train_dataset=preference.Pairs(as_rows(pairs)), loss=loss, reference=reference,
            data_collator=preference.PairCollator(0, *LAYOUTS[layout]), load_reference=prepared,
        )  # fmt: skip
        trainer.before_measuring()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
        assert ("kv_index" in batch, "attention_mask" in batch) == (
            layout == "shared",
            layout == "padded",
        )
        assert ("reference_logprobs" in batch) == (
            reference == "precomputed" and trainer.reference is not None
        )
        batch.pop("row_ids")
        loss, sums = trainer.pair_losses(model, batch)
        loss.mean().backward()
        return loss.detach(), gradients(model), trainer.named(sums.tolist())

    return step


REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
ONE = {"pairs": 1}  # TRL's aot and sft mix the pairs of a batch; of one pair they are cDPO and RPO
CASES = {
    "sigmoid": ({"kind": "sigmoid"}, {"loss_type": "sigmoid"}),
    "sigmoid, another beta": ({"kind": "sigmoid", "beta": 0.03}, {"loss_type": "sigmoid", "beta": 0.03}),
    "ipo": ({"kind": "ipo", "beta": 0.2}, {"loss_type": "ipo", "beta": 0.2}),
    "hinge": ({"kind": "hinge"}, {"loss_type": "hinge"}),
    "robust": ({"kind": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
    "cdpo": ({"kind": "sigmoid", "label_smoothing": 0.2}, {"loss_type": "aot", "label_smoothing": 0.2} | ONE),
    "length-normalised": ({"kind": "sigmoid", "averaged": True, "beta": 2}, {"loss_type": "sigmoid_norm", "beta": 2}),
    "rpo": ({"kind": "sigmoid", "rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]} | ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name, trl_step, our_step):
    ours, theirs = CASES[name]
    theirs = dict(theirs)
    pairs = make_pairs()[-theirs.pop("pairs", len(LENGTHS)) :]
    expected, gradient, metrics = trl_step(pairs, **theirs)
    assert (
        gradient.abs().max() > 1e-3 and abs(metrics["rewards/margins"]) > 1e-2
    )  # not the start of a run, where d = 0
    for layout in LAYOUTS:
        loss, own, found = our_step(pairs, layout, **ours)
        assert len(loss) == len(pairs)
        close(loss.mean(), expected, f"{layout}: loss")
        close(own, gradient, f"{layout}: gradients")
        close(found["loss"], expected, f"{layout}: logged loss")
        # TRL's rewards are of sums in every loss; ours are of averages where the loss is
        for metric in [
            "logps/chosen",
            "logps/rejected",
            *(() if ours.get("averaged") else REWARDS),
        ]:
            close(found[metric], metrics[metric], f"{layout}: {metric}")


def test_references_equal_trl(trl_step, our_step):
    """The adapter switched off, a second model, log-probs computed once: TRL's two ways and ours."""
    pairs = make_pairs()
    expected, gradient, metrics = trl_step(pairs)
    once, same, _ = trl_step(pairs, precompute_ref_log_probs=True)
    close(once, expected, "TRL itself")
    for reference in ("adapter", "model", "precomputed"):
        for layout in LAYOUTS:
            loss, own, found = our_step(pairs, layout, reference, kind="sigmoid")
            close(loss.mean(), once, f"{reference}, {layout}: loss")
            close(own, same, f"{reference}, {layout}: gradients")
            for metric in REWARDS:
                close(found[metric], metrics[metric], f"{reference}, {layout}: {metric}")


def log_prob_means(model, pairs):
    """Mean log-prob of the tokens of each answer from full logits, one row at a time: two of [pairs]."""
    means = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side, found in means.items():
            prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append(
                torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).mean()
            )
    return torch.stack(means["chosen"]), torch.stack(means["rejected"])


FORMULAS = {
    "simpo": (
        {"kind": "simpo", "beta": 2.5, "gamma": 0.6},
        lambda a, b: -F.logsigmoid(2.5 * a - 2.5 * b - 0.6),
    ),
    "simpo, smoothed": (
        {"kind": "simpo", "label_smoothing": 0.1, "gamma": 1.0},
        lambda a, b: -0.9 * F.logsigmoid(2 * (a - b) - 1) - 0.1 * F.logsigmoid(-2 * (a - b) + 1),
    ),
    "orpo": (
        {"kind": "orpo", "beta": 0.3},
        lambda a, b: (
            -a - 0.3 * F.logsigmoid((a - b) - (torch.log1p(-a.exp()) - torch.log1p(-b.exp())))
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_formula(name, base, our_step):
    from peft import get_peft_model

    settings, formula = FORMULAS[name]
    pairs = make_pairs()
    model = fill_adapter(get_peft_model(copy.deepcopy(base), lora_config()))
    chosen, rejected = log_prob_means(model, pairs)
    expected = formula(chosen, rejected)
    expected.mean().backward()
    beta = settings.get("beta", 2.0)
    for layout in LAYOUTS:
        loss, own, found = our_step(pairs, layout, "precomputed", **settings)
        close(loss, expected.detach(), f"{layout}: loss")
        close(own, gradients(model), f"{layout}: gradients")
        close(found["rewards/chosen"], beta * chosen.mean().detach(), f"{layout}: reward")
        close(
            found["rewards/margins"],
            beta * (chosen - rejected).mean().detach(),
            f"{layout}: margin",
        )
