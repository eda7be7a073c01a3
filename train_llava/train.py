"""A LLaVA in two stages: its projector on captions, then the language model on questions about
pictures. Whole, by adapters, or one part at a time.

    bash train_llava/train_zero2.sh                             # built-in tiny model, both stages
    python train_llava/build_model.py --llm Qwen/Qwen3-4B \
        --vision openai/clip-vit-large-patch14-336 --output my_llava
    MODEL=my_llava DATA=captions.json OUTPUT=output/stage1 bash train_llava/train_stage1.sh \
        --image_folder pictures
    MODEL=output/stage1/final DATA=questions.json bash train_llava/train_stage2.sh \
        --image_folder pictures --train_type lora
    the same command again                                      # continues after a crash

Data: LLaVA's json, LLaMA-Factory's, messages with typed parts, or rows of text and picture (README,
"Data"), e.g. {"image": path, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}.
Order of the story: arguments -> model and processor -> data -> pictures -> trainer -> train ->
measure -> save -> report.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # device before torch and transformers

from transformers import TrainingArguments, set_seed

import batches
import llava_flags
import parts
from answers import ask_held_out
from batches import LlavaCollator, PaddedLlavaCollator, PictureRows, PictureWindows
from common.data.labels import fingerprint, preview
from common.data.prepare import prepare
from common.fast import losses, norms, rotary, shared_start
from common.runs import flags, memory_check
from common.runs.engine import engine
from common.runs.generate import pick_eval_rows
from common.runs.run_folder import open_output
from encoding import check_window, collapsed, encode
from features import PictureSource, keep_features
from last_layer import only_at_labels
from memory import memory_facts
from model import (
    check_model,
    check_projector,
    find_model,
    open_model,
    tokens_per_picture,
    whole_weights,
)
from rows import describe, load_rows_with_pictures
from sight import Normaliser, for_training
from tiny_base import tiny_model
from trainer import LlavaTrainer


def number(default, what: str):
    return field(default=default, metadata={"help": what})


# 1. Arguments: what this recipe decides beside the flags of every recipe (common/cli.py); all else
#    is transformers.TrainingArguments.
@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    train_type: str = field(
        default="freeze_vision",
        metadata={"help": "what moves; the rest keeps every bit", "choices": [*parts.TRAINED]},
    )
    projector_learning_rate: float | None = number(None, "unset: LLaVA-1.5's for the stage")
    vision_learning_rate: float | None = number(None, "of a tower that trains; unset: 2e-6")
    lora_vision: bool = number(False, "adapters in the vision tower too")
    image_folder: str = number("", "folder that pictures' names begin at, and may not leave")
    allow_urls: bool = number(False, "fetch pictures that rows name by their address")
    bad_picture_limit: float = number(0.2, "share of pictures that may turn out torn")
    model_max_length: int = number(2048, "window in tokens, those of pictures included")
    max_images_per_bin: int = number(16, "pictures that may stand in one packed window")
    share_images: bool = number(True, "rows about one picture stand behind it together")
    stage_1: str = number("", "of the built-in model: folder of its first stage, to go on from")
    feature_cache_gb: float = number(50.0, "room for what a frozen tower says; 0: run it each step")


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=1,
    learning_rate=llava_flags.RATE,
    weight_decay=0.0,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
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
TINY = dict(  # sizes and steps only
    model_max_length=256,
    num_train_epochs=8,
    learning_rate=3e-3,
    adam_beta2=0.98,
    weight_decay=0.05,
    warmup_steps=0.1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    logging_steps=20,
    eval_ratio=0.1,
    eval_generate=260,  # all that are held out
    max_new_tokens=24,
)


# 2. Model
def load_model(args: Args, training: TrainingArguments, path: str, config, processor):
    """The model with what moves and what does not, its forward that of sight.for_training."""
    own_masters = not engine(training).startswith("zero")
    settings = {
        # frozen parts as they are stored, so that they are saved so too
        "dtype": config.dtype if own_masters else device.train_dtype(training),
        "attn_implementation": shared_start.register(),
    }
    model = open_model(path, **settings)
    parts.choose_trained(model, args.train_type, args.lora_vision)
    for_training(model, Normaliser(processor.image_processor))
    losses.use_chunked_loss(model)
    norms.use_fast_norms(model)
    rotary.use_fast_rotary(model)
    if args.use_lora:
        model = parts.add_lora(model, args, cli.recompute(training))
    only_at_labels(model)
    if own_masters:
        parts.as_masters(model)
    for one in (model.config, model.config.get_text_config()):
        one.use_cache = False
    return model


def look_at_pictures(args: Args, training: TrainingArguments, path: str, model, source):
    """Let a frozen tower see every picture once, where the room for that is there."""
    if "vision tower" in parts.TRAINED[args.train_type] or args.lora_vision:
        return
    if not args.feature_cache_gb or not len(source.places):
        return
    tower_owner = losses.without_adapter(model)
    if engine(training) == "zero-3":  # which has spread the tower
        with whole_weights(training):
            tower_owner = open_model(path, dtype=device.train_dtype(training))
        parts.choose_trained(tower_owner, "projector")
    workers = training.dataloader_num_workers
    dtype = device.train_dtype(training)
    keep_features(source, tower_owner, dtype, training.device, args.feature_cache_gb, workers)


# 3. Data
def samples(args: Args) -> str:
    return str(HERE / "data" / llava_flags.SAMPLES.get(args.train_type, "questions"))


def tiny_texts(rows) -> list[str]:
    """What the tiny tokenizer learns from: both stages' samples, so that both stages share it."""
    files = sorted((HERE / "data").glob("*/*.json"))
    return [*(file.read_text(encoding="utf-8") for file in files), *rows["row"][:5000]]


