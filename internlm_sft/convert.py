"""Published InternLM, InternLM2 and InternLM2.5 checkpoints -> LlamaForCausalLM folders that every
transformers program loads without remote code.

    python internlm_sft/convert.py --model models/internlm2_5-7b-chat --output_dir models/ilm2.5
    python internlm_sft/convert.py --model models/internlm-chat-7b --output_dir models/ilm1
    python internlm_sft/convert.py --model old-adapter --base models/ilm2.5 --output_dir OUT

wqkv becomes q_proj, k_proj and v_proj; the first InternLM has Llama's names already. The logits are
the same, with dynamic rotation beyond the trained length too. tokenizer.model becomes a fast
tokenizer with the chat template of the model. InternLM3 needs no conversion.

Weights are read from *.safetensors or pytorch_model*.bin (never unpickled as code) and written
shard by shard: memory holds one shard. Every tensor of the source must have its place, and every
place a tensor.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # noqa: I001  (before torch and transformers: it brings the device)

import json
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import fast_tokenizer
import layout
import published  # noqa: F401  (a base that is not converted yet gets the command for it)
from common.convert import adapter, model_folder, models
from common.convert.older_readers import save_tokenizer
from common.convert.weight_files import SHARD_GB, Weights, check_shape, save_sharded
from common.data.files import check_empty, new_folder
from common.data.labels import turn_end_ids
from common.data.progress import Progress

DTYPES = ["auto", "float32", "bfloat16", "float16"]
CHATS = list(fast_tokenizer.END_OF_ANSWER)
DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that are computed, not learned
FUSED = re.compile(r"\.attention\.wqkv\.")
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# what Llama's blocks compute; another value in config.json is another model
PLAIN = {"hidden_act": "silu", "tie_word_embeddings": False, "quantization_config": None}
ROTATIONS = {"origin": "default", "default": "default", "linear": "linear", "dynamic": "dynamic"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# what else of a generation_config.json holds for generate()
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def read_json(path: Path) -> dict:
    """The object in a file; {} where there is none, SystemExit where it is something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} cannot be read ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path} holds no JSON object; fetch it again")
    return content


# ---- config --------------------------------------------------------------------------------------


