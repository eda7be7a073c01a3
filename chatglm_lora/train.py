"""ChatGLM-6B with LoRA on one or many cards; ChatGLM2/3 (converted, see convert.py) and other
native decoders by path.

    bash chatglm_lora/train_zero2.sh                            # built-in tiny model, sample data
    MODEL=THUDM/chatglm-6b DATA=my.jsonl OUTPUT=out bash chatglm_lora/train_zero2.sh
    MODEL=models/chatglm3-native DATA=my.jsonl bash chatglm_lora/train_zero3.sh --target_modules all
    the same command again                                      # continues after a crash

Data: chat rows of any common shape, e.g. {"instruction": str, "input": str, "output": str} or
{"content": str, "summary": str, "history": [[question, answer], ...]} per line. Each answer of a
conversation is a row of its own: the question and all before it become the prefix, then [gMASK]
<sop> answer <eop>, and the loss is on answer <eop>.
Order of the story: arguments -> model and tokenizer -> data -> trainer -> train -> measure -> save
-> report.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli  # before torch and transformers

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from common import collators, tiny
from common.convert import adapter, models
from common.data.cache import cache_root
from common.data.labels import encode_chat, encode_prompt, fingerprint, preview
from common.data.load import load_rows, summary
from common.data.prepare import prepare
from common.fast import attention, losses
from common.runs import flags, memory_check
from common.runs.engine import load_dtype
from common.runs.generate import answer_eval_rows, pick_eval_rows
from common.runs.run_folder import open_output
from common.trainer import RecipeTrainer
from modeling_chatglm import ChatGLMConfig, layout
from tiny_base import teach
from tokenization_chatglm import ChatGLMTokenizer, train_sentencepiece


# 1. Arguments: what this recipe decides beside the flags of every recipe (common/cli.py); all else
#    is transformers.TrainingArguments.
@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    use_lora: bool = field(default=True, metadata={"help": "train an adapter; false: all weights"})
    lora_r: int = field(default=8, metadata={"help": "rank"})
    lora_alpha: int = field(
        default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout on the adapter's input"})
    target_modules: str = field(
        default="attention",
        metadata={
            "help": "attention (query_key_value, or q,k,v_proj), all (every linear layer) or names "
            "of layers with commas"
        },
    )


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=3,
    learning_rate=2e-4,
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
TINY = dict(  # sizes and steps only
    model_max_length=256,
    num_train_epochs=6,
    learning_rate=3e-3,
    adam_beta2=0.98,
    warmup_steps=0.1,
    lora_r=16,
    lora_dropout=0.0,
    target_modules="all",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    logging_steps=40,
    save_steps=400,
    eval_ratio=0.1,
    eval_generate=100,
    max_new_tokens=48,
)
CHAT_FORMAT = "[Round 0123456789]\n问：\n答："  # the characters that it adds to the texts


def resolve_args(args: Args) -> None:
    """Refuse what cannot work; the data that is used where none is named."""
    if args.model_max_length < 32:
        raise cli.usage_error(
            f"--model_max_length {args.model_max_length}: no question fits; give 32 or more"
        )
    if not args.data_path:
        args.data_path = str(HERE / "data")


def tiny_model(texts: list[str], taught: bool) -> str:
    """Folder of the embedded default: ChatGLM's architecture at toy size, its tokenizer trained on
    the data at hand.

    taught: it knows the facts of the samples (see tiny_base); else its weights are random.
    """
    folder = cache_root() / "tiny"
    vocabulary = train_sentencepiece([*texts, CHAT_FORMAT], 4000, folder)
    tokenizer = ChatGLMTokenizer(str(vocabulary))
    config = ChatGLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=640,
        max_sequence_length=512,
        initializer_range=0.05,
        residual_scale_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    lesson = partial(teach, tokenizer=tokenizer) if taught else None
    return tiny.save_tiny(config, tokenizer, folder, teach=lesson)


# 2. Model and tokenizer
def is_prefix_model(config) -> bool:
    """ChatGLM-6B itself, whose prompt is a two-sided prefix; the others are causal."""
    return isinstance(config, ChatGLMConfig)


def load_model(args: Args, training: TrainingArguments, path: str, config):
    """The model in the dtype it trains in: the half dtype for a frozen base, float32 masters for
    full training (DeepSpeed makes its own)."""
    settings = {"dtype": load_dtype(training, trains_all=not args.use_lora)}
    if not is_prefix_model(config):
        settings["attn_implementation"] = attention.register()
    model = models.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
    # from here on the output's `logits` are no logits, but sums of the loss: they are never built
    losses.use_chunked_loss(model)
    if args.use_lora:
        return add_lora(model, args, training)
    return model


def target_names(args: Args, config) -> str:
    """--target_modules in the names of this model's layers."""
    words = {
        "attention": "query_key_value" if is_prefix_model(config) else "q_proj,k_proj,v_proj",
        "all": "all-linear",
    }
    return words.get(args.target_modules, args.target_modules)


