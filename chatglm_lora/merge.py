"""Merge a LoRA adapter into its base model, after checking that it was trained on that base.

    python chatglm_lora/merge.py --adapter output/chatglm_lora/final --output_dir output/merged [--base MODEL]
    python chatglm_lora/merge.py --adapter ... --output_dir ... --layout original       # files as the published ones
    python chatglm_lora/merge.py --adapter chatglm-lora.pt --base models/chatglm-6b --output_dir output/merged
    python chatglm_lora/merge.py --adapter chatglm-lora.pt --base models/chatglm-6b --to_adapter output/adapter

chatglm-lora.pt is what the training scripts of zero_nlp left: tensors without settings. The rank
follows from their shapes, --lora_alpha has to be told (theirs was 32). --to_adapter makes a peft
folder of it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli  # noqa: I001  (before torch and transformers: it brings the device)
from common.convert import adapter

import argparse
import json
import re
import shutil
import tempfile
from contextlib import contextmanager

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from common.convert.weight_files import Draft, Weights, check_shape, read_pickle, save_sharded
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
PUBLISHED_FILES = ["ice_text.model", "tokenizer_config.json", "special_tokens_map.json"]


# ---- chatglm-lora.pt -> peft folder -----------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """The name of a parameter without what DDP, peft's adapter names and CastOutputToFloat put into
    it."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    return re.sub(r"(\.lora_[AB])\.default\b", r"\1", name).replace("lm_head.0.", "lm_head.")


def read_old(path: Path, base: str, expected: dict) -> dict[str, dict[str, torch.Tensor]]:
    """An old adapter file -> {module: {"lora_A", "lora_B"}}.

    It may hold frozen weights too, which are left out when they are those of `base`; SystemExit
    when they are not.
    """
    modules, others = {}, []
    for name, tensor in read_pickle(path).items():
        module, _, kind = plain_name(name).removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_B") and f"{module}.weight" in expected:
            modules.setdefault(module, {})[kind] = tensor
        elif plain_name(name) in expected:
            others.append((plain_name(name), tensor))
        elif not DERIVED.search(name):
            raise SystemExit(f"{path}: {name} has no place in ChatGLM-6B")
    if torn := [module for module, pair in modules.items() if len(pair) < 2]:
        raise SystemExit(f"{path}: {torn[0]} has only one of lora_A and lora_B")
    if not modules:
        raise SystemExit(f"{path} holds no LoRA weights: nothing of the adapter was saved in it")
    weights = Weights(Path(base)) if others else {}
    for name, tensor in others:
        if not torch.equal(tensor.half(), weights[name].half()):
            raise SystemExit(
                f"{path}: {name} is not that of {base}; was it trained on another model, or all of it?"
            )
    return modules


def plain_pair(
    name: str, pair: dict, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """LoRA tensors of one module -> (A [r, in], B [out, r], what alpha is to be multiplied with).

    Early peft updated the first and the last third of the rows of a fused matrix, each with a rank
    of its own, and kept B as the kernel of a convolution [2 out / 3, r, 1]. The same update is one
    of rank 2 r with a sparse B.
    """
    a, b, (rows, columns) = pair["lora_A"].float(), pair["lora_B"].float(), weight.shape
    if b.dim() == 2:
        check_shape(f"{name}.lora_A", a.shape, [b.shape[1], columns])
        check_shape(f"{name}.lora_B", b.shape, [rows, b.shape[1]])
        return a, b, 1
    third, rank = rows // 3, b.shape[1]
    check_shape(f"{name}.lora_A", a.shape, [2 * rank, columns])
    check_shape(f"{name}.lora_B", b.shape, [2 * third, rank, 1])
    whole = torch.zeros(rows, 2 * rank)
    whole[:third, :rank], whole[-third:, rank:] = b[:third, :, 0], b[third:, :, 0]
    return a, whole, 2


def write_adapter(path: Path, out: Path, base: str | None, alpha: float) -> None:
    """An old adapter file -> a peft folder for `base`, with the base's tokenizer and
    fingerprint."""
    if base is None:
        raise SystemExit(f"{path} does not say on which model it was trained: give --base")
    config = cli.model_config(base, "--base")
    if not isinstance(config, ChatGLMConfig):
        raise SystemExit(f"--base {base} is not ChatGLM-6B")
    expected = empty_weights(ChatGLMForConditionalGeneration, config)
    modules = read_old(path, base, expected)
    tensors, ranks = {}, set()
    for name, pair in modules.items():
        a, b, factor = plain_pair(name, pair, expected[f"{name}.weight"])
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": a,
            f"base_model.model.{name}.lora_B.weight": b,
        }
        ranks.add((len(a), factor))
    if len(ranks) > 1:
        raise SystemExit(f"{path}: modules of different ranks {sorted(rank for rank, _ in ranks)}")
    ((rank, factor),) = ranks
    kinds = sorted({name.rpartition(".")[2] for name in modules})
    everywhere = len(modules) == sum(
        name.removesuffix(".weight").rpartition(".")[2] in kinds for name in expected
    )
    targets = kinds if everywhere else sorted(modules)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha * factor,
        target_modules=targets,
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    with Draft(out) as part:
        settings.save_pretrained(part)
        save_file(tensors, part / "adapter_model.safetensors", {"format": "pt"})
        cli.load(AutoTokenizer, base, "--base").save_pretrained(part)
        adapter.remember_base(part, base)
    cli.say(
        f"adapter of {path}: rank {rank // factor}, alpha {alpha:g}, {len(modules)} modules ({', '.join(kinds)})"
    )


