"""Two towers from two folders -> one folder of TwoTowers, made once in the cache: from there on it
is a model like any other."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import modeling_two_towers
import torch
from contrastive import SIGMOID_LOG_SCALE
from filelock import FileLock
from model import Preparation, of_weights, refuse_naflex, whole_weights
from modeling_two_towers import TwoTowers, TwoTowersConfig
from transformers import MODEL_MAPPING, AutoImageProcessor, AutoTokenizer

from common import cli
from common.convert import adapter, models
from common.data.cache import cache_root
from common.data.files import atomic_folder, sha256

BESIDE = (".json", ".txt", ".model", ".jinja")
FLAGS = {"text": "--text_model_name_or_path", "vision": "--image_model_name_or_path"}


def tower_config(name: str, part: str):
    """The config of one tower; of a folder that holds both, that of the one that is asked for.

    part: text or vision. SystemExit for what has no such tower.
    """
    config = models.model_config(name, FLAGS[part])
    refuse_naflex(config, f"{FLAGS[part]} {name}")
    config = getattr(config, f"{part}_config", None) or config
    wanted = "vocab_size" if part == "text" else "image_size"
    if not hasattr(config, wanted) or type(config) not in MODEL_MAPPING:
        raise SystemExit(f"{FLAGS[part]} {name}: {config.model_type} has no {part} tower")
    return config


def plan(args) -> TwoTowersConfig:
    """The config of the towers that the flags name; SystemExit where they do not fit together.
    Nothing but configs is read."""
    text = tower_config(args.text_model_name_or_path, "text")
    vision = tower_config(args.image_model_name_or_path, "vision")
    if args.projection == "none" and text.hidden_size != vision.hidden_size:
        raise SystemExit(
            f"--projection none: the text tower's vectors have {text.hidden_size} numbers, the "
            f"image tower's {vision.hidden_size}; give --projection linear or mlp"
        )
    more = {"logit_scale_init_value": SIGMOID_LOG_SCALE} if args.loss == "sigmoid" else {}
    return TwoTowersConfig(
        text,
        vision,
        pooling=args.pooling,
        image_pooling=args.image_pooling,
        projection=args.projection,
        projection_dim=text.hidden_size if args.projection == "none" else args.projection_dim,
        **more,
    )


def assemble(args, training, config: TwoTowersConfig) -> str:
    """-> the folder; any number of processes may call it. The projections are the only weights that
    are new, by --seed."""
    names = {"text": args.text_model_name_or_path, "vision": args.image_model_name_or_path}
    told = [config.to_json_string(use_diff=False), training.seed]
    for name in names.values():
        told += [of_weights(name), of_preparation(name)]
    told += [Path(modeling_two_towers.__file__).read_text(encoding="utf-8")]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    folder = cache_root() / "towers" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with atomic_folder(folder) as part, whole_weights(training):
                make(config, names, training.seed, part)
    return str(folder)


def of_preparation(name: str) -> list[str]:
    """sha256 of what lies beside the weights: tokenizer, image processor, config."""
    folder = adapter.local_folder(name)
    beside = [file for file in sorted(folder.iterdir()) if file.suffix in BESIDE and file.is_file()]
    return [f"{file.name} {sha256(file)}" for file in beside]


def make(config: TwoTowersConfig, names: dict[str, str], seed: int, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoTowers(config).float()
    model.text_model = load_tower(names["text"], "text", config.text_config)
    model.vision_model = load_tower(names["vision"], "vision", config.vision_config)
    model.config.dtype = torch.float32
    # whoever holds the lock writes
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(folder)
    tokenizer = models.load(AutoTokenizer, names["text"], FLAGS["text"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = models.load(AutoImageProcessor, names["vision"], FLAGS["vision"], backend="pil")
    Preparation(tokenizer, processor).save_pretrained(folder)


def load_tower(name: str, part: str, config):
    kind = MODEL_MAPPING[type(config)]
    takes = inspect.signature(kind.__init__).parameters
    more = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    cli.say(f"{part} tower: {kind.__name__} of {name}")
    return models.load(kind, name, FLAGS[part], dtype=torch.float32, **more)
