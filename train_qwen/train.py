"""SFT of Qwen1.5 / Qwen2 / Qwen2.5 / Qwen3 (dense and MoE): full, LoRA (DoRA, rsLoRA), 4-bit QLoRA,
frozen layers.

    bash train_qwen/train_zero2.sh                                                    # built-in tiny model, sample data
    MODEL=Qwen/Qwen3-8B DATA=my.jsonl OUTPUT=out bash train_qwen/train_zero2.sh --use_lora true
    the same command again                                                            # continues after a crash

Data: chat rows of any common shape (README, "Data"), e.g. {"instruction": str, "input": str,
"output": str} per line. Order of the story: arguments -> model and tokenizer -> data -> trainer ->
train -> measure -> save -> report.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for common/
from common import cli, device  # device before torch and transformers


import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    TrainingArguments,
    set_seed,
)

from common import collators, tiny
from common.convert import adapter
from common.fast import attention, losses
from common.data.labels import encode_chat, encode_prompt, fingerprint, preview, set_template
from common.data.cache import cache_root
from common.data.load import load_rows, summary
from common.data.tokens import tokenise_split
from common.data.split import leak_check, split_rows
from common.runs.generate import answer_eval_rows, pick_eval_rows
from common.runs.run_folder import open_output
from common.trainer import RecipeTrainer


# 1. Arguments: what this recipe decides; everything else is transformers.TrainingArguments.
@dataclass
class Args:
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "folder or hub id; 'tiny' builds a small one"}
    )
    data_path: str = field(
        default=str(HERE / "data"),
        metadata={"help": "files or folders, with weights: 'a.jsonl:0.7 b.csv:0.3'"},
    )
    column_map: str = field(
        default="", metadata={"help": "rename columns: 'instruction=question,output=reply'"}
    )
    strict_data: bool = field(
        default=False,
        metadata={"help": "a bad row is an error instead of being counted and left out"},
    )
    eval_ratio: float = field(
        default=0.05,
        metadata={"help": "share of prompts held out; the split never parts duplicates"},
    )
    max_eval_samples: int = field(default=500, metadata={"help": "upper bound of held-out rows"})
    leak_check: str = field(
        default="",
        metadata={"help": "a test file whose prompts must not be trained on; leaks are left out"},
    )
    model_max_length: int = field(
        default=2048, metadata={"help": "window in tokens; longer rows are shortened and counted"}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "fill each window with several rows that cannot see each other"},
    )
    system_prompt: str = field(default="", metadata={"help": "system turn for rows that have none"})
    chat_template: str = field(
        default="", metadata={"help": "a jinja file, for tokenizers that have none"}
    )
    enable_thinking: bool | None = field(
        default=None, metadata={"help": "passed to the chat template (Qwen3); unset: its default"}
    )
    use_lora: bool = field(
        default=False, metadata={"help": "train an adapter instead of all weights"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale; unset: 2 * lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str = field(
        default="all-linear",
        metadata={"help": "comma separated names; all-linear spares the output head"},
    )
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: frozen base in 4-bit NF4 (CUDA and bitsandbytes)"}
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "keep the first N decoder layers and the embeddings fixed"}
    )
    eval_generate: int = field(
        default=64, metadata={"help": "held-out questions answered before and after; 0: none"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "length limit of those answers"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left in --output_dir"}
    )


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=3,
    learning_rate=1e-5,
    weight_decay=0.0,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=4,
    logging_steps=5,
    logging_first_step=True,
    save_steps=200,
    save_total_limit=2,
    report_to=["tensorboard"],
    ddp_find_unused_parameters=False,
    ddp_timeout=7200,
)
LORA_LEARNING_RATE = 2e-4  # an adapter wants about ten times the rate of full fine-tuning
TINY = dict(  # sizes and steps only
    model_max_length=256,
    num_train_epochs=20,
    learning_rate=3e-3,
    adam_beta2=0.98,
    weight_decay=0.1,
    warmup_steps=0.1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    logging_steps=40,
    save_steps=400,
    eval_ratio=0.1,
    eval_generate=100,
    max_new_tokens=64,
)


def tiny_model(texts: list[str]) -> str:
    """Folder of the embedded default: Qwen3's architecture at toy size, its tokenizer trained on
    the data at hand."""
    tags = ("think", "tool_call", "tool_response")
    tokenizer = tiny.make_tokenizer(
        texts,
        vocab_size=4000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        plain_tokens=[f"<{end}{tag}>" for tag in tags for end in ("", "/")],
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        initializer_range=0.05,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return tiny.save_tiny(config, tokenizer, cache_root() / "tiny")


# 2. Model and tokenizer
def load_tokenizer(args: Args, path: str):
    tokenizer = cli.load(AutoTokenizer, path)
    if args.chat_template:
        set_template(tokenizer, args.chat_template)
    return tokenizer


def load_model(args: Args, training: TrainingArguments, path: str):
    """The model in the dtype it trains in: float32 masters for full training, the half dtype for a
    frozen base."""
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    settings = {
        "dtype": half if args.use_lora else torch.float32,
        "attn_implementation": attention.register(),
    }
    if args.load_in_4bit:
        settings["quantization_config"] = four_bit(half)
    model = cli.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
    losses.use_chunked_loss(model)
    if args.freeze_layers:
        freeze(model, args.freeze_layers)
    return add_lora(model, args, training) if args.use_lora else model


def four_bit(compute_dtype: torch.dtype):
    """QLoRA's quantisation (Dettmers 2023): NF4 with double quantisation."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not device.supports_4bit() or not is_bitsandbytes_available():
        need = "--load_in_4bit needs a CUDA card and `pip install bitsandbytes`"
        raise SystemExit(f"{need}; this device is {device.kind()}. Use --use_lora true without it")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def freeze(model, layers: int) -> None:
    model.get_input_embeddings().requires_grad_(False)
    for layer in model.model.layers[:layers]:
        layer.requires_grad_(False)


