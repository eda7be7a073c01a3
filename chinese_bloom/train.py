"""Bloom: instruction tuning (--stage sft), continued pre-training (--stage pt), full or LoRA; other
decoders by path.

    bash chinese_bloom/train_zero2.sh                                                 # built-in tiny model, sample data
    MODEL=bigscience/bloomz-1b7 DATA=my.jsonl OUTPUT=out bash chinese_bloom/train_zero2.sh --use_lora true
    MODEL=bigscience/bloom-560m DATA="a.txt:0.7 b.jsonl:0.3" OUTPUT=out bash chinese_bloom/pretrain.sh
    the same command again                                                            # continues after a crash

Data: sft: chat rows of any common shape, e.g. {"instruction": str, "input": str, "output": str} per
line;
pt: documents, {"text": str} per line or one per line of a .txt file. Order of the story: arguments
-> model and tokenizer -> data -> trainer -> train -> measure -> save -> report.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and bloom_attention
from common import cli  # before torch and transformers: it brings the device

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM
from transformers import TrainingArguments, set_seed

import bloom_attention
from common import collators, tiny
from common.convert import adapter
from common.fast import attention, losses
from common.data.labels import encode_chat, encode_prompt, fingerprint, preview, set_template
from common.data.cache import cache_root
from common.data.load import load_rows, summary
from common.data.tokens import tokenise_split
from common.data.split import leak_check, split_rows
from common.runs.generate import answer_eval_rows, continue_eval_rows, pick_eval_rows
from common.runs.run_folder import open_output
from common.trainer import RecipeTrainer


# 1. Arguments: what this recipe decides; everything else is transformers.TrainingArguments.
@dataclass
class Args:
    stage: str = field(
        default="sft", metadata={"help": "sft: answers of chat rows; pt: every token of documents"}
    )
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "folder or hub id; 'tiny' builds a small one"}
    )
    from_config: str = field(
        default="", metadata={"help": "folder, hub id or config.json: start from random weights"}
    )
    data_path: str = field(
        default="", metadata={"help": "files, folders, 'a.jsonl:0.7 b.csv:0.3'; unset: the samples"}
    )
    column_map: str = field(
        default="", metadata={"help": "rename columns: 'instruction=question,output=reply'"}
    )
    strict_data: bool = field(
        default=False, metadata={"help": "a bad row is an error, not counted and left out"}
    )
    eval_ratio: float = field(
        default=0.05, metadata={"help": "share held out; equal prompts stay on one side"}
    )
    max_eval_samples: int = field(default=500, metadata={"help": "upper bound of held-out rows"})
    leak_check: str = field(
        default="", metadata={"help": "a test file; training rows with its prompts are left out"}
    )
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "window in tokens; sft shortens longer rows, pt cuts documents at windows"
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "several rows a window, each blind to the others; pt: always"},
    )
    template: str = field(
        default="alpaca-zh",
        metadata={
            "help": "alpaca-zh, alpaca-en, belle, tokenizer (its own) or a jinja file; saved with the model"
        },
    )
    system_prompt: str = field(default="", metadata={"help": "system turn for rows that have none"})
    use_lora: bool = field(
        default=False, metadata={"help": "train an adapter instead of all weights"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale; unset: 2 * lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str = field(
        default="all-linear",
        metadata={
            "help": "comma separated; of Bloom: query_key_value,dense,dense_h_to_4h,dense_4h_to_h"
        },
    )
    eval_generate: int = field(
        default=64, metadata={"help": "held-out rows answered before and after; 0: none"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "length limit of those answers"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left"}
    )


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=3,
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
TEMPLATES = {file.stem: str(file) for file in sorted((HERE / "templates").glob("*.jinja"))}
LEARNING_RATE = {"sft": 2e-5, "pt": 5e-5, "lora": 2e-4, "from_config": 3e-4, "tiny": 3e-3}
TINY = dict(  # sizes and steps only
    model_max_length=256,
    num_train_epochs=15,
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
    """Folder of the embedded default: Bloom's architecture at toy size, its tokenizer trained on
    the data at hand."""
    shipped = [Path(file).read_text(encoding="utf-8") for file in TEMPLATES.values()]
    tokenizer = tiny.make_tokenizer(
        [*texts, *shipped],
        vocab_size=4000,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        n_layer=2,
        n_head=4,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return tiny.save_tiny(config, tokenizer, cache_root() / "tiny")


def settle(args: Args, training: TrainingArguments) -> bool:
    """Defaults that hang on other flags; returns whether the model is the built-in one."""
    if args.stage not in ("sft", "pt"):
        raise cli.usage_error(f"--stage {args.stage}: sft or pt")
    if args.template not in (*TEMPLATES, "tokenizer") and not Path(args.template).is_file():
        raise cli.usage_error(
            f"--template {args.template}: {', '.join(TEMPLATES)}, tokenizer or a jinja file"
        )
    if args.use_lora and args.from_config:
        raise cli.usage_error(
            "--use_lora with --from_config: an adapter on random weights that are not kept"
        )
    is_tiny = args.model_name_or_path == "tiny"
    args.data_path = args.data_path or str(HERE / "data" / args.stage)
    if not cli.given_by_user("learning_rate"):
        kind = (
            "tiny"
            if is_tiny
            else "from_config"
            if args.from_config
            else "lora"
            if args.use_lora
            else args.stage
        )
        training.learning_rate = LEARNING_RATE[kind]
    return is_tiny


# 2. Model and tokenizer
def load_tokenizer(args: Args, path: str):
    tokenizer = cli.load(AutoTokenizer, path)
    if args.stage == "sft" and args.template != "tokenizer":
        set_template(tokenizer, TEMPLATES.get(args.template, args.template))
    if args.stage == "sft" and not tokenizer.chat_template:
        raise cli.usage_error(
            f"--template tokenizer: it brings none; take {', '.join(TEMPLATES)} or a jinja file"
        )
    return tokenizer


def load_config(args: Args, path: str, tokenizer):
    """The architecture: the model's own, or that of --from_config with room for the tokenizer's
    vocabulary."""
    if not args.from_config:
        return cli.model_config(path)
    config = cli.model_config(args.from_config, "--from_config")
    config.update(
        {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
    )
    config.vocab_size = (
        max(config.vocab_size, len(tokenizer))
        if cli.given_by_user("model_name_or_path")
        else len(tokenizer)
    )
    return config


def load_model(args: Args, training: TrainingArguments, path: str, config):
    """The model in the dtype it trains in: float32 masters for full training, the half dtype for a
    frozen base."""
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    settings = {
        "dtype": half if args.use_lora else torch.float32,
        "attn_implementation": attention.register(),
    }
    random = partial(AutoModelForCausalLM.from_config, config)
    model = (
        random(**settings) if args.from_config else cli.load(AutoModelForCausalLM, path, **settings)
    )
    model.config.use_cache = False
    if isinstance(model, BloomForCausalLM):
        bloom_attention.use(model)
    losses.use_chunked_loss(model)
    return add_lora(model, args, training) if args.use_lora else model


def add_lora(model, args: Args, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model

    if getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing:
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
        ),
    )


# 3. Data
def with_system(messages: list[dict], system: str) -> list[dict]:
    has = not system or messages[0]["role"] == "system"
    return messages if has else [{"role": "system", "content": system}, *messages]


def encode(row: dict, tokenizer, args: Args) -> dict | None:
    """sft: a canonical chat row -> input_ids [T], labels [T] on the answers; pt: a document ->
    input_ids [T] + eos."""
    if args.stage == "pt":
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [*ids, tokenizer.eos_token_id]}
    return encode_chat(
        tokenizer, with_system(row["messages"], args.system_prompt), args.model_max_length
    )


def split_and_encode(rows, stats: dict, args: Args, training: TrainingArguments, tokenizer):
    """Rows -> train and held-out rows as token ids, the held-out rows as read; completes the counts
    in `stats`."""
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=training.seed)
    if args.leak_check:
        kind = "chat" if args.stage == "sft" else "text"
        train, leaked = leak_check(train, args.leak_check, kind, args.column_map or None)
        stats["dropped"]["in test file"] = leaked
    columns = ("input_ids", "labels") if args.stage == "sft" else ("input_ids",)
    code = Path(__file__).read_text(encoding="utf-8")  # an edited `encode` makes new rows
    key = json.dumps(
        [code, fingerprint(tokenizer), args.model_max_length, args.system_prompt, args.stage]
    )
    encoder = partial(encode, tokenizer=tokenizer, args=args)
    train_ids, eval_ids, counts = tokenise_split(train, held_out, encoder, key, columns=columns)
    stats["dropped"] |= counts["dropped"]
    for reason, n in counts["dropped"].items():
        cli.say(f"  {n:,} dropped: {counts['examples'].get(reason, reason)}")
    stats |= {
        "used": len(train_ids),
        "held_out": len(eval_ids),
        "truncated": counts["truncated"],
    }
    return train_ids, eval_ids, held_out


def batches(args: Args, training: TrainingArguments, tokenizer, rows):
    """Token rows -> what one item of a batch is, and the collator."""
    if args.stage == "pt":
        return collators.TokenWindows(
            rows, args.model_max_length, training.seed
        ), collators.PackedCollator()
    if args.packing:
        return collators.PackedDataset(
            rows, args.model_max_length, training.seed
        ), collators.PackedCollator()
    return collators.NumberedRows(rows), collators.PaddedCollator(tokenizer.pad_token_id)


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    is_tiny = settle(args, training)
    set_seed(training.seed)
    for flag, name in (
        ("--model_name_or_path", args.model_name_or_path),
        ("--from_config", args.from_config),
    ):
        if name not in ("", "tiny"):
            cli.model_config(name, flag)  # a wrong name is told before anything is read or replaced

    kind = "chat" if args.stage == "sft" else "text"
    rows, stats = load_rows(
        args.data_path, kind, args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir)

    base = tiny_model(rows["row"][:5000]) if is_tiny else args.model_name_or_path
    tokenizer = load_tokenizer(args, base)
    config = load_config(args, base, tokenizer)
    train_ids, eval_ids, held_out = split_and_encode(rows, stats, args, training, tokenizer)
    cli.say(
        "split: {used:,} rows to train on, {held_out:,} held out, {truncated:,} shortened".format(
            **stats
        )
    )
    shown = [
        train_ids[0][name][:200]
        for name in ("input_ids", "input_ids" if args.stage == "pt" else "labels")
    ]
    cli.say(preview(tokenizer, *shown, color=sys.stdout.isatty()))

    model = load_model(args, training, base, config)
    train_set, collator = batches(args, training, tokenizer, train_ids)
    eval_set = batches(args, training, tokenizer, eval_ids)[0] if len(eval_ids) else None

    ask = lambda turns, tools: encode_prompt(
        tokenizer, with_system(turns, args.system_prompt), tools
    )
    asked = pick_eval_rows(held_out, eval_ids, args.eval_generate)
    measure = partial(answer_eval_rows, model, tokenizer, asked, ask, args.max_new_tokens)
    if args.stage == "pt":
        measure = partial(continue_eval_rows, model, tokenizer, asked[:12], args.max_new_tokens)
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collator,
        processing_class=tokenizer,
        measure=measure if asked else None,
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
