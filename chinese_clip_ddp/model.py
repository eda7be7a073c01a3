"""A text-image model from its folder: what training, evaluation, index and page all use.

    embedder = load("output/chinese_clip_ddp")
    embedder.embed_text(["一只猫"]) @ embedder.embed_images(["cat.jpg"]).T

It opens ChineseCLIPModel, CLIPModel, SiglipModel and TwoTowers (modeling_two_towers.py), each with
its own pooling, projection, tokenizer and image processor.

B texts or pictures, T tokens, E width of the embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import modeling_two_towers  # noqa: F401  (tells the Auto classes about two towers)
import torch
from batches import tokenise
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from common import device as devices
from common.convert import adapter, models
from common.convert.older_readers import save_tokenizer
from common.data.labels import fingerprint
from common.data.pictures import pixels

# tokens of a caption unless a flag says otherwise: what these were pre-trained with, or fewer
WINDOWS = {"chinese_clip": 52, "clip": 77, "siglip": 64}
DEFAULT_WINDOW = 77
OF_THE_SAVING = {  # in a config, and without a say in what a model gives
    *("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path"),
    "caption_length",  # Preparation.facts has it
}


# ---- texts and pictures as the model takes them --------------------------------------------------


@dataclass
class Preparation:
    """The tokenizer and the image processor of a model, saved beside it.

    max_length: tokens of a caption; fixed: every caption is padded to so many (SigLIP), else to the
        longest of its batch; quotes: Chinese quotation marks become ", as in Chinese-CLIP's own
        training.
    """

    tokenizer: object
    image_processor: object
    max_length: int = DEFAULT_WINDOW
    fixed: bool = False
    quotes: bool = False

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """-> input_ids and, but for SigLIP, attention_mask, int64 [B, T]."""
        if self.quotes:
            texts = [text.replace("“", '"').replace("”", '"') for text in texts]
        return tokenise(self.tokenizer, texts, self.max_length, self.fixed)

    def pixels(self, picture) -> Tensor:
        """A path, Place, bytes or Pillow image -> fp32 [3, height, width]."""
        return pixels(picture, self.image_processor)

    def facts(self) -> list:
        """All that decides what a caption or a picture becomes."""
        words = [fingerprint(self.tokenizer), self.max_length, self.fixed, self.quotes]
        return [*words, self.image_processor.to_json_string()]

    def save_pretrained(self, folder: str | Path) -> None:
        save_tokenizer(self.tokenizer, folder)
        self.image_processor.save_pretrained(folder)


def load_preparation(path: str, config, max_length: int | None = None) -> Preparation:
    """Of a model folder or hub id.

    max_length: of captions; unset: what the model was trained here with (caption_length of its
        config), else what its kind was pre-trained with.
    """
    kind = config.model_type
    tokenizer = models.load(AutoTokenizer, path)
    tokenizer.padding_side = "right"
    models.check_vocabulary(tokenizer, config, path)
    processor = models.load(AutoImageProcessor, path, backend="pil")
    is_fixed = kind == "siglip"
    if max_length is None or is_fixed:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        own = getattr(config, "caption_length", None) or WINDOWS.get(kind, DEFAULT_WINDOW)
        max_length = positions if is_fixed else min(own, positions or own)
    return Preparation(tokenizer, processor, max_length, is_fixed, kind == "chinese_clip")


# ---- embeddings ----------------------------------------------------------------------------------


def text_features(model, batch: dict) -> Tensor:
    """input_ids [B, T], attention_mask [B, T] or none -> normalised [B, E], with a graph."""
    mask = batch.get("attention_mask")
    found = model.get_text_features(batch["input_ids"], attention_mask=mask)
    return F.normalize(found.pooler_output.float(), dim=-1)


def image_features(model, batch: dict) -> Tensor:
    """pixel_values [B, 3, height, width] -> normalised [B, E], with a graph."""
    found = model.get_image_features(pixel_values=batch["pixel_values"])
    return F.normalize(found.pooler_output.float(), dim=-1)


class Embedder:
    """A saved folder, ready to embed.

    Attributes:
        path, model, tokenizer, image_processor, preparation.
        size: E. logit_scale: what cosines are multiplied by; logit_bias: what a sigmoid loss adds.
        fingerprint: fingerprint_of; vectors of two folders are comparable where it is equal.
    """

    def __init__(self, path: str | Path, device=None, dtype: torch.dtype | None = None):
        """path: a run's output folder or its final/, a model folder or hub id.

        dtype: unset: half precision on accelerators, float32 on a CPU.
        """
        self.path = find_model(path)
        self.device = torch.device(device) if device is not None else devices.device()
        half = None if self.device.type == "cpu" else devices.half_dtype()
        config = models.model_config(self.path, "the model")
        refuse_other_models(config, self.path)
        self.preparation = load_preparation(self.path, config)
        self.tokenizer = self.preparation.tokenizer
        self.image_processor = self.preparation.image_processor
        self.model = open_model(self.path, "the model", dtype=dtype or half or torch.float32)
        self.model.to(self.device).eval()
        self.logit_scale = float(self.model.logit_scale.detach().float().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach())
        self.fingerprint = fingerprint_of(self.path, config, self.image_processor)
        self.size = self.embed_text(["x"]).shape[1]

    @torch.inference_mode()
    def embed_text(self, texts: list[str], batch_size: int = 64) -> Tensor:
        """-> fp32 [n, E], normalised, on the CPU."""
        found = []
        for start in range(0, len(texts), batch_size):
            batch = self.preparation.tokens(texts[start : start + batch_size])
            batch = {name: ids.to(self.device) for name, ids in batch.items()}
            found.append(text_features(self.model, batch).cpu())
        return torch.cat(found) if found else torch.zeros(0, self.size)

    @torch.inference_mode()
    def embed_images(self, pictures: list, batch_size: int = 32) -> Tensor:
        """Paths, Places, bytes or Pillow images -> fp32 [n, E], normalised, on the CPU.

        PictureError for one that cannot be used.
        """
        found = []
        for start in range(0, len(pictures), batch_size):
            some = pictures[start : start + batch_size]
            values = torch.stack([self.preparation.pixels(picture) for picture in some])
            batch = {"pixel_values": values.to(self.device)}
            found.append(image_features(self.model, batch).cpu())
        return torch.cat(found) if found else torch.zeros(0, self.size)


def load(path: str | Path, device=None, dtype: torch.dtype | None = None) -> Embedder:
    """Embedder(path, device, dtype); SystemExit with one line for what is no text-image model."""
    return Embedder(path, device, dtype)


def find_model(path: str | Path) -> str:
    """A run's output folder -> its final/; a model folder and a hub id stay as they are."""
    folder = Path(path).expanduser()
    if (folder / "final").is_dir():
        return str(folder / "final")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise SystemExit(
            f"{path}: no trained model here; train one first (bash train_zero2.sh), or name a run "
            "or a model folder"
        )
    return str(path)


