"""InternLM's published layouts, which train.py does not run: importing this module lets AutoConfig
answer such a folder with the command that converts it.

InternLM3 is native in transformers and passes.
"""

import shlex
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

HERE = Path(__file__).resolve().parent


class PublishedInternLM2Config(PreTrainedConfig):
    """Never made: raises ValueError with the command to paste."""

    model_type = "internlm2"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        name = str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "MODEL")
        raise ValueError(how_to_convert(name))


class PublishedInternLMConfig(PublishedInternLM2Config):
    model_type = "internlm"


def how_to_convert(name: str) -> str:
    """In one line what to do with the published model in a folder, or of a hub id."""
    folder = Path(name).name
    model = shlex.quote(name)
    fetch = ""
    if not Path(name).expanduser().is_dir():
        fetch = f"python -m tools.download {model}, then "
        model = "FOLDER"
    convert = HERE / "convert.py"
    return (
        f"the published layout of InternLM; {fetch}python {convert} --model {model} "
        f"--output_dir models/{shlex.quote(folder + '-native')}, and give that folder here"
    )


for config in (PublishedInternLM2Config, PublishedInternLMConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
