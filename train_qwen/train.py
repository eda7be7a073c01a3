"""SFT of Qwen1.5 / Qwen2 / Qwen2.5 / Qwen3 (dense and MoE): full, LoRA (DoRA, rsLoRA), 4-bit QLoRA,
frozen layers.

    bash train_qwen/train_zero2.sh                              # built-in tiny model, sample data
    MODEL=Qwen/Qwen3-8B DATA=my.jsonl bash train_qwen/train_zero2.sh --use_lora true
    the same command again                                      # continues after a crash

Data: chat rows of any common shape (README, "Data"), e.g. {"instruction": str, "input": str,
"output": str} per line.
Order of the story: arguments -> model and tokenizer -> data -> trainer -> train -> measure -> save
-> report.
"""

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
from common.convert import adapter, models
from common.data.cache import cache_root
from common.data.labels import encode_chat, encode_prompt, fingerprint, preview, set_template
from common.data.load import load_rows, summary
from common.data.prepare import prepare
from common.fast import attention, losses
from common.runs import flags, memory_check
from common.runs.engine import engine, load_dtype
from common.runs.generate import answer_eval_rows, pick_eval_rows
from common.runs.run_folder import open_output
from common.trainer import RecipeTrainer


# 1. Arguments: what this recipe decides beside the flags of every recipe (common/cli.py); all else
#    is transformers.TrainingArguments.
@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    data_path: str = field(
        default=str(HERE / "data"),
        metadata={"help": "files or folders, with weights: 'a.jsonl:0.7 b.csv:0.3'"},
    )
    model_max_length: int = field(
        default=2048, metadata={"help": "window in tokens; longer rows are shortened and counted"}
    )
    system_prompt: str = field(default="", metadata={"help": "system turn for rows that have none"})
    chat_template: str = field(
        default="", metadata={"help": "a jinja file, for tokenizers that have none"}
    )
    enable_thinking: bool | None = field(
        default=None, metadata={"help": "passed to the chat template (Qwen3); unset: its default"}
    )
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: frozen base in 4-bit NF4 (needs bitsandbytes and its card)"},
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "keep the first N decoder layers and the embeddings fixed"}
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


def resolve_args(args: Args, training: TrainingArguments) -> None:
    """Refuse flags that do not go together; defaults that depend on others."""
    if args.packing and training.train_sampling_strategy == "group_by_length":
        raise cli.usage_error(
            "--group_by_length: packing already fills the windows; "
            "add --packing false to group rows"
        )
    if args.load_in_4bit and not args.use_lora:
        raise cli.usage_error("--load_in_4bit: a 4-bit base is frozen; add --use_lora true")
    flags.refuse_values(vars(args), {"freeze_layers": flags.FROM_0})
    if args.use_lora:
        flags.say_unused(["freeze_layers"], "under an adapter all of the base is fixed")
    is_tiny = args.model_name_or_path == "tiny"
    if args.use_lora and not is_tiny and not cli.given_by_user("learning_rate"):
        training.learning_rate = LORA_LEARNING_RATE


