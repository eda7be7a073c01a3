"""LoRA adapters and the base model they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from common import cli
from common.convert import model_folder, models
from common.data.files import atomic_file, new_folder

CONFIG_FILE = "adapter_config.json"
BASE_FILE = "base_model.json"
PLAIN = {  # settings of an adapter whose update is s B A and nothing else
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
SAMPLES = 64  # of a weight file, evenly spread
SAMPLE_BYTES = 1 << 16


def linear_layers(model, names: str) -> str | list[str]:
    """peft's target_modules from "all-linear" or names with commas; SystemExit for a name that no
    layer has.

    peft itself complains only when not one of several names is found.
    """
    if names == "all-linear":
        return names
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    layers = dict(model.named_modules())
    unknown = [name for name in wanted if not _is_layer(name, layers)]
    if unknown or not wanted:
        linear = {
            name.split(".")[-1] for name, layer in layers.items() if hasattr(layer, "in_features")
        }
        raise SystemExit(
            f"--target_modules: no layer is called {', '.join(unknown) or repr(names)}; "
            f"give all-linear or some of {','.join(sorted(linear))}"
        )
    if is_tied(model):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names_of_ends = [name for name, layer in layers.items() if layer in ends]
        hit = [one for one in wanted if any(_is_layer(one, [name]) for name in names_of_ends)]
        if hit:
            cli.say(
                f"note: --target_modules {','.join(hit)}: embedding and head of this model are one "
                "weight, of which the adapter changes one use; merged, they are two"
            )
    return wanted


def _is_layer(name: str, layers) -> bool:
    """Whether the name of a layer is, or ends with, the words of `name`."""
    return any(f".{layer}".endswith(f".{name}") for layer in layers)


# ---- which base ----------------------------------------------------------------------------------


def base_fingerprint(model: str) -> str:
    """sha256 over evenly spread samples of the weight files of `model` (folder or hub id).

    Reads about 4 MiB of a file, not the whole model: two fine-tunes of one architecture differ in
    nearly every block.
    """
    folder = local_folder(model)
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if not files:
        raise SystemExit(f"{model} has no *.safetensors weights")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        step = max(SAMPLE_BYTES, size // SAMPLES)
        with open(path, "rb") as file:
            for offset in range(0, max(size, 1), step):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def local_folder(model: str) -> Path:
    """A model folder itself; of a hub id, where its files lie, fetched where they are not here yet.
    SystemExit for what is neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):  # as of many older models
            snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:  # what the hub's errors are, names of no id too
        words = model_folder.reason(error)
        raise SystemExit(f"{model}: no such folder, and the hub gives nothing: {words}") from None
    return folder


def remember_base(folder: str | Path, base: str) -> None:
    """Leave the base model's name and fingerprint beside an adapter. Rank 0 writes, the others
    return at once."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    content = {"base_model": base, "fingerprint": base_fingerprint(base)}
    with atomic_file(Path(folder) / BASE_FILE) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")


def check_base(folder: str | Path, base: str | None = None) -> str:
    """The base model to use with the adapter in `folder`; SystemExit when the given `base` is
    another model."""
    folder = Path(folder)
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise SystemExit(f"{folder} is not an adapter: it has no {CONFIG_FILE}")
    model_folder.check(folder)
    trained_on = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = base or trained_on
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise SystemExit(
            f"the base model {base} of the adapter {folder} is not there; name it where it is now"
        )
    model_folder.check(base)
    note = folder / BASE_FILE
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        if base_fingerprint(base) != known["fingerprint"]:
            raise SystemExit(
                f"{folder} was trained on {known['base_model']}; the weights of {base} differ, "
                "the merge would be wrong"
            )
    elif base != trained_on:
        raise SystemExit(
            f"{folder} was trained on {trained_on}, not on {base} "
            f"(and has no {BASE_FILE} to compare the weights)"
        )
    return base


# ---- reading, writing, merging -------------------------------------------------------------------


def read_plain(folder: str | Path) -> tuple[dict, dict]:
    """A peft folder, weights in either of its formats -> (settings, tensors); SystemExit unless it
    is plain LoRA."""
    from safetensors.torch import load_file

    from common.convert.weight_files import read_pickle

    folder = Path(folder)
    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    wrong = []
    for name, plain in PLAIN.items():
        found = settings[name] if settings.get(name) else plain
        if found != plain:
            wrong.append(f"{name}={found}")
    if wrong:
        raise SystemExit(f"{folder}: only plain LoRA can be converted, not {', '.join(wrong)}")

    safe = folder / "adapter_model.safetensors"
    if safe.is_file():
        return settings, load_file(safe)
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        return settings, read_pickle(pickled)
    raise SystemExit(f"{folder} has no {safe.name} and no {pickled.name}")


def write_plain(out: str | Path, settings: dict, tensors: dict, base: str) -> list[str]:
    """Write a peft folder for the model `base`, which it remembers -> the kinds of layers the
    adapter is on."""
    from safetensors.torch import save_file

    layers = [name.split(".lora_")[0] for name in tensors]
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    settings = settings | {"base_model_name_or_path": base, "target_modules": kinds}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with new_folder(out) as part:
        save_file(contiguous, part / "adapter_model.safetensors", {"format": "pt"})
        (part / CONFIG_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        remember_base(part, base)
    return kinds


def put_on(model, folder: str | Path, name: str = "default"):
    """A base model (or a PeftModel that gets one adapter more) -> the PeftModel with the adapter in
    `folder` as `name`; SystemExit with one line where it does not fit or its weights are more than
    tensors."""
    import torch
    from peft import PeftModel

    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, adapter_name=name)
        model.load_adapter(folder, name)
        return model
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # many kinds, as in models.load
        words = model_folder.reason(error)
        raise SystemExit(f"{folder}: the adapter cannot be loaded: {words}") from None


def merge_into(model):
    """A PeftModel -> its base with the adapter added to the weights: the same logits.

    Where embedding and head are one weight and the adapter is on either of them, they become two,
    and the config says so: what is added to one must not change the other.
    """
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if is_tied(base) and any(end is not _plain(end) for end in ends):
        untie(base)
    return model.merge_and_unload(safe_merge=True)


def is_tied(model) -> bool:
    """Whether the embedding and the head of a model, wrapped by peft or not, are one weight."""
    table = _plain(model.get_input_embeddings())
    head = _plain(model.get_output_embeddings())
    return head is not None and getattr(head, "weight", None) is getattr(table, "weight", head)


def untie(model) -> None:
    """Give the head a weight of its own, with the embedding's values."""
    head = _plain(model.get_output_embeddings())
    head.weight = type(head.weight)(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _plain(layer):
    """A layer without what peft puts around it."""
    while hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        layer = getattr(layer, "base_layer", None) or layer.original_module
    return layer


def merge(folder: str | Path, out: str | Path, base: str | None = None) -> Path:
    """Write base + adapter as an ordinary model folder `out`, in the base's dtype, with the
    adapter's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.convert.older_readers import save_tokenizer
    from common.runs.generate import remember_ends

    base = check_base(folder, base)
    with new_folder(out) as part:
        model = models.load(AutoModelForCausalLM, base, "--base", dtype="auto")
        model = merge_into(put_on(model, folder))
        tokenizer = models.load(AutoTokenizer, str(folder), "--adapter")
        remember_ends(model, tokenizer)
        model.save_pretrained(part)
        save_tokenizer(tokenizer, part)
    return Path(out)
