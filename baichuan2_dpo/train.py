"""Preference training (DPO and its relatives) of Baichuan2 and of any other causal LM, with LoRA or
all weights.

    bash baichuan2_dpo/train_zero2.sh                                                 # built-in tiny model, sample data
    MODEL=models/baichuan2-7b DATA=pairs.jsonl OUTPUT=out bash baichuan2_dpo/train_zero2.sh
    MODEL=Qwen/Qwen3-8B DATA=pairs.jsonl OUTPUT=out bash baichuan2_dpo/train_zero3.sh --loss_type ipo --beta 0.2
    the same command again                                                            # continues after a crash

Data: pairs of any common shape, e.g. {"prompt": str, "chosen": str, "rejected": str} per line.
Order of the story: arguments -> model and tokenizer -> data -> trainer -> train -> measure -> save
-> report.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # before torch and transformers: it brings the device

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    TrainingArguments,
    set_seed,
)

import dpo_losses
import modeling_baichuan  # noqa: F401  (tells the Auto classes of Baichuan2-13B)
from answers import measure_answers
from common import device, tiny
from common.convert import adapter
from common.fast import attention, losses
from common.data.labels import fingerprint, preview
from common.data.cache import cache_root
from common.data.load import load_rows, summary
from common.data.tokens import tokenise_split
from common.data.split import leak_check, split_rows
from common.runs.generate import pick_eval_rows
from common.runs.run_folder import open_output
from pairs import encode
from preference import COLUMNS, PairCollator, Pairs, PreferenceTrainer
from tiny_base import teach


# 1. Arguments: what this recipe decides; everything else is transformers.TrainingArguments.
@dataclass
class Args:
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "folder or hub id; 'tiny' builds a small one"}
    )
    data_path: str = field(
        default="", metadata={"help": "files, folders, 'a.jsonl:0.7 b.csv:0.3'; unset: the samples"}
    )
    column_map: str = field(
        default="", metadata={"help": "rename columns: 'prompt=question,chosen=good,rejected=bad'"}
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
        default=1024, metadata={"help": "tokens of prompt and answer; see pairs.py"}
    )
    packing: bool = field(
        default=True, metadata={"help": "the answers of a batch in one row without padding"}
    )
    share_prompt: bool = field(
        default=True, metadata={"help": "with packing: a pair's prompt stands in the row once"}
    )
    loss_type: str = field(default="sigmoid", metadata={"help": ", ".join(dpo_losses.KINDS)})
    beta: float | None = field(
        default=None, metadata={"help": "strength of the reference; unset: 0.1, simpo 2"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of swapped pairs: sigmoid, robust, simpo"}
    )
    length_normalized: bool = field(
        default=False, metadata={"help": "log-probs per token; ipo, simpo, orpo: always"}
    )
    simpo_gamma: float = field(default=1.0, metadata={"help": "target margin of simpo"})
    rpo_alpha: float = field(
        default=0.0, metadata={"help": "weight of an SFT term on the chosen answer"}
    )
    reference: str = field(
        default="precomputed",
        metadata={"help": "precomputed (once, kept), adapter (off in each step), model"},
    )
    reference_model: str = field(
        default="", metadata={"help": "another model as reference; unset: the one trained"}
    )
    use_lora: bool = field(default=True, metadata={"help": "train an adapter; false: all weights"})
    lora_r: int = field(default=32, metadata={"help": "rank"})
    lora_alpha: int = field(
        default=64, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str = field(
        default="all-linear", metadata={"help": "all-linear or names with commas"}
    )
    system_prompt: str = field(default="", metadata={"help": "system turn for rows that have none"})
    eval_generate: int = field(
        default=64, metadata={"help": "held-out prompts answered before and after; 0: none"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "length limit of those answers"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left"}
    )


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=1,
    weight_decay=0.0,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=4,
    logging_steps=5,
    logging_first_step=True,
    save_steps=200,
    save_total_limit=2,
    report_to=["tensorboard"],
    ddp_find_unused_parameters=False,
    ddp_timeout=7200,
)
LEARNING_RATE = {"full": 1e-6, "lora": 2e-5, "tiny full": 5e-5, "tiny lora": 1.5e-4}
TINY = dict(  # sizes and steps only, and beta: small models move far
    model_max_length=256,
    num_train_epochs=5,
    beta=0.2,
    adam_beta2=0.98,
    lora_r=16,
    lora_alpha=32,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    logging_steps=10,
    save_steps=200,
    eval_ratio=0.1,
    eval_generate=60,
    max_new_tokens=48,
)
SPECIAL = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


def tiny_model(rows: list[str], taught: bool) -> str:
    """Folder of the embedded default: Baichuan2-7B's architecture at toy size, its tokenizer
    trained on the data.

    taught: it gives both answers of the sample pairs (see tiny_base); else its weights are random.
    """
    sides = ("prompt", "chosen", "rejected")
    texts = [
        message["content"]
        for row in map(json.loads, rows)
        for side in sides
        for message in row[side]
    ]
    tokenizer = tiny.make_tokenizer(
        texts,
        vocab_size=4000,
        special_tokens=SPECIAL,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=(HERE / "templates" / "baichuan2.jinja").read_text(encoding="utf-8"),
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    folder = cache_root() / "tiny"
    return tiny.save_tiny(
        config, tokenizer, folder, teach=partial(teach, tokenizer=tokenizer) if taught else None
    )


def settle(args: Args, training: TrainingArguments) -> bool:
    """Flags that do not go together; defaults that hang on others. Returns whether the model is the
    built-in one."""
    is_tiny, free = args.model_name_or_path == "tiny", args.loss_type in dpo_losses.REFERENCE_FREE
    if args.loss_type not in dpo_losses.KINDS:
        raise cli.usage_error(f"--loss_type {args.loss_type}: {', '.join(dpo_losses.KINDS)}")
    if args.reference not in ("precomputed", "adapter", "model"):
        raise cli.usage_error(f"--reference {args.reference}: precomputed, adapter or model")
    if args.reference == "adapter" and not args.use_lora:
        raise cli.usage_error(
            "--reference adapter: there is no adapter to switch off; precomputed or model"
        )
    if args.reference_model and (args.reference == "adapter" or free):
        what = (
            f"--loss_type {args.loss_type} has no reference"
            if free
            else "--reference adapter takes the base itself"
        )
        raise cli.usage_error(f"--reference_model: {what}")
    if not 0 <= args.label_smoothing < 0.5:
        raise cli.usage_error(f"--label_smoothing {args.label_smoothing}: from 0 to below 0.5")
    if args.label_smoothing and args.loss_type not in ("sigmoid", "robust", "simpo"):
        raise cli.usage_error(f"--label_smoothing: --loss_type {args.loss_type} has none")
    if args.beta is not None and args.beta <= 0:
        raise cli.usage_error(f"--beta {args.beta}: above 0")
    if training.train_sampling_strategy == "group_by_length":
        raise cli.usage_error(
            "--group_by_length: pairs are not grouped; --packing true leaves no padding to save"
        )
    if args.model_max_length < 32:
        raise cli.usage_error(
            f"--model_max_length {args.model_max_length}: no pair fits; give 32 or more"
        )
    args.data_path = args.data_path or str(HERE / "data")
    if not cli.given_by_user("learning_rate"):
        training.learning_rate = LEARNING_RATE[
            "tiny " * is_tiny + ("lora" if args.use_lora else "full")
        ]
    return is_tiny


# 2. Model and tokenizer
def load_model(args: Args, training: TrainingArguments, path: str, trains_all: bool):
    """The model in the dtype it computes in: float32 masters for full training, the half dtype for
    frozen weights."""
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    settings = {
        "dtype": torch.float32 if trains_all else half,
        "attn_implementation": attention.register(),
    }
    model = cli.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
    if trains_all and getattr(model.config, "norm_head_folded", False):
        cli.say(
            "warning: this checkpoint's head was normalised once and now trains without the normalisation; convert it "
            "again with --keep_norm_head to train it as Baichuan2 does"
        )
    return losses.use_chunked_loss(model)


def can_share(config, length: int) -> bool:
    """Whether two answers may stand behind one prompt: the attention is that of common/, whole,
    without dropout."""
    dropped = any(
        getattr(config, name, 0)
        for name in ("attention_dropout", "attn_pdrop", "attn_logit_softcapping")
    )
    near = getattr(config, "sliding_window", None) or length
    return config._attn_implementation == attention.NAME and not dropped and near >= length


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
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
        ),
    )


# 3. Data
def split_and_encode(rows, stats: dict, args: Args, training: TrainingArguments, tokenizer):
    """Rows -> train and held-out pairs as token ids, the held-out rows as read; completes the
    counts in `stats`."""
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=training.seed)
    if args.leak_check:
        train, leaked = leak_check(train, args.leak_check, "preference", args.column_map or None)
        stats["dropped"]["in test file"] = leaked
    code = (HERE / "pairs.py").read_text(encoding="utf-8")  # an edited `encode` makes new rows
    key = json.dumps([code, fingerprint(tokenizer), args.model_max_length, args.system_prompt])
    encoder = partial(
        encode, tokenizer=tokenizer, max_length=args.model_max_length, system=args.system_prompt
    )
    train_ids, eval_ids, counts = tokenise_split(train, held_out, encoder, key, columns=COLUMNS)
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
    given, is_tiny = args.data_path, settle(args, training)
    set_seed(training.seed)
    for flag, name in (
        ("--model_name_or_path", args.model_name_or_path),
        ("--reference_model", args.reference_model),
    ):
        if name not in ("", "tiny"):
            cli.model_config(name, flag)  # a wrong name is told before anything is read or replaced

    rows, stats = load_rows(
        args.data_path, "preference", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir)

    base = tiny_model(rows["row"][:5000], taught=not given) if is_tiny else args.model_name_or_path
    tokenizer = cli.load(AutoTokenizer, base)
    if not tokenizer.chat_template:
        raise SystemExit(
            f"{base} has no chat template: save one with its tokenizer (tokenizer.chat_template)"
        )
    train_ids, eval_ids, held_out = split_and_encode(rows, stats, args, training, tokenizer)
    cli.say(
        "split: {used:,} pairs to train on, {held_out:,} held out, {truncated:,} shortened".format(
            **stats
        )
    )
    for side in ("chosen", "rejected"):
        shown = [train_ids[0][f"{side}_{name}"][:200] for name in ("input_ids", "labels")]
        cli.say(f"{side}: {preview(tokenizer, *shown, color=sys.stdout.isatty())}")

    model = load_model(args, training, base, trains_all=not args.use_lora)
    share = args.share_prompt and can_share(model.config.get_text_config(), args.model_max_length)
    if args.packing:
        attention.refuse_unpackable(model)
    model = add_lora(model, args, training) if args.use_lora else model
    multiple = (
        128 if device.kind() == "cpu" and training.bf16 else 1
    )  # there each new length compiles new kernels
    asked = pick_eval_rows(held_out, eval_ids, args.eval_generate)
    reference = (
        "model" if args.reference_model and args.reference == "precomputed" else args.reference
    )
    trainer = PreferenceTrainer(
        model=model,
        args=training,
        train_dataset=Pairs(train_ids),
        eval_dataset=Pairs(eval_ids) if len(eval_ids) else None,
        data_collator=PairCollator(tokenizer.pad_token_id, args.packing, share, multiple),
        processing_class=tokenizer,
        measure=partial(
            measure_answers, model, tokenizer, asked, args.system_prompt, args.max_new_tokens
        )
        if asked
        else None,
        describe_row=lambda i: train_ids[i]["source"],
        loss={
            "kind": args.loss_type,
            "label_smoothing": args.label_smoothing,
            "gamma": args.simpo_gamma,
            "averaged": args.length_normalized,
            "rpo_alpha": args.rpo_alpha,
        }
        | ({"beta": args.beta} if args.beta else {}),
        reference=reference,
        fingerprint=adapter.base_fingerprint(args.reference_model or base),
        load_reference=lambda: load_model(
            args, training, args.reference_model or base, trains_all=False
        ),
    )

    # 4. Train, measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    final = trainer.save_final(dtype=cli.model_config(base).dtype)
    adapter.remember_base(final, base)  # the reference: the demo compares with it
    trainer.report(HERE.name, args.model_name_or_path, stats, after)


if __name__ == "__main__":
    cli.run(main)
