"""LoRA adapters and the base model they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

BASE_FILE = "base_model.json"
PLAIN = {  # settings of an adapter whose update is s B A and nothing else
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def linear_layers(model, names: str) -> str | list[str]:
    """peft's target_modules from "all-linear" or names with commas; SystemExit for a name that no
    layer has.

    peft itself complains only when not one of several names is found.
    """
    if names == "all-linear":
        return names
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    layers = [name for name, _ in model.named_modules()]
    unknown = [
        name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)
    ]
    if unknown or not wanted:
        linear = sorted(
            {
                name.split(".")[-1]
                for name, layer in model.named_modules()
                if hasattr(layer, "in_features")
            }
        )
        raise SystemExit(
            f"--target_modules: no layer is called {', '.join(unknown) or repr(names)}; "
            f"give all-linear or some of {','.join(linear)}"
        )
    return wanted


def base_fingerprint(model: str) -> str:
    """sha256 over evenly spread samples of the weight files of `model` (folder or hub id).

    Reads about 4 MiB, not the whole model: two fine-tunes of one architecture differ in nearly
    every block.
    """
    digest, block = hashlib.sha256(), 1 << 16
    folder = _folder(model)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise SystemExit(f"{model} has no *.safetensors weights")
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for offset in sorted({0, *range(0, size, max(block, size // 64))}):
                file.seek(offset)
                digest.update(file.read(block))
    return digest.hexdigest()


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        )
    )


def remember_base(folder: str | Path, base: str) -> None:
    """Leave the base model's name and fingerprint beside an adapter. Rank 0 writes, the others
    return at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        content = {"base_model": base, "fingerprint": base_fingerprint(base)}
        (Path(folder) / BASE_FILE).write_text(json.dumps(content, indent=1))


def check_base(folder: str | Path, base: str | None = None) -> str:
    """The base model to use with the adapter in `folder`; SystemExit when the given `base` is
    another model."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise SystemExit(f"{folder} is not an adapter: it has no adapter_config.json")
    told = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    known = json.loads((folder / BASE_FILE).read_text()) if (folder / BASE_FILE).is_file() else None
    base = base or told
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise SystemExit(
            f"the base model {base} of the adapter {folder} is not there; name it where it is now"
        )
    if known is None:
        if base != told:
            raise SystemExit(
                f"{folder} was trained on {told}, not on {base} (and has no {BASE_FILE} to compare the weights)"
            )
    elif base_fingerprint(base) != known["fingerprint"]:
        raise SystemExit(
            f"{folder} was trained on {known['base_model']}; the weights of {base} differ, the merge would be wrong"
        )
    return base


def read_plain(folder: str | Path) -> tuple[dict, dict]:
    """A peft folder, weights in either of its formats -> (settings, tensors); SystemExit unless it
    is plain LoRA."""
    from safetensors.torch import load_file

    from common.convert.weight_files import read_pickle

    folder = Path(folder)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if wrong := [
        f"{k}={settings[k]}" for k, plain in PLAIN.items() if (settings.get(k) or plain) != plain
    ]:
        raise SystemExit(f"{folder}: only plain LoRA can be converted, not {', '.join(wrong)}")
    for name, read in (
        ("adapter_model.safetensors", load_file),
        ("adapter_model.bin", read_pickle),
    ):
        if (folder / name).is_file():
            return settings, read(folder / name)
    raise SystemExit(f"{folder} has no adapter_model.safetensors and no adapter_model.bin")


def write_plain(out: str | Path, settings: dict, tensors: dict, base: str) -> list[str]:
    """Write a peft folder for the model `base`, which it remembers -> the kinds of layers the
    adapter is on."""
    from safetensors.torch import save_file

    from common.convert.weight_files import Draft

    kinds = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    settings = settings | {"base_model_name_or_path": base, "target_modules": kinds}
    with Draft(out) as part:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            part / "adapter_model.safetensors",
            {"format": "pt"},
        )
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=1))
        remember_base(part, base)
    return kinds


def merge(folder: str | Path, out: str | Path, base: str | None = None) -> Path:
    """Write base + adapter as an ordinary model folder `out`, in the base's dtype, with the
    adapter's tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, out = check_base(folder, base), Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty; choose another --output_dir")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(folder).save_pretrained(part)
    if out.exists():
        out.rmdir()
    os.replace(part, out)
    return out