# ---- which model ---------------------------------------------------------------------------------


def fingerprint_of(path: str, config, image_processor) -> str:
    """sha256 over all that decides the vectors of a model folder or hub id: weights, config
    (pooling, projection, image size ...) and what the processor makes of pictures."""
    told = [of_weights(path), lasting(config.to_diff_dict()), image_processor.to_json_string()]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def of_weights(path: str) -> str:
    """adapter.base_fingerprint, and two rows of every weight: a training that moves projections
    alone leaves all others as they are, and a large file is sampled too sparsely to see it."""
    digest = hashlib.sha256(adapter.base_fingerprint(path).encode())
    for file in sorted(adapter.local_folder(path).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in sorted(weights.keys()):
                digest.update(name.encode())
                for row in some_rows(weights, name):
                    digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def some_rows(weights, name: str) -> list[Tensor]:
    """The first row and the one in the middle; a number is its only row."""
    part = weights.get_slice(name)
    shape = part.get_shape()
    if not shape:
        return [weights.get_tensor(name)]
    middle = shape[0] // 2
    return [part[:1], part[middle : middle + 1]]


def lasting(settings):
    """A config's dict without what is written anew with every saving."""
    if not isinstance(settings, dict):
        return settings
    return {name: lasting(value) for name, value in settings.items() if name not in OF_THE_SAVING}


# ---- what can be opened --------------------------------------------------------------------------


def refuse_naflex(config, name: str) -> None:
    if config.model_type.startswith("siglip2"):
        raise SystemExit(
            f"{name}: a NaFlex SigLIP2, whose pictures keep their sizes; take one of a fixed size "
            "(google/siglip2-base-patch16-224, ...)"
        )


def refuse_other_models(config, name: str) -> None:
    """SystemExit for a config that is none of a text-image model with towers of fixed size."""
    refuse_naflex(config, name)
    if config.model_type not in (*WINDOWS, "two_towers"):
        raise SystemExit(
            f"{name}: {config.model_type} is no text-image model that can be trained here; give a "
            "ChineseCLIP, CLIP or SigLIP folder, or two towers (--text_model_name_or_path, "
            "--image_model_name_or_path)"
        )


def open_model(path: str, flag: str = "--model_name_or_path", **settings) -> nn.Module:
    """The model of a folder, with the bias of a sigmoid loss where one was trained on a class that
    has none. flag: where the name came from."""
    model = models.load(AutoModel, path, flag, **settings)
    if not hasattr(model, "logit_bias"):
        bias = saved_bias(path)
        if bias is not None:
            add_bias(model, bias)
    return model


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


def add_bias(model, value: float) -> None:
    """A logit_bias for CLIPModel and ChineseCLIPModel; it is saved with the other weights."""
    scale = model.logit_scale
    model.logit_bias = nn.Parameter(torch.full_like(scale, value, requires_grad=True))


def saved_bias(path: str) -> float | None:
    for file in sorted(adapter.local_folder(path).glob("*.safetensors")):
        with contextlib.suppress(OSError), safe_open(file, "pt") as weights:
            if "logit_bias" in weights.keys():  # noqa: SIM118 (no dict)
                return float(weights.get_tensor("logit_bias"))
    return None