def tiny_model(texts: list[str]) -> str:
    """Folder of the embedded default: Qwen3's architecture at toy size, its tokenizer trained on
    the data at hand."""
    tokenizer = tiny.make_tokenizer(
        texts,
        vocab_size=4000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        plain_tokens=[
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
            "</tool_response>",
        ],
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
    tokenizer = models.load(AutoTokenizer, path)
    if args.chat_template:
        set_template(tokenizer, args.chat_template)
    return tokenizer


def load_model(args: Args, training: TrainingArguments, path: str):
    """The model in the dtype it trains in: float32 masters for full training (DeepSpeed makes its
    own), the half dtype for a frozen base."""
    settings = {
        "dtype": load_dtype(training, trains_all=not args.use_lora),
        "attn_implementation": attention.register(),
    }
    if args.load_in_4bit:
        settings["quantization_config"] = four_bit(training)
    model = models.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
    # from here on the output's `logits` are no logits, but sums of the loss: they are never built
    losses.use_chunked_loss(model)
    if args.freeze_layers:
        freeze(model, args.freeze_layers)
    if args.use_lora:
        return add_lora(model, args, training)
    return model


def four_bit(training: TrainingArguments):
    """QLoRA's quantisation (Dettmers 2023): NF4 with double quantisation."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if device.module() is not torch.cuda or not is_bitsandbytes_available():
        need = "--load_in_4bit needs a CUDA card and `pip install bitsandbytes`"
        raise SystemExit(f"{need}; this device is {device.kind()}. Use --use_lora true without it")
    half = device.train_dtype(training)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
        # ZeRO-3 spreads only what has the dtype of the other weights; whole, bytes serve as well
        bnb_4bit_quant_storage=half if engine(training) == "zero-3" else torch.uint8,
    )


def freeze(model, layers: int) -> None:
    if layers > len(model.model.layers):
        raise cli.usage_error(f"--freeze_layers {layers}: the model has {len(model.model.layers)}")
    model.get_input_embeddings().requires_grad_(False)
    for layer in model.model.layers[:layers]:
        layer.requires_grad_(False)


def add_lora(model, args: Args, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model

    # peft's helper for 4-bit models would also cast embedding, head and norms to float32
    model.requires_grad_(False)
    if cli.recompute(training):
        model.enable_input_require_grads()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=adapter.linear_layers(model, args.target_modules),
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
    )
    return get_peft_model(model, config)


# 3. Data
def with_system(messages: list[dict], system: str) -> list[dict]:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def encode(row: dict, tokenizer, args: Args, template: dict) -> dict | None:
    """A canonical chat row -> input_ids [T], labels [T], T <= model_max_length; labels on the
    assistant's turns."""
    turns = with_system(row["messages"], args.system_prompt)
    return encode_chat(tokenizer, turns, args.model_max_length, row.get("tools"), **template)


def windows(args: Args, training: TrainingArguments, token_rows):
    """Token rows -> the dataset whose items make a batch: packed windows, or single rows."""
    if args.packing:
        return collators.PackedDataset(token_rows, args.model_max_length, training.seed)
    return collators.NumberedRows(token_rows)


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    resolve_args(args, training)
    set_seed(training.seed)
    is_tiny = args.model_name_or_path == "tiny"
    if not is_tiny:
        # fail on a wrong name before anything is read or replaced
        models.check_model(args.model_name_or_path)

    rows, stats = load_rows(
        args.data_path, "chat", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    base = tiny_model(rows["row"][:5000]) if is_tiny else args.model_name_or_path
    config = models.model_config(base)
    memory_check.recompute_large(args, training, config)
    tokenizer = load_tokenizer(args, base)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir, tokenizer=tokenizer)

    flags.check_window(args, config, tokenizer)
    template = {} if args.enable_thinking is None else {"enable_thinking": args.enable_thinking}
    train_ids, eval_ids, eval_rows = prepare(
        rows,
        stats,
        partial(encode, tokenizer=tokenizer, args=args, template=template),
        args,
        kind="chat",
        seed=training.seed,
        depends_on=[fingerprint(tokenizer), args.system_prompt, template],
    )
    first = train_ids[0]
    cli.say(preview(tokenizer, first["input_ids"], first["labels"], color=sys.stdout.isatty()))

    def prompt_of(turns, tools):
        return encode_prompt(tokenizer, with_system(turns, args.system_prompt), tools, **template)

    train_windows = windows(args, training, train_ids)
    memory_check.check(args, training, config, train_windows, frozen_layers=args.freeze_layers)
    model = load_model(args, training, base)
    asked = pick_eval_rows(eval_rows, eval_ids, args.eval_generate)
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train_windows,
        eval_dataset=windows(args, training, eval_ids),
        data_collator=collators.collator(args.packing, tokenizer, training),
        processing_class=tokenizer,
        measure=partial(answer_eval_rows, model, tokenizer, asked, prompt_of, args.max_new_tokens),
        describe_row=lambda i: train_ids[i]["source"],
    )

    # 4. Train (the held-out rows are measured before the first step), measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    final = trainer.save_final(dtype=config.dtype)
    if args.use_lora:
        adapter.remember_base(final, base)
    trainer.report(HERE.name, args.model_name_or_path, stats, after)


if __name__ == "__main__":
    cli.run(main)
