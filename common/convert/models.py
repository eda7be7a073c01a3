"""Models, configs and tokenizers by folder or hub id: what cannot be loaded, or does not fit
together, is one line."""

from __future__ import annotations

import os
import time

from common.cli import say
from common.convert import model_folder


def model_config(name: str, flag: str = "--model_name_or_path"):
    """AutoConfig of a model folder or hub id; SystemExit with one line when it is neither."""
    from transformers import AutoConfig

    return load(AutoConfig, name, flag)


def check_model(
    name: str, flag: str = "--model_name_or_path", tokenizer: str = "", grows: bool = False
):
    """The config of a model, like model_config; SystemExit with one line where its tokenizer (or
    that of the model `tokenizer`) cannot be loaded or has tokens beyond its embedding, unless the
    embedding `grows` to hold them."""
    from transformers import AutoTokenizer

    config = model_config(name, flag)
    loaded = load(AutoTokenizer, tokenizer or name, flag)
    if not grows:
        check_vocabulary(loaded, config, f"{flag} {name}")
    return config


def check_vocabulary(tokenizer, config, name: str) -> None:
    """SystemExit where a tokenizer has tokens beyond the embedding of the model."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= rows}
    in_use = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    unknown = str(tokenizer.unk_token)
    if unknown not in in_use and unknown not in str(tokenizer.chat_template):
        beyond.discard(unknown)  # transformers adds one to some classes; nothing becomes this token
    if beyond:
        shown = ", ".join(sorted(beyond)[:3])
        raise SystemExit(
            f"{name}: the model's embedding has {rows:,} rows, and {len(beyond):,} tokens of the "
            f"tokenizer are beyond it ({shown}); give the model rows for them first: "
            "model.resize_token_embeddings(len(tokenizer)) and model.save_pretrained(folder)"
        )


def load(auto_class, name: str, flag: str = "--model_name_or_path", **settings):
    """auto_class.from_pretrained(name, **settings); SystemExit with one line when that is no model
    folder or hub id.

    `flag`: where the name came from. AutoConfig takes the path of a config.json too.
    """
    import torch

    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.exists(os.path.expanduser(name)):
        raise SystemExit(f"{flag} {name}: no such folder")
    model_folder.check(name, weights="Tokenizer" not in auto_class.__name__)
    try:
        loaded = _load(auto_class, name, settings)
    except (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError):
        raise  # the folder is not to blame
    except Exception as error:
        # many kinds: no config.json, no weights, unknown type, no network, no such id
        words = model_folder.reason(error)
        raise SystemExit(
            f"{flag} {name} is not a model that can be loaded ({words}). Give a folder with "
            "config.json and *.safetensors, or a hub id (HF_ENDPOINT chooses a mirror)"
        ) from None
    unused = model_folder.unused_class(name) if "Tokenizer" in auto_class.__name__ else None
    if unused:
        say(
            f"warning: {name}: the code of its tokenizer ({unused}) is not run; tokens are those "
            "of its tokenizer.json"
        )
    return loaded


def _load(auto_class, name: str, settings: dict):
    """from_pretrained with a line for people where it takes long; code of the model is never run,
    and nobody is asked whether it may."""
    settings = settings | {"trust_remote_code": False}
    began = time.time()
    has_weights = "dtype" in settings
    if has_weights:
        say(f"loading {name}")
    try:
        loaded = auto_class.from_pretrained(name, **settings)
    except KeyError as error:
        if settings.get("attn_implementation") not in error.args:
            raise
        # an architecture that knows only attention of its own
        own = {key: value for key, value in settings.items() if key != "attn_implementation"}
        loaded = auto_class.from_pretrained(name, **own)
    if has_weights and time.time() - began > 5:
        say(f"loaded in {time.time() - began:.0f} s")
    return loaded
