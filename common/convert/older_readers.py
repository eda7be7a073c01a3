"""What is written opens in older programs too: settings in the words of transformers 4."""

from __future__ import annotations

import json
from pathlib import Path

from common.data.files import atomic_file

# a class that every version has and that takes tokenizer.json as it is
FAST = "PreTrainedTokenizerFast"


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """The tokenizer's files into `folder`, beside a model or alone (None: there is none);
    config.json, where it is there already, gets its older names too."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for_older_readers(folder)


def for_older_readers(folder: str | Path) -> None:
    """Settings that transformers 5 renamed stand in the files of `folder` under both names."""
    folder = Path(folder)
    _rewrite(folder / "tokenizer_config.json", _older_tokenizer)
    _rewrite(folder / "config.json", _older_model)


def _rewrite(file: Path, change) -> None:
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    settings = json.loads(text)
    changed = change(dict(settings))
    if changed != settings:
        with atomic_file(file) as part:
            dumped = json.dumps(changed, indent=2, ensure_ascii=False)
            part.write_text(dumped + "\n", encoding="utf-8")


def _older_tokenizer(settings: dict) -> dict:
    if settings.get("backend") == "tokenizers" and "auto_map" not in settings:
        settings["tokenizer_class"] = FAST
        # the class of transformers 4 would add token_type_ids, which decoders refuse
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 wants a dict under this name
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _older_model(settings: dict) -> dict:
    """The rotary settings once more, at the places that they had before transformers 5."""
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return settings
    by_layer = {name: kind for name, kind in rope.items() if isinstance(kind, dict)}
    if "sliding_attention" in by_layer:
        settings["rope_local_base_freq"] = by_layer["sliding_attention"]["rope_theta"]
    rope = dict(by_layer.get("full_attention", {}) if by_layer else rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            settings[name] = rope.pop(name)
    if rope.get("rope_type", "default") != "default":
        settings["rope_scaling"] = rope
    return settings