def load_data(args: Args, training: TrainingArguments):
    """-> rows, the places of their pictures, counts."""
    rows, places, stats = load_rows_with_pictures(
        args.data_path or samples(args),
        args.image_folder,
        args.column_map or None,
        args.strict_data,
        seed=training.seed,
        allow_urls=args.allow_urls,
    )
    cli.say(describe(stats))
    return rows, places, stats


def to_tokens(args: Args, training: TrainingArguments, rows, stats: dict, processor):
    """-> token rows to train on, token rows held out, held-out rows as they were read."""
    known = {
        "image_token_id": processor.image_token_id,
        "image_tokens": tokens_per_picture(processor),
    }
    tokenizer = processor.tokenizer
    train_ids, eval_ids, eval_rows = prepare(
        rows,
        stats,
        partial(encode, tokenizer=tokenizer, max_length=args.model_max_length, **known),
        args,
        kind="chat",
        seed=training.seed,
        depends_on=[fingerprint(tokenizer), known],
        columns=batches.COLUMNS,
    )
    first = collapsed(train_ids[0]["input_ids"], train_ids[0]["labels"], processor.image_token_id)
    cli.say(preview(tokenizer, *first, color=sys.stdout.isatty()))
    return train_ids, eval_ids, eval_rows


def settle_sharing(args: Args, config) -> None:
    """Without --share_images where the model's attention is not the packed one."""
    why = batches.why_not_shared(config.get_text_config(), args.model_max_length)
    if args.packing and args.share_images and why:
        cli.say(f"note: every row has its picture for itself (--share_images false): {why}")
        args.share_images = False


def windows(args: Args, training: TrainingArguments, token_rows, processor):
    """Token rows -> the dataset whose items make a batch: packed windows, or single rows."""
    if not args.packing:
        return PictureRows(token_rows)
    shared = processor.image_token_id if args.share_images else None
    limits = (args.model_max_length, args.max_images_per_bin)
    image_tokens = tokens_per_picture(processor)
    return PictureWindows(token_rows, *limits, training.seed, shared, image_tokens)


def collator(args: Args, training: TrainingArguments, source: PictureSource, processor):
    if args.packing:
        image_tokens = tokens_per_picture(processor)
        multiple = device.length_multiple(device.train_dtype(training))
        return LlavaCollator(source, processor.image_token_id, image_tokens, multiple)
    return PaddedLlavaCollator(source, processor.tokenizer.pad_token_id)


def main() -> None:
    argv = llava_flags.spelled_out(sys.argv[1:])
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY, argv)
    llava_flags.resolve(args, training)
    set_seed(training.seed)
    is_tiny = args.model_name_or_path == "tiny"
    if not is_tiny:  # fail on a wrong name before anything is read or replaced
        args.model_name_or_path = find_model(args.model_name_or_path)
        check_model(args.model_name_or_path)
        check_projector(args.model_name_or_path)

    rows, places, stats = load_data(args, training)
    base = args.stage_1 or args.model_name_or_path
    if base == "tiny":
        base = tiny_model(tiny_texts(rows))
    config, processor = check_model(base, "--stage_1" if args.stage_1 else "--model_name_or_path")
    memory_check.recompute_large(args, training, config.text_config)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    tokenizer = processor.tokenizer
    start = open_output(training, settings, args.overwrite_output_dir, tokenizer=tokenizer)

    check_window(tokens_per_picture(processor), args.model_max_length)
    flags.check_window(args, config, tokenizer)
    settle_sharing(args, config)
    train_ids, eval_ids, eval_rows = to_tokens(args, training, rows, stats, processor)
    train_windows = windows(args, training, train_ids, processor)
    cli.say(train_windows.describe())
    more = memory_facts(args, training, config, processor.image_processor, train_windows)
    memory_check.check(args, training, config.text_config, train_windows, **more)

    model = load_model(args, training, base, config, processor)
    source = PictureSource(places, processor.image_processor)
    look_at_pictures(args, training, base, model, source)
    asked = pick_eval_rows(eval_rows, eval_ids, args.eval_generate)
    trainer = LlavaTrainer(
        model=model,
        args=training,
        train_dataset=train_windows,
        eval_dataset=windows(args, training, eval_ids, processor) if eval_ids else None,
        data_collator=collator(args, training, source, processor),
        processing_class=processor,
        measure=partial(ask_held_out, model, processor, asked, source, args.max_new_tokens),
        describe_row=lambda i: train_ids[i]["source"],
        rates=parts.rates(args, training),
        base=base,
        bad_picture_limit=args.bad_picture_limit,
    )

    # 4. Train (the held-out rows are measured before the first step), measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    trainer.save_final(dtype=config.dtype)
    trainer.report(HERE.name, args.model_name_or_path, stats, after)


if __name__ == "__main__":
    cli.run(main)
