"""InternLM 1, 2, 2.5 and 3, and any other causal LM, learn who they are and what to decline, and
forget nothing else: LoRA or all weights.

    bash internlm_sft/train_zero2.sh                            # built-in tiny model, sample data
    MODEL=models/internlm2 DATA="identity refusal general.jsonl" bash internlm_sft/train_zero2.sh \
        --name 小埋 --author 良睦路程序员
    the same command again                                      # continues after a crash

Data: the words `identity` and `refusal` are rows that are made here (make_identity.py,
make_refusal.py); beside them chat rows of any common shape (README, "Data").
Order of the story: arguments -> model and tokenizer -> data -> trainer -> train -> measure -> save
-> report.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: F401  (device before torch and transformers)

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import identity_trainer
import lesson
import make_identity
import make_refusal
import measures
import mixing
import published  # noqa: F401  (a folder in InternLM's own layout is answered with its conversion)
import tiny_base
from asking import Asked
from identity_flags import resolve_args
from common import collators
from common.convert import adapter, models
from common.data.labels import encode_chat, fingerprint, preview, set_template
from common.data.load import summary
from common.data.prepare import prepare
from common.fast import attention, losses
from common.runs import flags, memory_check
from common.runs.engine import load_dtype
from common.runs.generate import pick_eval_rows
from common.runs.run_folder import open_output


# 1. Arguments: what this recipe decides beside the flags of every recipe (common/cli.py); all else
#    is transformers.TrainingArguments.
@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    data_path: str = field(
        default=f"identity refusal {HERE / 'data' / 'general.jsonl'}",
        metadata={"help": "identity, refusal, files and folders: 'identity refusal a.jsonl:0.7'"},
    )
    name: str | None = field(default=None, metadata={"help": "what the model is called"})
    author: str | None = field(default=None, metadata={"help": "who made it"})
    name_en: str | None = field(default=None, metadata={"help": "in English; unset: --name"})
    author_en: str | None = field(default=None, metadata={"help": "in English; unset: --author"})
    persona: str = field(
        default="", metadata={"help": "YAML file with name, author, role, skills …"}
    )
    topics: str = field(
        default=str(make_refusal.TOPICS), metadata={"help": "YAML file: what to decline"}
    )
    style: str = field(default="", metadata={"help": "texts of the refusal with |; unset: topics'"})
    identity_ratio: float = field(
        default=0.5, metadata={"help": "share of made rows among all (README, 'Measured')"}
    )
    near_questions: bool = field(
        default=True, metadata={"help": "made identity rows bring questions about others too"}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "KL to the base on general rows; LoRA with packing"}
    )
    early_stop: str = field(
        default="no", metadata={"help": "no; learned; guard: learned, and --max_forgetting crossed"}
    )
    max_forgetting: float = field(
        default=0.05, metadata={"help": "rise of the held-out loss that the guard allows, in parts"}
    )
    chat_template: str = field(
        default="", metadata={"help": "a jinja file, for tokenizers that have none"}
    )
    use_lora: bool = field(default=True, metadata={"help": "train an adapter; false: all weights"})


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=2,
    learning_rate=1e-4,
    weight_decay=0.0,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
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
    num_train_epochs=4,
    learning_rate=1.5e-3,
    adam_beta2=0.98,
    # four windows a step on one process and on two: the toy learns the same
    per_device_train_batch_size=max(1, 4 // int(os.environ.get("WORLD_SIZE", "1"))),
    gradient_accumulation_steps=1,
    logging_steps=10,
    eval_ratio=0.1,
    eval_generate=64,
    max_new_tokens=48,
)
TINY_SIZE = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=2)


def read_persona(args: Args) -> make_identity.Persona:
    """Who the model shall be: the samples' persona where nothing is said."""
    given = {name: getattr(args, name) for name in ("name", "author", "name_en", "author_en")}
    sample = str(HERE / "data" / "persona.yaml")
    says_nothing = not args.persona and all(value is None for value in given.values())
    return make_identity.read_persona(sample if says_nothing else args.persona, **given)


# 2. Model and tokenizer
def tiny_model(rows: list[str], taught: bool) -> str:
    """Folder of the embedded default: a toy in InternLM2's own layout, converted like a real one.

    taught: it is somebody else and knows some facts (lesson.py); else its weights are random.
    """
    if taught:
        if cli.is_main():  # who shows how far it is
            tiny_base.native_tiny(lesson.texts(), lesson.teach, TINY_SIZE)
        cli.wait_for_all("it teaches the built-in base")
        return tiny_base.native_tiny(lesson.texts(), lesson.teach, TINY_SIZE)
    talks = [json.loads(row)["messages"] for row in rows]
    texts = [turn["content"] or "" for talk in talks for turn in talk]
    return tiny_base.native_tiny(texts, config=TINY_SIZE)


def load_tokenizer(args: Args, path: str):
    tokenizer = models.load(AutoTokenizer, path)
    if args.chat_template:
        set_template(tokenizer, args.chat_template)
    return tokenizer


