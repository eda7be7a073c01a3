"""Merge a LoRA adapter into its base model, after checking that it was trained on that base.

    python chatglm_lora/merge.py --adapter output/chatglm_lora/final --output_dir OUT [--base MODEL]
    python chatglm_lora/merge.py --adapter ... --output_dir OUT --layout original
    python chatglm_lora/merge.py --adapter chatglm-lora.pt --base models/chatglm-6b --output_dir OUT
    python chatglm_lora/merge.py --adapter chatglm-lora.pt --base models/chatglm-6b --to_adapter OUT

--layout original writes files as the published ones are. chatglm-lora.pt is what the training
scripts of zero_nlp left: tensors without settings. The rank follows from their shapes, --lora_alpha
has to be given (theirs was 32). --to_adapter makes a peft folder of it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli  # noqa: I001  (before torch and transformers: it brings the device)

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from common.convert import adapter, models
from common.convert.older_readers import save_tokenizer
from common.convert.weight_files import Weights, check_shape, read_pickle, save_sharded
from common.data.files import check_empty, new_folder
from common.data.progress import Progress
from convert import DERIVED, empty_weights
from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, inverse_frequencies

# the fields of the published config.json; its code knows no others
PUBLISHED = [
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "max_sequence_length",
    "layernorm_epsilon",
    "position_encoding_2d",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "mask_token_id",
    "gmask_token_id",
]
TOKENIZER_FILES = ["ice_text.model", "tokenizer_config.json", "special_tokens_map.json"]
LAYERS = 28  # whose residual factor the published code has, whatever the config says


# ---- chatglm-lora.pt -> peft folder --------------------------------------------------------------


class Plain(NamedTuple):
    """LoRA of one module. a: [r, in]; b: [out, r]; factor: what alpha is to be multiplied with."""

    a: Tensor
    b: Tensor
    factor: int


def write_adapter(path: Path, out: Path, base: str | None, alpha: float) -> None:
    """An old adapter file -> a peft folder for `base`, with the base's tokenizer and
    fingerprint."""
    if base is None:
        raise SystemExit(f"{path} does not say on which model it was trained: give --base")
    config = models.model_config(base, "--base")
    if not isinstance(config, ChatGLMConfig):
        raise SystemExit(f"--base {base} is not ChatGLM-6B")
    expected = empty_weights(ChatGLMForConditionalGeneration, config)
    modules = {
        name: plain_pair(name, pair, expected[f"{name}.weight"].shape)
        for name, pair in read_old(path, base, expected).items()
    }
    sizes = {(len(pair.a), pair.factor) for pair in modules.values()}
    if len(sizes) > 1:
        ranks = sorted(rank for rank, _ in sizes)
        raise SystemExit(f"{path}: modules of different ranks {ranks}")
    rank, factor = sizes.pop()
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha * factor,
        target_modules=target_modules(modules, expected),
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    tensors = {}
    for name, pair in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b
    with new_folder(out) as part:
        settings.save_pretrained(part)
        save_file(tensors, part / "adapter_model.safetensors", {"format": "pt"})
        save_tokenizer(models.load(AutoTokenizer, base, "--base"), part)
        adapter.remember_base(part, base)
    kinds = ", ".join(sorted(kinds_of(modules)))
    cli.say(
        f"adapter of {path}: rank {rank // factor}, alpha {alpha:g}, "
        f"{len(modules)} modules ({kinds})"
    )


def read_old(path: Path, base: str, expected: dict) -> dict[str, dict[str, Tensor]]:
    """An old adapter file -> {module: {"lora_A", "lora_B"}}.

    It may hold frozen weights too, which are left out when they are those of `base`; SystemExit
    when they are not.
    """
    modules = {}
    frozen = {}
    for name, tensor in read_pickle(path).items():
        plain = plain_name(name)
        module, _, matrix = plain.removesuffix(".weight").rpartition(".")
        if matrix in ("lora_A", "lora_B") and f"{module}.weight" in expected:
            modules.setdefault(module, {})[matrix] = tensor
        elif plain in expected:
            frozen[plain] = tensor
        elif not DERIVED.search(name):
            raise SystemExit(f"{path}: {name} has no place in ChatGLM-6B")
    for module, pair in modules.items():
        if len(pair) < 2:
            raise SystemExit(f"{path}: {module} has only one of lora_A and lora_B")
    if not modules:
        raise SystemExit(f"{path} holds no LoRA weights: nothing of the adapter was saved in it")
    if frozen:
        check_frozen(path, frozen, base)
    return modules


def plain_name(name: str) -> str:
    """The name of a parameter without what DDP, peft's adapter names and CastOutputToFloat put into
    it."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    name = re.sub(r"(\.lora_[AB])\.default\b", r"\1", name)
    return name.replace("lm_head.0.", "lm_head.")


