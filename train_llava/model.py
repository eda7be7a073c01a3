"""A LLaVA folder from outside: which towers there are, how many tokens a picture takes, what is
refused before any weight is read, and the model ready to answer.

Training, evaluation and page open their models here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from common import device as devices
from common.convert import adapter, model_folder, models
from common.convert.weight_files import Weights


@dataclass(frozen=True)
class Tower:
    """What LLaVA has to know of a kind of vision tower.

    has_cls: its output begins with a token that is no patch. fixed: it takes pictures of one size
    only. can_be_cut: hidden states before the last layer do not depend on the layers behind them,
    nor on a norm at the end.
    """

    has_cls: bool
    fixed: bool
    can_be_cut: bool


TOWERS = {  # by model_type
    "clip_vision_model": Tower(has_cls=True, fixed=True, can_be_cut=True),
    "chinese_clip_vision_model": Tower(has_cls=True, fixed=True, can_be_cut=True),
    "siglip_vision_model": Tower(has_cls=False, fixed=True, can_be_cut=True),
    "dinov2": Tower(has_cls=True, fixed=False, can_be_cut=False),
    "vit": Tower(has_cls=True, fixed=True, can_be_cut=False),
}
PROJECTOR = ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight")
# their weights stand in files under vision_model.
NESTED = ("clip_vision_model", "chinese_clip_vision_model", "siglip_vision_model")
TOWERS_IN_WORDS = "CLIP, Chinese-CLIP, SigLIP, SigLIP2 of a fixed size, DINOv2 or ViT"
OTHERS = {  # model_type begins with -> why it is none of ours
    "siglip2": "a NaFlex SigLIP2, whose pictures keep their sizes; take one of a fixed size "
    "(google/siglip2-base-patch16-224, ...)",
    "qwen2_vl": "a Qwen-VL, whose processor is of another kind",
    "qwen2_5_vl": "a Qwen-VL, whose processor is of another kind",
    "qwen3_vl": "a Qwen-VL, whose processor is of another kind",
    "qwen3_5": "a Qwen-VL, whose processor is of another kind",
    "llava_next": "a LLaVA-NeXT, which cuts pictures into tiles",
    "llava_onevision": "a LLaVA-OneVision, which cuts pictures into tiles",
    "video": "a model of videos",
}


def refuse_others(config, name: str) -> None:
    """SystemExit, with the reason, for kinds of models that people try and that cannot work."""
    kind = config.model_type
    for start, why in OTHERS.items():
        if kind.startswith(start) or (start == "video" and "video" in kind):
            raise SystemExit(f"{name} is {why}")


def tower_of(config, name: str) -> Tower:
    """SystemExit for a vision tower that LLaVA's projector cannot follow."""
    refuse_others(config, name)
    if config.model_type not in TOWERS:
        raise SystemExit(
            f"{name}: a vision tower of the kind {config.model_type}; take {TOWERS_IN_WORDS}"
        )
    return TOWERS[config.model_type]


# ---- how many tokens a picture takes -------------------------------------------------------------


def picture_side(image_processor) -> tuple[int, int]:
    """Height and width in pixels of what a processor makes of any picture; SystemExit where that
    depends on the picture."""
    name = "crop_size" if getattr(image_processor, "do_center_crop", False) else "size"
    size = getattr(image_processor, name, None) or {}
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    if getattr(image_processor, "do_pad", False) and size.get("shortest_edge"):
        return size["shortest_edge"], size["shortest_edge"]  # squares are resized
    if not (size.get("height") and size.get("width")):
        raise SystemExit(
            f"the processor keeps the shape of each picture ({name} {size}), and LLaVA needs one "
            'for all: set do_center_crop and crop_size {"height", "width"}'
        )
    return size["height"], size["width"]


def tokens_per_picture(processor: LlavaProcessor) -> int:
    """Image tokens that the processor writes for a picture, whatever its size."""
    height, width = picture_side(processor.image_processor)
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"
    return patches + processor.num_additional_image_tokens - dropped


def features_per_picture(config, image_processor) -> int:
    """Features that the tower and the projector give for what the processor makes of a picture."""
    height, width = picture_side(image_processor)
    vision = config.vision_config
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    dropped = config.vision_feature_select_strategy == "default"
    return patches + TOWERS[vision.model_type].has_cls - dropped


# ---- what is refused -----------------------------------------------------------------------------


def check_config(config, name: str) -> None:
    """SystemExit for what is no LLaVA, or one with a tower of an unknown kind."""
    if config.model_type != "llava":
        refuse_others(config, name)
        raise SystemExit(
            f"{name} is no LLaVA (its kind is {config.model_type}); build one from a language "
            "model and a vision tower: python train_llava/build_model.py --llm ... --vision ..."
        )
    tower_of(config.vision_config, name)