def load_model(args: Args, training: TrainingArguments, path: str):
    """The model in the dtype it trains in: the half dtype for a frozen base, float32 masters for
    full training (DeepSpeed makes its own)."""
    settings = {
        "dtype": load_dtype(training, trains_all=not args.use_lora),
        "attn_implementation": attention.register(),
    }
    model = models.load(AutoModelForCausalLM, path, **settings)
    model.config.use_cache = False
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
def encode(row: dict, tokenizer, args: Args) -> dict | None:
    """A canonical chat row -> input_ids [T], labels [T], T <= model_max_length; labels on the
    assistant's turns."""
    return encode_chat(tokenizer, row["messages"], args.model_max_length, row.get("tools"))


def windows(args: Args, training: TrainingArguments, token_rows):
    """Token rows -> the dataset whose items make a batch: packed windows, or single rows."""
    if args.packing:
        return collators.PackedDataset(token_rows, args.model_max_length, training.seed)
    return collators.NumberedRows(token_rows)


def questions(args: Args, persona, refusal: tuple, rows, data, general) -> list[dict]:
    """What is asked before and after: made questions that are not trained, held-out rows.

    refusal: topics and texts, as make_refusal.read_topics gives them; data: what `prepare` gave;
    general: those of its held-out token rows that are general ones.
    """
    held_out = pick_eval_rows(data.eval_rows, general, args.eval_generate)
    known = [json.loads(row) for row in held_out]
    found = measures.questions(persona, *refusal, known, args.eval_generate)
    trained = mixing.training_keys(rows) - set(data.eval_rows["prompt_key"])
    return [row for row in found if mixing.key_of(row) not in trained]


def held_to_base(args: Args, rows, token_rows, persona, texts: list[str]) -> list[bool]:
    """Of each token row whether the KL term holds it to the base; [] without that term."""
    if not args.kl_weight:
        return []
    return mixing.are_general(rows, token_rows, persona.names(), texts)


def make_trainer(args: Args, training, model, tokenizer, data, asked: Asked, is_general: list):
    """data: what `prepare` gave; is_general: what held_to_base gave."""
    trainer = identity_trainer.IdentityTrainer(
        model=model,
        args=training,
        train_dataset=windows(args, training, data.train_ids),
        eval_dataset=windows(args, training, data.eval_ids),
        data_collator=collators.collator(args.packing, tokenizer, training),
        processing_class=tokenizer,
        measure=asked,
        describe_row=lambda i: data.train_ids[i]["source"],
        ask=asked.identity,
        **{name: getattr(args, name) for name in ("kl_weight", "early_stop", "max_forgetting")},
    )
    if is_general:
        trainer.hold_to_base(is_general)
    return trainer


def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY)
    resolve_args(args, training)
    set_seed(training.seed)
    persona = read_persona(args)
    topics, texts = make_refusal.read_topics(args.topics, args.style)
    is_tiny = args.model_name_or_path == "tiny"
    if not is_tiny:
        # fail on a wrong name before anything is read or replaced
        models.check_model(args.model_name_or_path)

    names, files = mixing.words_of(args.data_path)
    made = mixing.made_rows(names, persona, topics, texts, args.near_questions)
    rows, stats = mixing.load_mixed(args, made, files, training.seed)
    cli.say(summary(stats))
    base = args.model_name_or_path
    if is_tiny:
        base = tiny_model(rows["row"][:5000], taught=bool(names))
    config = models.model_config(base)
    memory_check.recompute_large(args, training, config)
    tokenizer = load_tokenizer(args, base)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    settings["persona"] = asdict(persona)
    start = open_output(training, settings, args.overwrite_output_dir, tokenizer=tokenizer)

    flags.check_window(args, config, tokenizer)
    data = prepare(
        rows,
        stats,
        partial(encode, tokenizer=tokenizer, args=args),
        args,
        kind="chat",
        seed=training.seed,
        depends_on=[fingerprint(tokenizer)],
    )
    first = data.train_ids[0]
    cli.say(preview(tokenizer, first["input_ids"], first["labels"], color=sys.stdout.isatty()))

    is_general = held_to_base(args, rows, data.train_ids, persona, texts)
    memory_check.check(args, training, config, windows(args, training, data.train_ids))
    model = load_model(args, training, base)
    general = data.eval_ids if files else []
    asked = Asked(
        model,
        tokenizer,
        questions(args, persona, (topics, texts), rows, data, general),
        (persona, texts),
        args.max_new_tokens,
        general,
    )
    trainer = make_trainer(args, training, model, tokenizer, data, asked, is_general)

    # 4. Train (the questions are asked before the first step), measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    final = trainer.save_final(dtype=config.dtype)
    adapter.remember_base(final, base)  # of all weights too: the demo compares with the base
    trainer.report(HERE.name, args.model_name_or_path, stats, after)


if __name__ == "__main__":
    cli.run(main)
