"""Preference training (DPO and its relatives) of Baichuan2 and of any other causal LM.

    bash baichuan2_dpo/train_zero2.sh                           # built-in tiny model, sample data
    MODEL=models/baichuan2-7b DATA=pairs.jsonl bash baichuan2_dpo/train_zero2.sh
    MODEL=Qwen/Qwen3-8B DATA=pairs.jsonl bash baichuan2_dpo/train_zero3.sh --loss_type ipo
    the same command again                                      # continues after a crash

Data: pairs of any common shape (README, "Data"), e.g. {"prompt": str, "chosen": str,
"rejected": str} per line.
Order of the story: arguments -> model and tokenizer -> data -> trainer -> train -> measure -> save
-> report.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # device before torch and transformers

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import dpo_losses
import loss_flags
import modeling_baichuan  # noqa: F401  (tells the Auto classes about Baichuan2-13B)
from answers import measure_answers
from common.convert import adapter, models
from common.data.labels import fingerprint, preview
from common.data.load import load_rows, summary
from common.data.prepare import prepare
from common.fast import attention, losses, shared_start
from common.runs import flags, memory_check
from common.runs.engine import load_dtype
from common.runs.generate import pick_eval_rows
from common.runs.run_folder import open_output
from pairs import encode
from preference import COLUMNS, PairCollator, Pairs, PreferenceTrainer
from tiny_base import tiny_model


# 1. Arguments: what this recipe decides beside the flags of every recipe (common/cli.py); all else
#    is transformers.TrainingArguments.
@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    data_path: str = field(
        default=str(HERE / "data"),
        metadata={"help": "files or folders, with weights: 'a.jsonl:0.7 b.csv:0.3'"},
    )
    column_map: str = field(
        default="", metadata={"help": "rename columns: 'prompt=question,chosen=good,rejected=bad'"}
    )
    packing: bool = field(
        default=True, metadata={"help": "the answers of a batch in one row without padding"}
    )
    share_prompt: bool = field(
        default=True, metadata={"help": "with packing: a pair's prompt stands in the row once"}
    )
    system_prompt: str = field(default="", metadata={"help": "system turn for rows that have none"})
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


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=1,
    learning_rate=2e-5,
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
)
TINY = dict(  # sizes and steps only, and beta: small models move far
    model_max_length=256,
    num_train_epochs=5,
    learning_rate=1.5e-4,
    beta=0.2,
    adam_beta2=0.98,
    lora_r=16,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    logging_steps=10,
    eval_ratio=0.1,
    eval_generate=60,
    max_new_tokens=48,
)
FULL_LEARNING_RATE = 1e-6  # training all weights wants a much smaller rate than an adapter
TINY_FULL_LEARNING_RATE = 5e-5


def resolve_args(args: Args, training: TrainingArguments) -> None:
    """Refuse flags that do not go together; defaults that depend on others."""
    loss_flags.check(args)
    if training.train_sampling_strategy == "group_by_length":
        raise cli.usage_error(
            "--group_by_length: pairs are not grouped; --packing true leaves no padding to save"
        )
    if args.model_max_length < 32:
        raise cli.usage_error(f"--model_max_length {args.model_max_length}: no pair fits below 32")
    if args.reference_model and args.reference == "precomputed":
        args.reference = "model"
    if not args.use_lora and not cli.given_by_user("learning_rate"):
        is_tiny = args.model_name_or_path == "tiny"
        training.learning_rate = TINY_FULL_LEARNING_RATE if is_tiny else FULL_LEARNING_RATE


# 2. Model and tokenizer
def check_models(args: Args, training: TrainingArguments) -> None:
    """Fail on a wrong name, or one tokenizer too large for a model, before anything is read."""
    named = args.model_name_or_path
    if named != "tiny":
        config = models.check_model(named)
        flags.check_window(args, config)
        memory_check.recompute_large(args, training, config)
    if args.reference_model:
        models.check_model(
            args.reference_model, "--reference_model", named if named != "tiny" else ""
        )


def load_tokenizer(path: str):
    tokenizer = models.load(AutoTokenizer, path)
    if not tokenizer.chat_template:
        raise SystemExit(
            f"{path} has no chat template: save one with its tokenizer (tokenizer.chat_template)"
        )
    return tokenizer


def load_model(args: Args, training: TrainingArguments, path: str, trains_all: bool):
    """The model in the dtype it computes in: float32 masters where all weights are trained
    (DeepSpeed makes its own), the half dtype where they are frozen (the base of an adapter, a
    reference)."""
    settings = {
        "dtype": load_dtype(training, trains_all),
        "attn_implementation": shared_start.register(),
    }
    flag = "--reference_model" if path == args.reference_model else "--model_name_or_path"
    model = models.load(AutoModelForCausalLM, path, flag, **settings)
    model.config.use_cache = False
    if args.packing:
        attention.refuse_unpackable(model)
    if trains_all and getattr(model.config, "norm_head_folded", False):
        cli.say(
            "warning: this checkpoint's head was normalised once and now trains without the "
            "normalisation; convert it again with --keep_norm_head to train it as Baichuan2 does"
        )
    # from here on the output's `logits` are no logits, but sums of the loss: they are never built
    return losses.use_chunked_loss(model)


def load_policy(args: Args, training: TrainingArguments, path: str):
    """The model to train, an adapter on it where one is trained."""
    model = load_model(args, training, path, trains_all=not args.use_lora)
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
def show_pair(tokenizer, pair: dict) -> None:
    """The beginning of both rows of a pair, the trained text marked."""
    for side in ("chosen", "rejected"):
        ids = pair[f"{side}_input_ids"][:200]
        labels = pair[f"{side}_labels"][:200]
        cli.say(f"{side}: {preview(tokenizer, ids, labels, color=sys.stdout.isatty())}")


def check_memory(args: Args, training: TrainingArguments, base: str, pairs: Pairs) -> None:
    """Say what the training will take; the process ends here where that is not there."""
    second = int(loss_flags.needs_second_model(args))
    memory_check.check(args, training, models.model_config(base), pairs, references=second)


def make_collator(args: Args, training: TrainingArguments, tokenizer, model) -> PairCollator:
    share = args.share_prompt and can_share(model.config.get_text_config(), args.model_max_length)
    multiple = device.length_multiple(device.train_dtype(training))
    return PairCollator(tokenizer.pad_token_id, args.packing, share, multiple)


def can_share(config, length: int) -> bool:
    """Whether two answers may stand behind one prompt: the attention is that of shared_start.py,
    sees all `length` tokens, and has neither dropout nor soft caps."""
    changes = ("attention_dropout", "attn_pdrop", "attn_logit_softcapping")
    window = getattr(config, "sliding_window", None) or length
    if config._attn_implementation != shared_start.NAME or window < length:
        return False
    return not any(getattr(config, name, 0) for name in changes)


def loss_settings(args: Args) -> dict:
    """The arguments of dpo_losses.preference_loss."""
    settings = {
        "kind": args.loss_type,
        "label_smoothing": args.label_smoothing,
        "gamma": args.simpo_gamma,
        "averaged": args.length_normalized,
        "rpo_alpha": args.rpo_alpha,
    }
    if args.beta:  # else that of the kind
        settings["beta"] = args.beta
    return settings


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    resolve_args(args, training)
    set_seed(training.seed)
    check_models(args, training)

    rows, stats = load_rows(
        args.data_path, "preference", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    base = args.model_name_or_path
    if base == "tiny":
        base = tiny_model(rows["row"][:5000], taught=not cli.given_by_user("data_path"))
    tokenizer = load_tokenizer(base)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir, tokenizer=tokenizer)

    train_ids, eval_ids, eval_rows = prepare(
        rows,
        stats,
        partial(
            encode, tokenizer=tokenizer, max_length=args.model_max_length, system=args.system_prompt
        ),
        args,
        kind="preference",
        seed=training.seed,
        depends_on=[fingerprint(tokenizer), args.system_prompt],
        columns=COLUMNS,
    )
    show_pair(tokenizer, train_ids[0])

    pairs = Pairs(train_ids, args.packing, args.share_prompt)
    check_memory(args, training, base, pairs)
    model = load_policy(args, training, base)
    asked = pick_eval_rows(eval_rows, eval_ids, args.eval_generate)
    reference = args.reference_model or base
    trainer = PreferenceTrainer(
        model=model,
        args=training,
        train_dataset=pairs,
        eval_dataset=Pairs(eval_ids) if len(eval_ids) else None,
        data_collator=make_collator(args, training, tokenizer, model),
        processing_class=tokenizer,
        measure=partial(
            measure_answers, model, tokenizer, asked, args.system_prompt, args.max_new_tokens
        ),
        describe_row=lambda i: train_ids[i]["source"],
        loss=loss_settings(args),
        reference=args.reference,
        fingerprint=adapter.base_fingerprint(reference),
        load_reference=partial(load_model, args, training, reference, trains_all=False),
    )

    # 4. Train (the held-out rows are measured before the first step), measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    final = trainer.save_final(dtype=models.model_config(base).dtype)
    adapter.remember_base(final, base)  # of all weights too: the demo compares with the base
    trainer.report(HERE.name, args.model_name_or_path, stats, after)


if __name__ == "__main__":
    cli.run(main)