def check(config, processor, name: str) -> None:
    """SystemExit where config and processor of a LLaVA do not fit together."""
    check_config(config, name)
    tokenizer = processor.tokenizer
    number = tokenizer.convert_tokens_to_ids(processor.image_token)
    if number is None or number == tokenizer.unk_token_id:
        raise SystemExit(f"{name}: its tokenizer has no {processor.image_token} token")
    if number != config.image_token_id:
        raise SystemExit(
            f"{name}: {processor.image_token} is token {number} of the tokenizer, and the config "
            f"says {config.image_token_id}"
        )
    tower = TOWERS[config.vision_config.model_type]
    side = picture_side(processor.image_processor)
    expected = config.vision_config.image_size
    expected = (expected, expected) if isinstance(expected, int) else tuple(expected)
    if tower.fixed and side != expected:
        raise SystemExit(
            f"{name}: the processor makes pictures of {side[0]} x {side[1]} pixels, and the tower "
            f"takes {expected[0]} x {expected[1]}"
        )
    tokens = tokens_per_picture(processor)
    features = features_per_picture(config, processor.image_processor)
    if tokens != features:
        raise SystemExit(
            f"{name}: the processor writes {tokens} image tokens for a picture, and the model has "
            f"{features} features for it; patch_size, vision_feature_select_strategy and "
            "num_additional_image_tokens in processor_config.json decide"
        )


# ---- opening -------------------------------------------------------------------------------------


def find_model(path: str | Path) -> str:
    """A run's output folder -> its final/; a model folder and a hub id stay as they are."""
    folder = Path(path).expanduser()
    if (folder / "final").is_dir():
        return str(folder / "final")
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if folder.is_dir() and not is_model:
        raise SystemExit(
            f"{path}: no trained model here; train one first (bash train_zero2.sh), or name a run "
            "or a model folder"
        )
    return str(path)


def load_processor(path: str, flag: str = "--model_name_or_path") -> LlavaProcessor:
    """The processor of a LLaVA folder, with the image processor that needs no torchvision: pictures
    are then the same on every machine."""
    processor = models.load(AutoProcessor, path, flag, backend="pil")
    if not isinstance(processor, LlavaProcessor):
        raise SystemExit(f"{flag} {path}: {type(processor).__name__} is no processor of a LLaVA")
    if not processor.tokenizer.chat_template:  # where labels are found from
        processor.tokenizer.chat_template = processor.chat_template
    return processor


def check_model(path: str, flag: str = "--model_name_or_path"):
    """(config, processor) of a LLaVA folder or hub id; SystemExit with one line for what cannot
    work. No weight is read."""
    config = models.model_config(path, flag)
    check_config(config, f"{flag} {path}")
    config.dtype = config.dtype or config.text_config.dtype or torch.float32  # some do not say it
    processor = load_processor(path, flag)
    if not processor.patch_size:  # folders of 2023 do not say it
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(TOWERS[config.vision_config.model_type].has_cls)
    check(config, processor, f"{flag} {path}")
    models.check_vocabulary(processor.tokenizer, config, f"{flag} {path}")
    return config, processor


def check_projector(path: str, flag: str = "--model_name_or_path") -> None:
    """SystemExit for a folder or hub id without the two layers of LLaVA's projector: transformers
    would begin with random ones. Names are read, no tensor."""
    names = list(Weights(adapter.local_folder(path)))
    absent = [one for one in PROJECTOR if not any(name.endswith(one) for name in names)]
    if absent:
        others = [name for name in names if "project" in name and "attn" not in name][:2]
        seen = f" (it has {', '.join(others)} ...)" if others else ""
        raise SystemExit(
            f"{flag} {path}: its projector is not LLaVA's: there is no {absent[0]}{seen}; "
            "build_model.py gives a tower and a language model one"
        )


def open_model(path: str, flag: str = "--model_name_or_path", **settings):
    """LlavaForConditionalGeneration of a folder or hub id."""
    return models.load(AutoModelForImageTextToText, path, flag, **settings)


class Llava:
    """A LLaVA ready to answer: a run's output folder or its final/ (an adapter goes on its base), a
    model folder or a hub id.

    Attributes: path, model, processor, tokenizer, image_processor, image_token_id, image_tokens (of
    a picture), device.
    """

    def __init__(self, path: str | Path, device=None, dtype: torch.dtype | None = None):
        """dtype: unset: half precision on accelerators, float32 on a CPU."""
        self.path = find_model(path)
        self.device = torch.device(device) if device is not None else devices.device()
        half = None if self.device.type == "cpu" else devices.half_dtype()
        is_adapter = (Path(self.path) / adapter.CONFIG_FILE).is_file()
        base = adapter.check_base(self.path) if is_adapter else self.path
        model_folder.check(base)
        config, self.processor = check_model(base, "the model")
        check_projector(base, "the model")
        self.model = open_model(base, "the model", dtype=dtype or half or torch.float32)
        if is_adapter:
            self.model = adapter.put_on(self.model, self.path)
        self.model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.image_processor = self.processor.image_processor
        self.image_token_id = config.image_token_id
        self.image_tokens = tokens_per_picture(self.processor)


@contextlib.contextmanager
def whole_weights(training) -> Iterator[None]:
    """Models that are loaded here are whole on every rank, also where ZeRO-3 would spread them."""
    from transformers.integrations import deepspeed

    config = getattr(training, "hf_deepspeed_config", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