def native_config(old: dict, fused: bool) -> LlamaConfig:
    """Fields of a published config.json -> the config of the same Llama; fused: of InternLM2.

    SystemExit for what Llama does not compute.
    """
    check_config(old)
    heads = old["num_attention_heads"]
    return LlamaConfig(
        **{name: old[name] for name in NEEDED},
        num_key_value_heads=old.get("num_key_value_heads") or heads,
        attention_bias=old.get("bias", True),
        rms_norm_eps=old.get("rms_norm_eps", 1e-6),
        max_position_embeddings=old.get("max_position_embeddings", 2048),
        initializer_range=old.get("initializer_range", 0.02),
        rope_parameters=rotation(old),
        bos_token_id=old.get("bos_token_id", 1),
        eos_token_id=old.get("eos_token_id", 2),
        pad_token_id=old.get("pad_token_id", 2 if fused else 0),
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def check_config(old: dict) -> None:
    if old.get("model_type") in ("internlm3", "llama"):
        raise SystemExit(
            f"a model of type {old['model_type']} needs no conversion: give its folder to train.py"
        )
    missing = [name for name in NEEDED if name not in old]
    if missing:
        raise SystemExit(f"config.json lacks {', '.join(missing)}: not an InternLM checkpoint")
    wrong = [f"{name}={old[name]}" for name in PLAIN if old.get(name, PLAIN[name]) != PLAIN[name]]
    if wrong:
        raise SystemExit(
            f"this checkpoint cannot be computed by Llama's blocks: {', '.join(wrong)}"
        )
    heads = old["num_attention_heads"]
    groups = old.get("num_key_value_heads") or heads
    if old["hidden_size"] % heads or heads % groups:
        raise SystemExit(
            f"config.json: hidden_size {old['hidden_size']}, num_attention_heads {heads} and "
            f"num_key_value_heads {groups} do not divide: q, k and v cannot be taken apart"
        )


def rotation(old: dict) -> dict:
    """The rotary settings of any InternLM; SystemExit for a kind that the original has not.

    The first InternLM says rotary {base, type, scaling_factor}, the second rope_theta and
    rope_scaling {type, factor}.
    """
    first = old.get("rotary") or {}
    scaling = old.get("rope_scaling") or {}
    theta = old.get("rope_theta", first.get("base", 10000.0))
    kind = scaling.get("rope_type") or scaling.get("type") or first.get("type", "default")
    if kind not in ROTATIONS:
        raise SystemExit(f"config.json: a rotation of type {kind} is not InternLM's")
    found = {"rope_type": ROTATIONS[kind], "rope_theta": float(theta)}
    if found["rope_type"] != "default":
        found["factor"] = float(scaling.get("factor", first.get("scaling_factor", 1.0)))
    return found


def empty_weights(config: LlamaConfig) -> dict[str, Tensor]:
    """The weights that the model of such a config has, without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(config).state_dict()


# ---- weights -------------------------------------------------------------------------------------


def to_native(
    folder: Path,
    out: Path,
    dtype: str = "auto",
    chat: str | None = None,
    shard_gb: float = SHARD_GB,
) -> None:
    """A published folder -> a native one with its tokenizer. All checks come first.

    dtype: of the written weights, one of DTYPES; chat: one of CHATS, default by the folder's files;
    shard_gb: GB in one file of weights.
    """
    old = read_json(folder / "config.json")
    weights = Weights(folder)
    fused = any(FUSED.search(name) for name in weights)
    config = native_config(old, fused)
    names = check_weights(weights, config, fused, folder)
    config.dtype = dtype_of(weights, fused) if dtype == "auto" else getattr(torch, dtype)
    tokenizer = make_tokenizer(folder, config, chat)

    with new_folder(out) as part:
        config.save_pretrained(part)
        generation_config(folder, config, tokenizer).save_pretrained(part)
        save_tokenizer(tokenizer, part)
        size = save_sharded(converted(weights, names, config), part, shard_gb)
    cli.say(f"{out}: LlamaForCausalLM, {size / 1e9:.2f} GB in {str(config.dtype)[6:]}")


def dtype_of(weights: Weights, fused: bool) -> torch.dtype:
    head = "output.weight" if fused else "lm_head.weight"
    return weights[head].dtype


def check_weights(
    weights: Weights, config: LlamaConfig, fused: bool, folder: Path
) -> dict[str, list[str]]:
    """-> {published name: its native ones}; SystemExit where the names or shapes of the weights are
    not those of `config`."""
    expected = empty_weights(config)
    names = layout.native_names(expected) if fused else {name: [name] for name in expected}
    found = {name for name in weights if not DERIVED.search(name)}
    differences = {"lacks": set(names) - found, "has unknown": found - set(names)}
    for problem, wrong in differences.items():
        if wrong:
            shown = ", ".join(sorted(wrong)[:3])
            raise SystemExit(f"{folder} {problem} {len(wrong)} tensors: {shown}")
    for name, native in names.items():
        rows = sum(len(expected[one]) for one in native)
        check_shape(name, weights.shape(name), [rows, *expected[native[0]].shape[1:]])
    return names


def converted(
    weights: Weights, names: dict[str, list[str]], config: LlamaConfig
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors -> native ones by name, in the dtype of `config`."""
    with Progress("convert", total=len(names), unit="tensors") as progress:
        for name, native in names.items():
            tensor = weights[name].to(config.dtype)
            yield from zip(native, parts_of(tensor, native, config), strict=True)
            progress.update()


def parts_of(tensor: Tensor, native: list[str], config: LlamaConfig) -> list[Tensor]:
    """A tensor of as many native ones as there are names: q, k and v, or itself."""
    if len(native) == 1:
        return [tensor]
    return layout.split_wqkv(tensor, config.num_attention_heads, config.num_key_value_heads)


# ---- tokenizer and chat --------------------------------------------------------------------------


def chat_format(folder: Path, config: LlamaConfig, names: dict[int, str]) -> str:
    """One of CHATS, by the tokens `names` of the tokenizer. How the first InternLM is asked is told
    by the folder's code (read, not run), else by the bias: the 20B and the later 7B have no <eoh>
    behind a question."""
    if "<|im_end|>" in names.values():
        return "internlm2"
    code = folder / "modeling_internlm.py"
    text = code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
    if "<|Bot|>" in text:
        return "internlm" if "<eoh>" in text else "internlm_v1.1"
    chat = "internlm" if config.attention_bias else "internlm_v1.1"
    cli.say(
        f"{folder} does not tell how it is asked: taken as {chat} (--chat internlm has <eoh> "
        "behind a question, internlm_v1.1 has not)"
    )
    return chat


def make_tokenizer(folder: Path, config: LlamaConfig, chat: str | None):
    """The fast tokenizer of a published folder, or None, said in one line, where it has none; the
    token ids of `config` become those of the tokenizer."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        cli.say(f"{folder} has no tokenizer.model: only the weights are converted")
        return None
    proto = fast_tokenizer.read_model(path)
    names = fast_tokenizer.special_names(proto, tokenizer_settings(folder), path)
    chat = chat or chat_format(folder, config, names)
    end = fast_tokenizer.END_OF_ANSWER[chat]
    if end not in names.values():
        raise SystemExit(f"{path} has no {end}: not the tokenizer of this model")
    tokenizer = fast_tokenizer.make_tokenizer(
        proto, names, chat, model_max_length=config.max_position_embeddings
    )
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"{path} has {len(tokenizer)} tokens, the model only {config.vocab_size}; "
            "not its tokenizer?"
        )
    fast_tokenizer.compare(tokenizer, proto, names)
    for name in TOKEN_IDS:  # the first ones say pad 0, which is <unk>, and pad with </s>
        setattr(config, name, getattr(tokenizer, name))
    cli.say(
        f"tokenizer: {len(proto.pieces):,} pieces, {len(names)} of them special, the chat template "
        f"{chat}"
    )
    return tokenizer


def tokenizer_settings(folder: Path) -> dict:
    """The published tokenizer_config.json, with the tokens that older programs wrote beside it."""
    settings = read_json(folder / "tokenizer_config.json")
    added = read_json(folder / "added_tokens.json")
    tokens = {str(i): {"content": name} for name, i in added.items()}
    return settings | {"added_tokens_decoder": tokens | settings.get("added_tokens_decoder", {})}


def generation_config(folder: Path, config: LlamaConfig, tokenizer) -> GenerationConfig:
    """The token ids of `config`, the end of an answer beside </s>, and how the published
    generation_config.json samples."""
    said = read_json(folder / "generation_config.json")
    settings = {name: said[name] for name in SAMPLING if name in said}
    settings |= {name: getattr(config, name) for name in TOKEN_IDS}
    if tokenizer is not None:
        settings["eos_token_id"] = [config.eos_token_id, *turn_end_ids(tokenizer)]
    return GenerationConfig(**settings)


# ---- LoRA adapters -------------------------------------------------------------------------------


def to_native_adapter(folder: Path, out: Path, base: str | None) -> None:
    """A peft adapter trained on the published code -> one for the converted model `base`; the same
    update of weights.

    Of wqkv + s B A the rows of B are taken apart like those of wqkv, and each part keeps A.
    """
    if base is None:
        raise SystemExit("an adapter needs --base, the folder of its converted base model")
    settings, lora = adapter.read_plain(folder)
    config = models.model_config(base, "--base")
    if not isinstance(config, LlamaConfig):
        raise SystemExit(f"--base {base} is not a converted InternLM")
    weights = empty_weights(config).items()
    shapes = {name.removesuffix(".weight"): w.shape for name, w in weights if w.dim() == 2}
    # of InternLM2, and of the first InternLM, whose names are the native ones
    names = layout.native_names(shapes) | {name: [name] for name in shapes}
    tensors = {}
    for name, tensor in lora.items():
        path = name.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, matrix = path.rpartition(".")
        if module not in names or matrix not in ("lora_A", "lora_B"):
            raise SystemExit(f"{folder}: {name} has no place in InternLM")
        native = names[module]
        if matrix == "lora_A":
            check_shape(name, tensor.shape, [settings["r"], shapes[native[0]][1]])
            parts = [tensor.clone() for _ in native]
        else:
            rows = sum(shapes[one][0] for one in native)
            check_shape(name, tensor.shape, [rows, settings["r"]])
            parts = parts_of(tensor, native, config)
        for one, part in zip(native, parts, strict=True):
            tensors[f"base_model.model.{one}.{matrix}.weight"] = part
    kinds = adapter.write_plain(out, settings, tensors, base)
    cli.say(f"{out}: adapter for {base} on {', '.join(kinds)}")


# ---- command line --------------------------------------------------------------------------------


def check_flags(parser, args, is_adapter: bool) -> None:
    """A usage error for flags that would change nothing."""
    idle = ("dtype", "chat", "max_shard_size") if is_adapter else ("base",)
    given = [f"--{name}" for name in idle if getattr(args, name) != parser.get_default(name)]
    if given:
        kind = "an adapter" if is_adapter else "a checkpoint, not an adapter"
        raise cli.usage_error(f"{', '.join(given)} changes nothing: {args.model} is {kind}")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of a published checkpoint, or of an adapter for one"
    )
    parser.add_argument("--output_dir", required=True, help="where the result goes; must be empty")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as it is")
    parser.add_argument("--chat", choices=CHATS, help="how it is asked; default: by its files")
    parser.add_argument("--base", help="for an adapter: the converted base model")
    parser.add_argument(
        "--max_shard_size", type=float, default=SHARD_GB, help="GB in one file of weights"
    )
    args = parser.parse_args()
    folder = Path(args.model)
    out = Path(args.output_dir)
    check_empty(out)  # fails at once where something stands
    is_adapter = (folder / "adapter_config.json").is_file()
    check_flags(parser, args, is_adapter)
    if is_adapter:
        return to_native_adapter(folder, out, args.base)
    if not (folder / "config.json").is_file():
        raise SystemExit(
            f"--model {folder}: no folder with a config.json; download the checkpoint first"
        )
    model_folder.check(folder)
    to_native(folder, out, args.dtype, args.chat, args.max_shard_size)


if __name__ == "__main__":
    cli.run(main)
