"""ChatGLM-6B with LoRA on one or many cards; ChatGLM2/3 (converted, see convert.py) and other
native decoders by path.

    bash chatglm_lora/train_zero2.sh                                                  # built-in tiny model, sample data
    MODEL=THUDM/chatglm-6b DATA=my.jsonl OUTPUT=out bash chatglm_lora/train_zero2.sh
    MODEL=models/chatglm3-native DATA=my.jsonl OUTPUT=out bash chatglm_lora/train_zero3.sh --target_modules all
    the same command again                                                            # continues after a crash

Data: chat rows of any common shape, e.g. {"instruction": str, "input": str, "output": str} or
{"content": str, "summary": str, "history": [[question, answer], ...]} per line. Each answer of a
conversation is a row of its own: the question and all before it become the prefix, then [gMASK]
<sop> answer <eop>, and the loss is on answer <eop>. Order of the story: arguments -> model and
tokenizer -> data -> trainer -> train -> measure -> save -> report.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli  # before torch and transformers: it brings the device

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from common import collators, tiny
from common.convert import adapter
from common.fast import attention, losses
from common.data.labels import encode_chat, encode_prompt, fingerprint, preview
from common.data.cache import cache_root
from common.data.load import load_rows, summary
from common.data.tokens import tokenise_split
from common.data.split import leak_check, split_rows
from common.runs.generate import answer_eval_rows, pick_eval_rows
from common.runs.run_folder import open_output
from common.trainer import RecipeTrainer
from modeling_chatglm import ChatGLMConfig, layout
from tiny_base import teach
from tokenization_chatglm import ChatGLMTokenizer, train_sentencepiece


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
        default=1024, metadata={"help": "window in tokens; longer rows lose oldest rounds"}
    )
    packing: bool = field(
        default=True, metadata={"help": "several rows a window, each blind to the others"}
    )
    use_lora: bool = field(default=True, metadata={"help": "train an adapter; false: all weights"})
    lora_r: int = field(default=8, metadata={"help": "rank"})
    lora_alpha: int = field(
        default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout on the adapter's input"})
    target_modules: str = field(
        default="attention",
        metadata={
            "help": "attention (query_key_value, or q,k,v_proj), all (every linear layer) or names with commas"
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
    learning_rate=2e-4,
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


ROUND = "[Round 0123456789]\n问：\n答："  # what the chat format adds to the texts


def tiny_model(texts: list[str], taught: bool) -> str:
    """Folder of the embedded default: ChatGLM's architecture at toy size, its tokenizer trained on
    the data at hand.

    taught: it knows the facts of the samples (see tiny_base); else its weights are random.
    """
    folder = cache_root() / "tiny"
    tokenizer = ChatGLMTokenizer(str(train_sentencepiece([*texts, ROUND], 4000, folder)))
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
    return tiny.save_tiny(
        config, tokenizer, folder, teach=partial(teach, tokenizer=tokenizer) if taught else None
    )


# 2. Model and tokenizer
def load_model(args: Args, training: TrainingArguments, path: str, config):
    """The model in the dtype it trains in: the half dtype for a frozen base, float32 masters for
    full training."""
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    settings = {"dtype": half if args.use_lora else torch.float32}
    if not isinstance(config, ChatGLMConfig):
        settings["attn_implementation"] = attention.register()
    model = cli.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
    losses.use_chunked_loss(model)
    return add_lora(model, args, training) if args.use_lora else model


def add_lora(model, args: Args, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model

    if getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing:
        model.enable_input_require_grads()
    own = "query_key_value" if is_prefix_model(model.config) else "q_proj,k_proj,v_proj"
    named = {"attention": own, "all": "all-linear"}.get(args.target_modules, args.target_modules)
    targets = adapter.linear_layers(model, named)
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


def is_prefix_model(config) -> bool:
    """ChatGLM-6B itself, whose prompt is a two-sided prefix; the others are causal."""
    return isinstance(config, ChatGLMConfig)


# 3. Data
def encode(row: dict, tokenizer, args: Args, every_answer: bool) -> list[dict]:
    """A canonical chat row -> rows of input_ids [T], labels [T] on what is trained.

    every_answer: one row for each answer, with what came before it (a prefix model learns one
        answer a row).
    """
    messages = row["messages"]
    ends = (
        [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
        if every_answer
        else [len(messages)]
    )
    rows = [
        encode_chat(tokenizer, messages[:end], args.model_max_length, row.get("tools"))
        for end in ends
    ]
    return [encoded for encoded in rows if encoded]


def split_and_encode(
    rows, stats: dict, args: Args, training: TrainingArguments, tokenizer, every_answer: bool
):
    """Rows -> train and held-out rows as token ids, the held-out rows as read; completes the counts
    in `stats`."""
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=training.seed)
    if args.leak_check:
        train, leaked = leak_check(train, args.leak_check, "chat", args.column_map or None)
        stats["dropped"]["in test file"] = leaked
    code = Path(__file__).read_text(encoding="utf-8")  # an edited `encode` makes new rows
    key = json.dumps([code, fingerprint(tokenizer), args.model_max_length, every_answer])
    encoder = partial(encode, tokenizer=tokenizer, args=args, every_answer=every_answer)
    train_ids, eval_ids, counts = tokenise_split(train, held_out, encoder, key)
    stats["dropped"] |= counts["dropped"]
    for reason, n in counts["dropped"].items():
        cli.say(f"  {n:,} dropped: {counts['examples'].get(reason, reason)}")
    used, kept = (
        len(set(train_ids["source"])),
        len({row["source"] for row in eval_ids}),
    )  # conversations
    stats |= {
        "used": used,
        "held_out": kept,
        "answers": len(train_ids),
        "truncated": counts["truncated"],
    }
    return train_ids, eval_ids, held_out


class WithLayout:
    """A collator of common/ and, for a prefix model, where prefixes end and the two positions of
    each token.

    The same `layout` that generation calls; computed here, on the CPU, so that training waits for
    no device.
    """

    def __init__(self, collate, config):
        self.collate, self.config = collate, config

    def __call__(self, rows) -> dict:
        batch = self.collate(rows)
        found = layout(
            self.config, batch["input_ids"], batch.get("attention_mask"), batch.get("cu_seq_lens_q")
        )
        return batch | dict(zip(("prefix_lengths", "position_ids"), found, strict=True))


def batches(args: Args, training: TrainingArguments, tokenizer, config, rows):
    """Token rows -> what one item of a batch is, and the collator."""
    packed, padded = collators.PackedCollator(), collators.PaddedCollator(tokenizer.pad_token_id)
    collate = packed if args.packing else padded
    collate = WithLayout(collate, config) if is_prefix_model(config) else collate
    if args.packing:
        return collators.PackedDataset(rows, args.model_max_length, training.seed), collate
    return collators.NumberedRows(rows), collate


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    is_tiny = args.model_name_or_path == "tiny"
    given = args.data_path
    args.data_path = given or str(HERE / "data")
    set_seed(training.seed)
    if args.model_max_length < 32:
        raise cli.usage_error(
            f"--model_max_length {args.model_max_length}: no question fits; give 32 or more"
        )
    if not is_tiny:
        cli.model_config(
            args.model_name_or_path
        )  # a wrong name is told before anything is read or replaced

    rows, stats = load_rows(
        args.data_path, "chat", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(training, settings, args.overwrite_output_dir)

    base = tiny_model(rows["row"][:5000], taught=not given) if is_tiny else args.model_name_or_path
    config, tokenizer = cli.model_config(base), cli.load(AutoTokenizer, base)
    if args.model_max_length > config.max_position_embeddings:
        cli.say(
            f"warning: --model_max_length above the {config.max_position_embeddings} positions the model has learned"
        )
    prefix = is_prefix_model(config)
    train_ids, eval_ids, held_out = split_and_encode(
        rows, stats, args, training, tokenizer, every_answer=prefix
    )
    told = "split: {used:,} rows ({answers:,} answers) to train on, {held_out:,} held out, {truncated:,} answers shortened"
    cli.say(told.format(**stats))
    shown = [train_ids[0][name][:200] for name in ("input_ids", "labels")]
    cli.say(preview(tokenizer, *shown, color=sys.stdout.isatty()))

    model = load_model(args, training, base, config)
    train_set, collator = batches(args, training, tokenizer, config, train_ids)
    eval_set = batches(args, training, tokenizer, config, eval_ids)[0] if len(eval_ids) else None

    ask = lambda turns, tools: encode_prompt(tokenizer, turns, tools)  # noqa: E731
    asked = pick_eval_rows(held_out, eval_ids, args.eval_generate)
    measure = partial(answer_eval_rows, model, tokenizer, asked, ask, args.max_new_tokens)
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
