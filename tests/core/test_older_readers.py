"""What is written opens in transformers 4, with the same tokens, stops and logits."""

import json

import older
import torch
from harness import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    Qwen3Config,
    TrainingArguments,
)

from common import tiny
from common.convert import adapter
from common.convert.older_readers import for_older_readers, save_tokenizer
from common.trainer import RecipeTrainer

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def base_tokenizer(**more):
    """Ends texts with another token than its template ends turns with, as base models do."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = {"eos_token": names[0], "chat_template": CHATML} | more
    return tiny.make_tokenizer(["你好，世界。hello world"] * 9, 400, names, **settings)


def model_folders(folder):
    """A folder of each kind of position and attention, as the built-in models are saved."""
    tokenizer = base_tokenizer()
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    far = {"rope_type": "default", "rope_theta": 1e6}
    configs = [
        Qwen3Config(**vocabulary, **SIZE, rope_parameters=far),
        LlamaConfig(**vocabulary, **SIZE, rope_parameters=YARN | {"rope_theta": 5e5}),
        GlmConfig(**vocabulary, **SIZE, rope_parameters=far | {"partial_rotary_factor": 0.5}),
        Gemma3TextConfig(
            **vocabulary,
            **SIZE,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        BloomConfig(**vocabulary, hidden_size=32, n_layer=2, n_head=4),
    ]
    return [tiny.save_tiny(config, tokenizer, folder) for config in configs]


def trained_folder(base, folder):
    """What a run of every recipe but minimind_npu leaves."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = RecipeTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True),
        processing_class=tokenizer,
        train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 8,
    )
    return trainer.save_final(torch.float32)


def merged_folder(base, folder):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder / "a")
    save_tokenizer(AutoTokenizer.from_pretrained(base), folder / "a")
    return adapter.merge(folder / "a", folder / "merged")


def with_bos(folder):
    """A tokenizer alone, whose own call writes a token before texts, with one more special token."""
    tokenizer = base_tokenizer(bos_token="<|im_start|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    save_tokenizer(tokenizer, folder)
    return folder


def test_every_kind_of_folder_opens_in_transformers_4(tmp_path):
    models = model_folders(tmp_path / "tiny")
    trained = trained_folder(models[0], tmp_path / "run")
    models += [trained, merged_folder(models[0], tmp_path)]
    alone = [with_bos(tmp_path / "tokenizer"), ROOT / "minimind_npu/tokenizer"]
    found = older.read([*models, *alone])
    for folder, theirs in zip(models, found, strict=False):
        older.agree(folder, theirs)
    for folder, theirs in zip(alone, found[len(models) :], strict=True):
        older.agree(folder, theirs, logits=False)
    # every program stops at the end of a turn and at the end of a text
    for folder in models[-2:]:
        said = json.loads((folder / "generation_config.json").read_text())
        assert said["eos_token_id"] == [0, 2]
    assert found[len(models)]["ids"][0] == 1


def test_writing_twice_changes_nothing(tmp_path):
    folder = with_bos(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for_older_readers(folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    again = AutoTokenizer.from_pretrained(folder)
    assert "<|call|>" in again.extra_special_tokens
    assert again("你")["input_ids"] == base_tokenizer_call(folder, "你")


def base_tokenizer_call(folder, text):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
