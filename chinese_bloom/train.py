"""Bloom: instruction tuning (--stage sft), continued pre-training (--stage pt), full or LoRA; other
decoders by path.

    bash chinese_bloom/train_zero2.sh                           # built-in tiny model, sample data
    MODEL=bigscience/bloomz-1b7 DATA=my.jsonl bash chinese_bloom/train_zero2.sh --use_lora true
    MODEL=bigscience/bloom-560m DATA="a.txt:0.7 b.jsonl:0.3" bash chinese_bloom/pretrain.sh
    the same command again                                      # continues after a crash

Data: sft: chat rows of any common shape, e.g. {"instruction": str, "input": str, "output": str} per
line; pt: documents, {"text": str} per line or one per line of a .txt file.
Order of the story: arguments -> model and tokenizer -> data -> trainer -> train -> measure -> save
-> report.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this one
from common import cli  # before torch and transformers

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM
from transformers import TrainingArguments, set_seed

import bloom_attention
from common import collators, tiny
from common.convert import adapter, models
from common.data.cache import cache_root
from common.data.labels import encode_chat, encode_prompt, fingerprint, preview, set_template
from common.data.load import load_rows, summary
from common.data.prepare import prepare
from common.data.spelling import encode_document
from common.fast import attention, losses
from common.runs import flags, memory_check
from common.runs.engine import load_dtype
from common.runs.generate import answer_eval_rows, continue_eval_rows, pick_eval_rows
from common.runs.run_folder import open_output
from common.trainer import RecipeTrainer
from token_windows import TokenWindows


# 1. Arguments: what this recipe decides beside the flags of every recipe (common/cli.py); all else
#    is transformers.TrainingArguments.
@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    stage: str = field(
        default="sft", metadata={"help": "sft: answers of chat rows; pt: every token of documents"}
    )
    from_config: str = field(
        default="", metadata={"help": "folder, hub id or config.json: start from random weights"}
    )
    model_max_length: int = field(
        default=1024,
        metadata={"help": "window in tokens; sft shortens longer rows, pt cuts documents there"},
    )
    packing: bool = field(
        default=True,
        metadata={"help": "several rows a window, each blind to the others; pt: always"},
    )
    template: str = field(
        default="alpaca-zh",
        metadata={"help": "alpaca-zh, alpaca-en, belle, tokenizer (its own) or a jinja file"},
    )
    system_prompt: str = field(default="", metadata={"help": "system turn for rows that have none"})
    target_modules: str = field(
        default="all-linear",
        metadata={"help": "of Bloom: query_key_value,dense,dense_h_to_4h,dense_4h_to_h"},
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
    """Folder of the embedded default: a toy Bloom, its tokenizer trained on the data at hand."""
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


def resolve_args(args: Args, training: TrainingArguments) -> None:
    """Refuse flags that do not go together; defaults that depend on others."""
    if args.stage not in ("sft", "pt"):
        raise cli.usage_error(f"--stage {args.stage}: sft or pt")
    if args.template not in (*TEMPLATES, "tokenizer") and not Path(args.template).is_file():
        raise cli.usage_error(
            f"--template {args.template}: {', '.join(TEMPLATES)}, tokenizer or a jinja file"
        )
    if args.use_lora and args.from_config:
        raise cli.usage_error("--use_lora with --from_config: an adapter on weights not kept")
    args.data_path = args.data_path or str(HERE / "data" / args.stage)
    if args.stage == "pt":
        flags.say_unused(["template", "system_prompt", "packing"], "--stage pt has none of it")
    if not cli.given_by_user("learning_rate"):
        training.learning_rate = LEARNING_RATE[kind_of_run(args)]


def kind_of_run(args: Args) -> str:
    """A key of LEARNING_RATE."""
    if args.model_name_or_path == "tiny":
        return "tiny"
    if args.from_config:
        return "from_config"
    return "lora" if args.use_lora else args.stage


# 2. Model and tokenizer
def check_models(args: Args) -> None:
    """Fail on a wrong name before anything is read or replaced."""
    if args.model_name_or_path != "tiny":
        models.check_model(args.model_name_or_path, grows=bool(args.from_config))
    if args.from_config:
        models.model_config(args.from_config, "--from_config")


def load_tokenizer(args: Args, path: str):
    tokenizer = models.load(AutoTokenizer, path)
    if args.stage == "sft" and args.template != "tokenizer":
        set_template(tokenizer, TEMPLATES.get(args.template, args.template))
    if args.stage == "sft" and not tokenizer.chat_template:
        raise cli.usage_error(
            f"--template tokenizer: it brings none; take {', '.join(TEMPLATES)} or a jinja file"
        )
    return tokenizer


def load_config(args: Args, path: str, tokenizer):
    """The architecture: the model's own, or that of --from_config with room for the tokens."""
    if not args.from_config:
        return models.model_config(path)
    config = models.model_config(args.from_config, "--from_config")
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    least = config.vocab_size if cli.given_by_user("model_name_or_path") else 0
    config.vocab_size = max(least, len(tokenizer))
    return config