def add_lora(model, args: Args, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    recompute = bool(
        getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing
    )
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.enable_input_require_grads()
    targets = adapter.linear_layers(model, args.target_modules)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_r,
            lora_alpha=args.lora_alpha or 2 * args.lora_r,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            use_dora=args.use_dora,
            use_rslora=args.use_rslora,
        ),
    )


# 3. Data
def with_system(messages: list[dict], system: str) -> list[dict]:
    has = not system or messages[0]["role"] == "system"
    return messages if has else [{"role": "system", "content": system}, *messages]


def encode(row: dict, tokenizer, args: Args, template: dict) -> dict | None:
    """A canonical chat row -> input_ids [T], labels [T], T <= model_max_length; labels on the
    assistant's turns."""
    turns = with_system(row["messages"], args.system_prompt)
    return encode_chat(tokenizer, turns, args.model_max_length, row.get("tools"), **template)


def split_and_encode(
    rows, stats: dict, args: Args, training: TrainingArguments, tokenizer, template: dict
):
    """Rows -> train and held-out rows as token ids, the held-out rows as read; completes the counts
    in `stats`."""
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=training.seed)
    if args.leak_check:
        train, leaked = leak_check(train, args.leak_check, "chat", args.column_map or None)
        stats["dropped"]["in test file"] = leaked
    fn = partial(encode, tokenizer=tokenizer, args=args, template=template)
    code = Path(__file__).read_text(encoding="utf-8")  # an edited `encode` makes new rows
    key = json.dumps(
        [code, fingerprint(tokenizer), args.model_max_length, args.system_prompt, template]
    )
    train_ids, eval_ids, counts = tokenise_split(train, held_out, fn, key)
    stats["dropped"] |= counts["dropped"]
    for reason, n in counts["dropped"].items():
        cli.say(f"  {n:,} dropped: {counts['examples'].get(reason, reason)}")
    stats |= {
        "used": len(train_ids),
        "held_out": len(eval_ids),
        "truncated": counts["truncated"],
    }
    return train_ids, eval_ids, held_out


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    set_seed(training.seed)
    is_tiny = args.model_name_or_path == "tiny"
    if not is_tiny:
        cli.model_config(
            args.model_name_or_path
        )  # a wrong name is told before anything is read or replaced
    if args.use_lora and not is_tiny and not cli.given_by_user("learning_rate"):
        training.learning_rate = LORA_LEARNING_RATE

    rows, stats = load_rows(
        args.data_path, "chat", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir)

    base = tiny_model(rows["row"][:5000]) if is_tiny else args.model_name_or_path
    config, tokenizer = cli.model_config(base), load_tokenizer(args, base)
    template = {} if args.enable_thinking is None else {"enable_thinking": args.enable_thinking}
    train_ids, eval_ids, held_out = split_and_encode(
        rows, stats, args, training, tokenizer, template
    )
    cli.say(
        "split: {used:,} rows to train on, {held_out:,} held out, {truncated:,} shortened".format(
            **stats
        )
    )
    cli.say(
        preview(
            tokenizer, train_ids[0]["input_ids"], train_ids[0]["labels"], color=sys.stdout.isatty()
        )
    )

    model = load_model(args, training, base)
    if args.packing and training.train_sampling_strategy == "group_by_length":
        raise SystemExit(
            "--group_by_length: packing already fills the windows; add --packing false to group rows"
        )
    if args.packing:
        train_set = collators.PackedDataset(train_ids, args.model_max_length, training.seed)
        eval_set = collators.PackedDataset(eval_ids, args.model_max_length, training.seed)
        collator = collators.PackedCollator()
    else:
        train_set, eval_set = (
            collators.NumberedRows(train_ids),
            collators.NumberedRows(eval_ids),
        )
        collator = collators.PaddedCollator(tokenizer.pad_token_id)

    def ask(turns, tools):
        return encode_prompt(tokenizer, with_system(turns, args.system_prompt), tools, **template)

    asked = pick_eval_rows(held_out, eval_ids, args.eval_generate)
    measure = (
        partial(answer_eval_rows, model, tokenizer, asked, ask, args.max_new_tokens)
        if asked
        else None
    )
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collator,
        processing_class=tokenizer,
        measure=measure,
        describe_row=lambda i: train_ids[i]["source"],
    )

    # 4. Train, measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    final = trainer.save_final(dtype=config.dtype)
    if args.use_lora:
        adapter.remember_base(final, base)
    trainer.report(HERE.name, args.model_name_or_path, stats, after)


if __name__ == "__main__":
    cli.run(main)