def check_frozen(path: Path, frozen: dict[str, Tensor], base: str) -> None:
    weights = Weights(Path(base))
    with Progress("compare", total=len(frozen), unit="tensors") as progress:
        for name, tensor in frozen.items():
            if not torch.equal(tensor.half(), weights[name].half()):
                raise SystemExit(
                    f"{path}: {name} is not that of {base}; was it trained on another model, or "
                    "all of it?"
                )
            progress.update()


def plain_pair(name: str, pair: dict[str, Tensor], shape: torch.Size) -> Plain:
    """LoRA tensors of the module `name`, whose weight has this shape, as peft has them today.

    Early peft updated the first and the last third of the rows of a fused matrix, each with a rank
    of its own, and kept B as the kernel of a convolution [2 out / 3, r, 1]. The same update is one
    of rank 2 r with a sparse B.
    """
    a = pair["lora_A"].float()
    b = pair["lora_B"].float()
    rows, columns = shape
    rank = b.shape[1]
    if b.dim() == 2:
        check_shape(f"{name}.lora_A", a.shape, [rank, columns])
        check_shape(f"{name}.lora_B", b.shape, [rows, rank])
        return Plain(a, b, 1)
    third = rows // 3
    check_shape(f"{name}.lora_A", a.shape, [2 * rank, columns])
    check_shape(f"{name}.lora_B", b.shape, [2 * third, rank, 1])
    sparse = torch.zeros(rows, 2 * rank)
    sparse[:third, :rank] = b[:third, :, 0]
    sparse[-third:, rank:] = b[third:, :, 0]
    return Plain(a, sparse, 2)


def target_modules(modules: dict, expected: dict) -> list[str]:
    """peft's target_modules: kinds of layers, or names where not all of a kind have an update."""
    kinds = kinds_of(modules)
    weights = [name.removesuffix(".weight") for name in expected]
    all_of_them = [name for name in weights if name.rpartition(".")[2] in kinds]
    return sorted(kinds) if len(modules) == len(all_of_them) else sorted(modules)


def kinds_of(modules: dict) -> set[str]:
    return {name.rpartition(".")[2] for name in modules}


@contextmanager
def adapter_folder(args) -> Iterator[Path]:
    """The adapter as a peft folder that has a tokenizer: itself, or made of it in a temporary
    place."""
    path = Path(args.adapter)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "adapter")
        if path.is_file():
            if args.to_adapter:
                folder = Path(args.to_adapter)
            write_adapter(path, folder, args.base, args.lora_alpha)
        elif (path / "tokenizer_config.json").is_file() or not path.is_dir():
            folder = path
        else:
            shutil.copytree(path, folder)
            base = adapter.check_base(folder, args.base)
            save_tokenizer(models.load(AutoTokenizer, base, "--base"), folder)
        yield folder


# ---- published layout ----------------------------------------------------------------------------