@contextmanager
def adapter_folder(args):
    """The adapter as a peft folder that has a tokenizer: itself, or made of it beside the
    output."""
    path = Path(args.adapter)
    with tempfile.TemporaryDirectory() as place:
        if path.is_file():
            folder = Path(args.to_adapter or f"{place}/adapter")
            write_adapter(path, folder, args.base, args.lora_alpha)
        elif (path / "tokenizer_config.json").is_file() or not path.is_dir():
            folder = path
        else:
            folder = Path(place, "adapter")
            shutil.copytree(path, folder)
            base = adapter.check_base(folder, args.base)
            cli.load(AutoTokenizer, base, "--base").save_pretrained(folder)
        yield folder


# ---- published layout -------------------------------------------------------------------------------------------


def to_original(native: Path, out: Path, base: str) -> None:
    """A ChatGLM-6B folder as transformers saves it -> names, config.json and files of the published
    checkpoint.

    Code and tokenizer files are taken from the folder of the base, where it has them.
    """
    config = ChatGLMConfig.from_pretrained(native)
    if config.residual_scale_layers != 28:
        raise SystemExit(
            f"residual_scale_layers is {config.residual_scale_layers}; the published code knows only 28"
        )
    weights, files = Weights(native), Path(base)
    half = weights["lm_head.weight"].dtype != torch.float32
    size = config.hidden_size // config.num_attention_heads // 2
    buffer = inverse_frequencies(size, torch.device("cpu")).to(
        torch.float16 if half else torch.float32
    )

    def tensors():
        yield from weights.items()
        for layer in range(config.num_layers):
            yield f"transformer.layers.{layer}.attention.rotary_emb.inv_freq", buffer.clone()

    with Draft(out) as part:
        save_sharded(tensors(), part)
        for path in [
            p for p in native.iterdir() if p.name in (*PUBLISHED_FILES, "chat_template.jinja")
        ]:
            shutil.copy(path, part)
        for path in [p for p in files.glob("*") if p.name in PUBLISHED_FILES or p.suffix == ".py"]:
            shutil.copy(path, part)
        (part / "config.json").write_text(json.dumps(published_config(config, files), indent=2))


def published_config(config: ChatGLMConfig, base: Path) -> dict:
    """config.json with the field names of the published one; auto_map, which names its code, as the
    base has it."""
    fields = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
    if (base / "config.json").is_file():
        known = json.loads((base / "config.json").read_text(encoding="utf-8"))
        fields |= {name: known[name] for name in ("auto_map",) if name in known}
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    return fields | {name: getattr(config, name) for name in PUBLISHED} | {"torch_dtype": dtype}


def merge(folder: Path, out: Path, base: str | None, layout: str) -> None:
    if layout == "native":
        adapter.merge(folder, out, base)
        return
    base = adapter.check_base(folder, base)
    if not isinstance(cli.model_config(base, "--base"), ChatGLMConfig):
        raise SystemExit(f"--layout original is for ChatGLM-6B; {base} is another model")
    native = out.with_name(out.name + ".native")
    shutil.rmtree(native, ignore_errors=True)
    try:
        to_original(adapter.merge(folder, native, base), out, base)
    finally:
        shutil.rmtree(native, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--adapter", required=True, help="folder with adapter_config.json, or a chatglm-lora.pt"
    )
    parser.add_argument("--output_dir", help="where the merged model goes; must be empty")
    parser.add_argument(
        "--base", default=None, help="base model; default: the one the adapter names"
    )
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
            "say where the result goes: --output_dir for a merged model, --to_adapter for a peft folder"
        )
    if args.to_adapter and not Path(args.adapter).is_file():
        raise SystemExit(
            f"--to_adapter is for a chatglm-lora.pt, and {args.adapter} is no such file"
        )
    for place in filter(None, [args.output_dir, args.to_adapter]):
        Draft(place)  # tells at once when there is something
    with adapter_folder(args) as folder:
        if args.to_adapter:
            print("adapter:", args.to_adapter)
        if args.output_dir:
            merge(folder, Path(args.output_dir), args.base, args.layout)
            print("merged model:", args.output_dir)


if __name__ == "__main__":
    cli.run(main)