def add_lora(model, args: Args, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model

    if cli.recompute(training):
        model.enable_input_require_grads()
    names = target_names(args, model.config)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=adapter.linear_layers(model, names),
    )
    return get_peft_model(model, config)


# 3. Data
def is_learned(turn: dict) -> bool:
    return turn["role"] == "assistant" and turn.get("train", True)


def encode(row: dict, tokenizer, args: Args, every_answer: bool) -> list[dict]:
    """A canonical chat row -> rows of input_ids [T], labels [T] on what is trained.

    every_answer: one row for each answer, with what came before it (a prefix model learns one
        answer a row).
    """
    messages = row["messages"]
    ends = [len(messages)]
    if every_answer:
        ends = [i + 1 for i, turn in enumerate(messages) if is_learned(turn)]
    rows = []
    for end in ends:
        encoded = encode_chat(tokenizer, messages[:end], args.model_max_length, row.get("tools"))
        if encoded:
            rows.append(encoded)
    return rows


def count_conversations(stats: dict, train_ids, eval_ids) -> None:
    """Rows in the report are those of the files, though each may have given several answers."""
    stats["answers"] = len(train_ids)
    stats["used"] = len(set(train_ids["source"]))
    stats["held_out"] = len({row["source"] for row in eval_ids})
    cli.say(f"  answers of {stats['used']:,} conversations, and of {stats['held_out']:,} held out")


def windows(args: Args, training: TrainingArguments, token_rows):
    """Token rows -> the dataset whose items make a batch: packed windows, or single rows."""
    if args.packing:
        return collators.PackedDataset(token_rows, args.model_max_length, training.seed)
    return collators.NumberedRows(token_rows)


def with_layout(items: list, collate, config) -> dict:
    """The batch of a collator of common/, and where prefixes end and the two positions of each
    token.

    The same `layout` that generation calls; computed here, on the CPU, so that training waits for
    no device.
    """
    batch = collate(items)
    prefix_lengths, position_ids = layout(
        config, batch["input_ids"], batch.get("attention_mask"), batch.get("cu_seq_lens_q")
    )
    return batch | {"prefix_lengths": prefix_lengths, "position_ids": position_ids}


def collator(args: Args, training: TrainingArguments, tokenizer, config):
    """What makes a batch of the items of `windows`."""
    if not is_prefix_model(config):
        return collators.collator(args.packing, tokenizer, training)
    beginning = [config.gmask_token_id, config.bos_token_id]
    collate = collators.collator(args.packing, tokenizer, training, beginning)
    return partial(with_layout, collate=collate, config=config)


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    is_sample = not args.data_path
    resolve_args(args)
    set_seed(training.seed)
    is_tiny = args.model_name_or_path == "tiny"
    if not is_tiny:
        # fail on a wrong name before anything is read or replaced
        models.check_model(args.model_name_or_path)

    rows, stats = load_rows(
        args.data_path, "chat", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    base = tiny_model(rows["row"][:5000], is_sample) if is_tiny else args.model_name_or_path
    config = models.model_config(base)
    memory_check.recompute_large(args, training, config)
    tokenizer = models.load(AutoTokenizer, base)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir, tokenizer=tokenizer)

    flags.check_window(args, config, tokenizer)
    every_answer = is_prefix_model(config)
    train_ids, eval_ids, eval_rows = prepare(
        rows,
        stats,
        partial(encode, tokenizer=tokenizer, args=args, every_answer=every_answer),
        args,
        kind="chat",
        seed=training.seed,
        depends_on=[fingerprint(tokenizer), every_answer],
    )
    count_conversations(stats, train_ids, eval_ids)
    shown = [train_ids[0][name][:200] for name in ("input_ids", "labels")]
    cli.say(preview(tokenizer, *shown, color=sys.stdout.isatty()))

    train_windows = windows(args, training, train_ids)
    memory_check.check(args, training, config, train_windows, targets=target_names(args, config))
    model = load_model(args, training, base, config)
    asked = pick_eval_rows(eval_rows, eval_ids, args.eval_generate)
    prompt_of = partial(encode_prompt, tokenizer)
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train_windows,
        eval_dataset=windows(args, training, eval_ids),
        data_collator=collator(args, training, tokenizer, config),
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