def to_original(native: Path, out: Path, base: str) -> None:
    """A ChatGLM-6B folder as transformers saves it -> names, config.json and files of the published
    checkpoint.

    Code and tokenizer files are taken from the folder of the base, where it has them.
    """
    config = ChatGLMConfig.from_pretrained(native)
    if config.residual_scale_layers != LAYERS:
        raise SystemExit(
            f"residual_scale_layers is {config.residual_scale_layers}; the published code knows "
            f"only {LAYERS}"
        )
    files = Path(base)
    own = [*TOKENIZER_FILES, "chat_template.jinja"]
    with new_folder(out) as part:
        save_sharded(published_tensors(Weights(native), config), part)
        for path in native.iterdir():
            if path.name in own:
                shutil.copy(path, part)
        for path in files.glob("*"):
            if path.name in TOKENIZER_FILES or path.suffix == ".py":
                shutil.copy(path, part)
        content = json.dumps(published_config(config, files), indent=2)
        (part / "config.json").write_text(content, encoding="utf-8")


def published_tensors(weights: Weights, config: ChatGLMConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, and the buffer of the rotation that each published layer has."""
    is_half = weights["lm_head.weight"].dtype != torch.float32
    head_size = config.hidden_size // config.num_attention_heads
    buffer = inverse_frequencies(head_size // 2, torch.device("cpu"))
    buffer = buffer.to(torch.float16 if is_half else torch.float32)
    with Progress("write", total=len(weights), unit="tensors") as progress:
        for name, tensor in weights.items():
            yield name, tensor
            progress.update()
    for layer in range(config.num_layers):
        yield f"transformer.layers.{layer}.attention.rotary_emb.inv_freq", buffer.clone()


def published_config(config: ChatGLMConfig, base: Path) -> dict:
    """config.json with the field names of the published one; auto_map, which names its code, as the
    base has it."""
    fields = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
    if (base / "config.json").is_file():
        known = json.loads((base / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in known:
            fields["auto_map"] = known["auto_map"]
    fields |= {name: getattr(config, name) for name in PUBLISHED}
    fields["torch_dtype"] = str(config.dtype or torch.float32).removeprefix("torch.")
    return fields


def merge(folder: Path, out: Path, base: str | None, layout: str) -> None:
    if layout == "native":
        adapter.merge(folder, out, base)
        return
    base = adapter.check_base(folder, base)
    if not isinstance(models.model_config(base, "--base"), ChatGLMConfig):
        raise SystemExit(f"--layout original is for ChatGLM-6B; {base} is another model")
    native = out.with_name(out.name + ".native")
    shutil.rmtree(native, ignore_errors=True)
    try:
        to_original(adapter.merge(folder, native, base), out, base)
    finally:
        shutil.rmtree(native, ignore_errors=True)


# ---- command line --------------------------------------------------------------------------------


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--adapter", required=True, help="folder with adapter_config.json, or a chatglm-lora.pt"
    )
    parser.add_argument("--output_dir", help="where the merged model goes; must be empty")
    parser.add_argument("--base", help="base model; default: the one the adapter names")
    parser.add_argument(
        "--layout",
        choices=["native", "original"],
        default="native",
        help="names and files of the result",
    )
    parser.add_argument(
        "--to_adapter", help="for a chatglm-lora.pt: where its peft folder goes; must be empty"
    )
    parser.add_argument(
        "--lora_alpha",
        type=float,
        default=32,
        help="for a chatglm-lora.pt: the alpha of its training",
    )
    args = parser.parse_args()
    if not args.output_dir and not args.to_adapter:
        raise SystemExit(
            "say where the result goes: --output_dir for a merged model, --to_adapter for a peft "
            "folder"
        )
    if args.to_adapter and not Path(args.adapter).is_file():
        raise SystemExit(
            f"--to_adapter is for a chatglm-lora.pt, and {args.adapter} is no such file"
        )
    for place in (args.output_dir, args.to_adapter):
        if place:
            check_empty(place)  # fails at once where something stands
    return args


def main() -> None:
    args = parse_args()
    with adapter_folder(args) as folder:
        if args.to_adapter:
            print("adapter:", args.to_adapter)
        if args.output_dir:
            merge(folder, Path(args.output_dir), args.base, args.layout)
            print("merged model:", args.output_dir)


if __name__ == "__main__":
    cli.run(main)
