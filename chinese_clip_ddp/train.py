"""Chinese text-image embeddings: ChineseCLIP, CLIP, SigLIP, or any text encoder beside any vision
tower.

    bash chinese_clip_ddp/train_zero2.sh                        # built-in tiny model, sample data
    MODEL=OFA-Sys/chinese-clip-vit-base-patch16 DATA=pairs.csv bash chinese_clip_ddp/train_zero2.sh
    DATA=pairs.csv bash chinese_clip_ddp/train_ddp_text_image.sh \
        --text_model_name_or_path BAAI/bge-base-zh-v1.5 \
        --image_model_name_or_path google/siglip2-base-patch16-224 --train image
    the same command again                                      # continues after a crash

Data: rows of text and picture of any common layout (README, "Data"), e.g. {"text": str, "image":
path} per line.
Order of the story: arguments -> model -> data -> trainer -> train -> measure -> save -> report.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # device before torch and transformers

from transformers import TrainingArguments, set_seed

import assemble
import clip_flags
import towers
from batches import PairDataset, PictureFaults, check_captions
from common.convert import models
from common.data.split import describe_split, split_rows
from common.runs import plan
from common.runs.engine import load_dtype
from common.runs.run_folder import open_output
from contrastive import KINDS, MODES
from feature_cache import Collator, Pairs
from model import (
    Embedder,
    fingerprint_of,
    load_preparation,
    open_model,
    refuse_other_models,
    whole_weights,
)
from modeling_two_towers import IMAGE_POOLINGS, POOLINGS, PROJECTIONS
from rows import describe, load_pairs
from tiny_base import tiny_model
from trainer import ContrastiveTrainer


def choice(default: str, among, what: str):
    return field(default=default, metadata={"help": what, "choices": list(among)})


# 1. Arguments: what this recipe decides; all else is transformers.TrainingArguments.
@dataclass
class Args(cli.LoraArgs):
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "folder or hub id; 'tiny' builds a small one"}
    )
    text_model_name_or_path: str = field(
        default="", metadata={"help": "with --image_model_name_or_path: two towers of your choice"}
    )
    image_model_name_or_path: str = field(default="", metadata={"help": "the vision tower"})
    pooling: str = choice("cls", POOLINGS, "of the text tower of your choice")
    image_pooling: str = choice("own", IMAGE_POOLINGS, "of the vision tower of your choice")
    projection: str = choice("linear", PROJECTIONS, "behind both towers of your choice")
    projection_dim: int = field(default=512, metadata={"help": "width of the embeddings"})

    train: str = choice("both", towers.TRAINED, "what moves; the rest keeps every bit")
    lora_towers: str = field(
        default="",
        metadata={"help": "text,image: adapters there; --use_lora: where --train moves"},
    )
    text_learning_rate: float | None = field(default=None, metadata={"help": "of the text tower"})
    image_learning_rate: float | None = field(default=None, metadata={"help": "of the image tower"})
    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "of the projections"}
    )

    loss: str = choice("softmax", KINDS, "CLIP's or SigLIP's")
    cross_embedding: str = choice(
        "exact", MODES, "how ranks share negatives; the others are there to be compared with"
    )
    grad_cache_chunk: int = field(
        default=0, metadata={"help": "pairs of a rank that are computed at a time; 0: all"}
    )
    mask_duplicates: bool = field(
        default=True, metadata={"help": "equal captions of a batch are no negatives of each other"}
    )
    image_mask_ratio: float = field(
        default=0.0, metadata={"help": "share of patches left out in training (FLIP)"}
    )
    cache_features: bool = field(
        default=True, metadata={"help": "compute a frozen tower once, not in every epoch"}
    )
    teacher_name_or_path: str = field(
        default="", metadata={"help": "a larger text-image model to learn similarities from"}
    )
    teacher_weight: float = field(default=1.0, metadata={"help": "of that part of the loss"})

    data_path: str = field(
        default=str(HERE / "data"),
        metadata={"help": "files or folders, with weights: 'a.csv:0.7 shards:0.3'"},
    )
    image_root: str = field(default="", metadata={"help": "folder that pictures' names begin at"})
    column_map: str = field(default="", metadata={"help": "rename columns: 'text=标题,image=图片'"})
    strict_data: bool = field(
        default=False, metadata={"help": "a bad row is an error, not counted and left out"}
    )
    bad_picture_limit: float = field(
        default=0.2, metadata={"help": "share of pictures that may be missing or torn"}
    )
    eval_ratio: float = field(default=0.05, metadata={"help": "share held out"})
    max_eval_samples: int = field(default=1000, metadata={"help": "upper bound of held-out rows"})
    model_max_length: int | None = field(
        default=None, metadata={"help": "tokens of a caption; unset: as the model was trained"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left in --output_dir"}
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "continue from ZeRO files of others, which can run any code"},
    )


DEFAULTS = dict(
    output_dir=str(HERE.parent / "output" / HERE.name),
    num_train_epochs=3,
    learning_rate=5e-5,
    weight_decay=0.001,
    adam_beta2=0.98,
    adam_epsilon=1e-6,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    per_device_train_batch_size=128,
    per_device_eval_batch_size=64,
    dataloader_drop_last=True,
    logging_steps=5,
    logging_first_step=True,
    save_steps=500,
    save_total_limit=2,
    report_to=["tensorboard"],
    ddp_find_unused_parameters=False,
)
# To the random towers all pictures are alike, and all captions. When they begin to tell them apart
# gradients grow some hundred times: a rate that is high by then throws one run in two far off.
TINY = dict(
    num_train_epochs=30,
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_steps=0.3,
    max_grad_norm=0.2,
    per_device_train_batch_size=64,
    logging_steps=20,
    eval_ratio=0.2,
)


# 2. Model
def model_folder(args: Args, training: TrainingArguments, texts: list[str]) -> str:
    """What is trained, as a folder or hub id: two towers are put together first."""
    if args.text_model_name_or_path:
        return assemble.assemble(args, training, assemble.plan(args))
    return tiny_model(texts) if args.model_name_or_path == "tiny" else args.model_name_or_path


def check_model(args: Args) -> None:
    """Fail on a wrong name before anything is read or replaced."""
    if args.text_model_name_or_path:
        config = assemble.plan(args)
    elif args.model_name_or_path == "tiny":
        return
    else:
        config = models.model_config(args.model_name_or_path)
        refuse_other_models(config, f"--model_name_or_path {args.model_name_or_path}")
        models.check_model(args.model_name_or_path)
    clip_flags.check_projections(args, config)
    vision = config.vision_config
    if args.image_mask_ratio and not towers.can_drop_patches(vision):
        raise SystemExit(f"--image_mask_ratio: patches of a {vision.model_type} cannot be left out")


def load_model(args: Args, training: TrainingArguments, path: str, preparation):
    """The model with what moves and what does not, its forward that of towers.for_training."""
    with whole_weights(training):  # ZeRO-3 spreads them when it begins
        model = open_model(path, dtype=load_dtype(training, trains_all=True))
    model.config.caption_length = preparation.max_length  # for whoever opens the result
    is_fresh = args.model_name_or_path == "tiny" or bool(args.text_model_name_or_path)
    towers.settle_scale(model, args.loss, is_fresh)
    if args.use_lora:
        towers.add_lora(model, args)
    adapted = tuple(args.lora_towers.split(",")) if args.use_lora else ()
    towers.choose_trained(model, args.train, adapted, args.loss)
    unused = towers.freeze_unused(model, preparation)
    if unused:
        cli.say(f"note: no embedding depends on {', '.join(unused[:3])}: left as it is")
    if args.image_mask_ratio:
        towers.drop_patches(model.vision_model, args.image_mask_ratio)
    return towers.for_training(model)


def load_teacher(args: Args, training: TrainingArguments) -> Embedder:
    with whole_weights(training):
        return Embedder(args.teacher_name_or_path)


# 3. Data
def split(args: Args, training: TrainingArguments, rows, stats: dict):
    """-> rows to train on, rows held out; completes `stats`."""
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=training.seed)
    for line in describe_split(rows, train, held_out, args.eval_ratio, args.max_eval_samples):
        cli.say(line)
    stats |= {"used": len(train), "held_out": len(held_out)}
    cli.say(f"split: {len(train):,} pairs to train on, {len(held_out):,} held out")
    size = training.train_batch_size * training.world_size
    if len(train) < size:
        raise SystemExit(
            f"a batch of {size} pairs is larger than the data, {len(train):,} pairs: lower "
            "--per_device_train_batch_size"
        )
    plan.refuse_no_steps(training, len(train))
    return train, held_out


def look_at_captions(rows, preparation, stats: dict) -> None:
    found = check_captions(rows["text"], preparation.tokenizer, preparation.max_length)
    for line in found.pop("warnings"):
        cli.say(f"warning: {line}")
    stats["captions"] = found


def main() -> None:
    argv = clip_flags.complete(sys.argv[1:])
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, TINY, argv)
    clip_flags.resolve(args, training)
    set_seed(training.seed)
    check_model(args)

    rows, stats = load_pairs(
        args.data_path,
        args.image_root,
        args.column_map or None,
        args.strict_data,
        seed=training.seed,
        missing_limit=args.bad_picture_limit,
    )
    cli.say(describe(stats))
    train_rows, eval_rows = split(args, training, rows, stats)
    base = model_folder(args, training, train_rows["text"])
    config = models.model_config(base)
    clip_flags.check_window(args, config)
    preparation = load_preparation(base, config, args.model_max_length)
    settings = asdict(args) | training.to_dict() | {"data": stats["sha256"]}
    start = open_output(
        training, settings, args.overwrite_output_dir, tokenizer=preparation.tokenizer
    )
    look_at_captions(train_rows, preparation, stats)

    seed = training.seed
    pairs = Pairs(PairDataset(train_rows, preparation.image_processor, seed))
    held_out = Pairs(PairDataset(eval_rows, preparation.image_processor, seed, replaces=False))
    faults = PictureFaults(args.bad_picture_limit, min(500, len(pairs)), cli.say)
    teacher = partial(load_teacher, args, training) if args.teacher_name_or_path else None
    factor = (args.lora_alpha or 2 * args.lora_r) / args.lora_r
    trainer = ContrastiveTrainer(
        model=load_model(args, training, base, preparation),
        args=training,
        train_dataset=pairs,
        eval_dataset=held_out if len(held_out) else None,
        data_collator=Collator(preparation.tokens),
        describe_row=lambda i: train_rows[i]["source"],
        preparation=preparation,
        kind=args.loss,
        mode=args.cross_embedding,
        rates=towers.rates(args, training),
        faults=faults,
        fingerprint=fingerprint_of(base, config, preparation.image_processor),
        mask_duplicates=args.mask_duplicates,
        grad_cache_chunk=args.grad_cache_chunk,
        caches_features=args.cache_features,
        adapter_factor=factor if args.use_lora else None,
        load_teacher=teacher,
        teacher_weight=args.teacher_weight,
    )

    # 4. Train (the held-out pairs are measured before the first step), measure, save, report
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.exit_if_stopped()
    after = trainer.measure_all()
    trainer.save_final(dtype=config.dtype)
    trainer.report(HERE.name, clip_flags.name_of(args), stats, after)


if __name__ == "__main__":
    cli.run(main)
