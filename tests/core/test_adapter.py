"""Adapters: a merged model answers like the base with its adapter, also where one weight has two uses."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from common import tiny
from common.convert import adapter

VOCAB = 300


def base_model(folder, name="Qwen2"):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, tie_word_embeddings=True, **sizes, **tokens
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = tiny.make_tokenizer(["ab"], VOCAB, ["<e>"], eos_token="<e>")
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_adapter(base, folder, **settings):
    """An adapter as if it were trained; the logits of the base with it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p += 0.5 * torch.randn_like(p)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    adapter.remember_base(folder, base)
    return folder


def logits(model):
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


ENDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "table": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [41, 42]},
}


@pytest.mark.parametrize("settings", ENDS.values(), ids=ENDS)
def test_a_merged_adapter_on_a_tied_embedding_or_head_gives_its_logits(tmp_path, settings):
    base = base_model(tmp_path / "base")
    folder = train_adapter(base, tmp_path / "adapter", **settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    wanted = logits(PeftModel.from_pretrained(plain, folder))
    out = adapter.merge(folder, tmp_path / "merged")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, ends", [("Bloom", "word_embeddings"), ("GPT2", "wte")])
def test_other_names_of_the_tied_weight(tmp_path, name, ends):
    base = base_model(tmp_path / "base", name)
    folder = train_adapter(base, tmp_path / "adapter", target_modules=[ends, "lm_head"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    wanted = logits(PeftModel.from_pretrained(plain, folder))
    out = adapter.merge(folder, tmp_path / "merged")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_the_adapter_leaves_alone_stays_tied(tmp_path):
    base = base_model(tmp_path / "base")
    folder = train_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    merged = adapter.merge(folder, tmp_path / "merged")
    config = transformers.AutoConfig.from_pretrained(merged)
    assert config.tie_word_embeddings
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "merged")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("names, told", [("q_proj,lm_head", 1), ("embed_tokens", 1), ("q_proj", 0)])
def test_training_says_that_one_weight_becomes_two(tmp_path, capsys, names, told):
    tied = transformers.AutoModelForCausalLM.from_pretrained(base_model(tmp_path))
    adapter.linear_layers(tied, names)
    assert capsys.readouterr().out.count("are one weight") == told