def load_model(args: Args, training: TrainingArguments, path: str, config):
    """The model in the dtype it trains in; random weights, drawn in float32, are the same in every
    engine."""
    dtype = torch.float32 if args.from_config else load_dtype(training, not args.use_lora)
    settings = {"dtype": dtype, "attn_implementation": attention.register()}
    if args.from_config:
        model = AutoModelForCausalLM.from_config(config, **settings)
    else:
        model = models.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
    if isinstance(model, BloomForCausalLM):
        bloom_attention.use(model)
    # from here on the output's `logits` are no logits, but sums of the loss: they are never built
    losses.use_chunked_loss(model)
    return add_lora(model, args, training) if args.use_lora else model


def add_lora(model, args: Args, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model

    if cli.recompute(training):
        model.enable_input_require_grads()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=adapter.linear_layers(model, args.target_modules),
    )
    return get_peft_model(model, config)


# 3. Data
def with_system(messages: list[dict], system: str) -> list[dict]:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def encode(row: dict, tokenizer, args: Args) -> dict | None:
    """sft: a canonical chat row -> input_ids [T], labels [T] on the answers; pt: a document ->
    input_ids [T] + eos."""
    if args.stage == "pt":
        return {"input_ids": encode_document(tokenizer, row["text"])}
    turns = with_system(row["messages"], args.system_prompt)
    return encode_chat(tokenizer, turns, args.model_max_length, row.get("tools"))


def windows(args: Args, training: TrainingArguments, token_rows):
    """Token rows -> what makes a batch: windows of documents, packed windows, or single rows."""
    if args.stage == "pt":
        return TokenWindows(token_rows, args.model_max_length, training.seed)
    if args.packing:
        return collators.PackedDataset(token_rows, args.model_max_length, training.seed)
    return collators.NumberedRows(token_rows)


def measuring(args: Args, model, tokenizer, asked: list[str]):
    """What is generated before and after: answers to held-out questions, or held-out documents."""
    if args.stage == "pt":
        return partial(continue_eval_rows, model, tokenizer, asked[:12], args.max_new_tokens)

    def prompt_of(turns, tools):
        return encode_prompt(tokenizer, with_system(turns, args.system_prompt), tools)

    return partial(answer_eval_rows, model, tokenizer, asked, prompt_of, args.max_new_tokens)


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    resolve_args(args, training)
    set_seed(training.seed)
    is_tiny = args.model_name_or_path == "tiny"
    check_models(args)

    kind = "chat" if args.stage == "sft" else "text"
    rows, stats = load_rows(
        args.data_path, kind, args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    base = tiny_model(rows["row"][:5000]) if is_tiny else args.model_name_or_path
    tokenizer = load_tokenizer(args, base)
    config = load_config(args, base, tokenizer)
    memory_check.recompute_large(args, training, config)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir, tokenizer=tokenizer)

    flags.check_window(args, config, tokenizer if args.stage == "sft" else None)
    train_ids, eval_ids, eval_rows = prepare(
        rows,
        stats,
        partial(encode, tokenizer=tokenizer, args=args),
        args,
        kind=kind,
        seed=training.seed,
        depends_on=[fingerprint(tokenizer), args.system_prompt, args.stage],
        columns=("input_ids",) if args.stage == "pt" else ("input_ids", "labels"),
    )
    first = train_ids[0]["input_ids"][:200]
    labels = first if args.stage == "pt" else train_ids[0]["labels"][:200]
    cli.say(preview(tokenizer, first, labels, color=sys.stdout.isatty()))

    train_windows = windows(args, training, train_ids)
    memory_check.check(args, training, config, train_windows)
    model = load_model(args, training, base, config)
    asked = pick_eval_rows(eval_rows, eval_ids, args.eval_generate)
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train_windows,
        eval_dataset=windows(args, training, eval_ids),
        data_collator=collators.collator(args.packing or args.stage == "pt", tokenizer, training),
        processing_class=tokenizer,
        measure=measuring(args, model, tokenizer, asked),
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
