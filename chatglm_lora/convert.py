"""Published ChatGLM checkpoints -> folders that train.py and any transformers program load without
remote code.

    python chatglm_lora/convert.py --model models/chatglm3-6b --output_dir OUT    # 2 and 3 -> Glm
    python chatglm_lora/convert.py --model models/chatglm-6b-old --output_dir OUT # 150528 -> 130528
    python chatglm_lora/convert.py --model old-adapter --base models/chatglm2-native \\
        --output_dir OUT

Weights are read from *.safetensors or pytorch_model*.bin (never unpickled as code) and written
shard by shard: memory holds one shard. Every tensor of the source must have its place, and every
place a tensor. tokenizer.model becomes a fast tokenizer with the chat template of the model; GLM-4
has another kind of tokenizer and needs its own.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli  # noqa: I001  (before torch and transformers: it brings the device)

import json
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM

import fast_tokenizer
from common.convert import adapter, model_folder, models
from common.convert.older_readers import save_tokenizer
from common.convert.weight_files import SHARD_GB, Weights, check_shape, save_sharded
from common.data.files import check_empty, new_folder
from common.data.progress import Progress
from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from tokenization_chatglm import ChatGLMTokenizer

DTYPES = ["auto", "float32", "bfloat16", "float16"]
DERIVED = re.compile(r"rotary_(pos_)?emb\.inv_freq$")  # buffers that are computed, not learned

# field of the published config -> (its default there, the only value that Glm computes)
FIXED = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "multi_query_attention": (False, True),
    "original_rope": (True, True),
    "fp32_residual_connection": (False, False),
    "hidden_dropout": (0, 0),
    "tie_word_embeddings": (False, False),
    "quantization_bit": (0, 0),
    "pre_seq_len": (None, None),
}
NEEDED = (
    "num_layers",
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "num_attention_heads",
    "multi_query_group_num",
)
OUTER = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
BLOCK = {
    "input_layernorm": ["input_layernorm"],
    "post_attention_layernorm": ["post_attention_layernorm"],
    "self_attention.query_key_value": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.dense": ["self_attn.o_proj"],
    "mlp.dense_h_to_4h": ["mlp.gate_up_proj"],
    "mlp.dense_4h_to_h": ["mlp.down_proj"],
}


# ---- ChatGLM2, ChatGLM3, GLM-4 -> Glm: config and names ------------------------------------------


def glm_config(old: dict, interpolate: bool = False) -> GlmConfig:
    """Fields of a published ChatGLM2/3 config -> GlmConfig; SystemExit for what Glm does not
    compute.

    rope_ratio > 1 (the 32k models, GLM-4) makes the base of the rotation larger; interpolate: as in
    ChatGLM2-6B-32K it divides the positions instead.
    """
    check_config(old)
    ratio = old.get("rope_ratio") or 1
    rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
    if interpolate and ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(ratio), "rope_theta": 10000.0}
    return GlmConfig(
        vocab_size=old["padded_vocab_size"],
        hidden_size=old["hidden_size"],
        intermediate_size=old["ffn_hidden_size"],
        num_hidden_layers=old["num_layers"],
        num_attention_heads=old["num_attention_heads"],
        num_key_value_heads=old["multi_query_group_num"],
        head_dim=old["kv_channels"],
        rope_parameters=rope,
        max_position_embeddings=old.get("seq_length", 2048),
        rms_norm_eps=old.get("layernorm_epsilon", 1e-5),
        attention_bias=bool(old.get("add_qkv_bias", False)),
        attention_dropout=old.get("attention_dropout", 0.0),
        eos_token_id=old.get("eos_token_id", 2),
        pad_token_id=old.get("pad_token_id") or 0,
        bos_token_id=None,
        tie_word_embeddings=False,
        use_cache=True,
        architectures=["GlmForCausalLM"],
    )


def check_config(old: dict) -> None:
    wrong = []
    for name, (default, fixed) in FIXED.items():
        value = old.get(name, default)
        if bool(value) != bool(fixed):
            wrong.append(f"{name}={value}")
    if wrong:
        raise SystemExit(f"this checkpoint cannot be computed by Glm: {', '.join(wrong)}")
    missing = [name for name in NEEDED if name not in old]
    if missing:
        raise SystemExit(
            f"config.json lacks {', '.join(missing)}: not a ChatGLM2, ChatGLM3 or GLM-4 checkpoint"
        )


def native_modules(config: GlmConfig) -> dict[str, list[str]]:
    """Module of a published checkpoint -> its native modules: one, or three where q, k and v are
    fused."""
    names = {old: [new] for old, new in OUTER.items()}
    for layer in range(config.num_hidden_layers):
        for old, new in BLOCK.items():
            published = f"transformer.encoder.layers.{layer}.{old}"
            names[published] = [f"model.layers.{layer}.{one}" for one in new]
    return names


def native_names(config: GlmConfig) -> dict[str, list[str]]:
    """Parameter of a published checkpoint -> its native parameters."""
    expected = empty_weights(GlmForCausalLM, config)
    names = {}
    for old, new in native_modules(config).items():
        for kind in ("weight", "bias"):
            if f"{new[0]}.{kind}" in expected:
                names[f"{old}.{kind}"] = [f"{one}.{kind}" for one in new]
    return names


# ---- ChatGLM2, ChatGLM3, GLM-4 -> Glm: weights ---------------------------------------------------


def to_native(
    folder: Path,
    out: Path,
    dtype: str = "auto",
    family: str | None = None,
    shard_gb: float = SHARD_GB,
) -> None:
    """A published ChatGLM2/3 or GLM-4 folder -> a GlmForCausalLM folder with its tokenizer. All
    checks come first.

    dtype: of the written weights, one of DTYPES; shard_gb: GB in one file of weights.
    """
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = Weights(folder)
    family = family or guess_family(folder, old)
    config = glm_config(old, interpolates(folder, family))
    names = check_weights(weights, config, folder)
    config.dtype = target_dtype(weights, dtype)
    tokenizer = make_tokenizer(folder, family, config)

    with new_folder(out) as part:
        config.save_pretrained(part)
        generation_config(config, tokenizer).save_pretrained(part)
        save_tokenizer(tokenizer, part)
        size = save_sharded(native_tensors(weights, names, config), part, shard_gb)
    cli.say(f"{out}: GlmForCausalLM, {size / 1e9:.2f} GB in {str(config.dtype)[6:]}")


def native_tensors(
    weights: Weights, names: dict[str, list[str]], config: GlmConfig
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors -> native ones by name, in the dtype of `config`."""
    with Progress("convert", total=len(names), unit="tensors") as progress:
        for name, new in names.items():
            tensor = weights[name].to(config.dtype)
            yield from zip(new, split_rows(config, tensor, len(new)), strict=True)
            progress.update()


def split_rows(config: GlmConfig, tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """A tensor with the rows [q | k | v] -> the three, each with memory of its own; any other ->
    (itself,)."""
    if parts == 1:
        return (tensor,)
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return tuple(part.clone() for part in tensor.split([queries, keys, keys]))


def empty_weights(model_class, config) -> dict[str, Tensor]:
    """The weights that such a model has, without memory."""
    with torch.device("meta"):
        return model_class(config).state_dict()


def check_weights(weights: Weights, config: GlmConfig, folder: Path) -> dict[str, list[str]]:
    """-> `native_names`; SystemExit where the names or shapes of the weights are not those of
    `config`."""
    expected = empty_weights(GlmForCausalLM, config)
    names = native_names(config)
    check_names(weights, names, folder)
    for name, new in names.items():
        rows = sum(len(expected[one]) for one in new)
        check_shape(name, weights.shape(name), [rows, *expected[new[0]].shape[1:]])
    return names


def check_names(found: Iterable[str], expected: Iterable[str], folder: Path) -> None:
    found = {name for name in found if not DERIVED.search(name)}
    expected = set(expected)
    differences = {"lacks": expected - found, "has unknown": found - expected}
    for problem, names in differences.items():
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise SystemExit(f"{folder} {problem} {len(names)} tensors: {shown}")


def target_dtype(weights: Weights, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    first = next(iter(weights))
    return weights[first].dtype


# ---- ChatGLM2, ChatGLM3, GLM-4 -> Glm: tokenizer -------------------------------------------------


def guess_family(folder: Path, old: dict) -> str | None:
    """chatglm2, chatglm3 or glm4, by the vocabulary and by what the folder's own files mention;
    None without any."""
    if old.get("padded_vocab_size", 0) > 100_000:
        return "glm4"
    texts = []
    for name in ("tokenization_chatglm.py", "tokenizer_config.json", "README.md"):
        if (folder / name).is_file():
            texts.append((folder / name).read_text(encoding="utf-8", errors="replace"))
    if old.get("_name_or_path"):
        texts.append(str(old["_name_or_path"]))
    if any(re.search(r"<\|assistant\|>|chatglm3", text, re.IGNORECASE) for text in texts):
        return "chatglm3"
    return "chatglm2" if texts else None


def interpolates(folder: Path, family: str | None) -> bool:
    """Whether rope_ratio divides positions (ChatGLM2-6B-32K): its code tells (read, not run), else
    the family."""
    code = folder / "modeling_chatglm.py"
    if not code.is_file():
        return family == "chatglm2"
    text = code.read_text(encoding="utf-8", errors="replace")
    return bool(re.search(r"/\s*self\.rope_ratio", text))


def make_tokenizer(folder: Path, family: str | None, config: GlmConfig):
    """The fast tokenizer of a published folder, or None, said in one line, where it has none that
    can be converted."""
    path = folder / "tokenizer.model"
    if family == "glm4":
        cli.say(
            "GLM-4 has no sentencepiece tokenizer: take the tokenizer files of glm-4-9b-chat-hf"
        )
        return None
    if not path.is_file():
        cli.say(f"{folder} has no tokenizer.model: only the weights are converted")
        return None
    if family is None:
        raise SystemExit(
            f"{folder} does not tell which prompts it was trained with; say --family chatglm2 or "
            "chatglm3"
        )
    proto = fast_tokenizer.read_model(path)
    tokenizer = fast_tokenizer.make_tokenizer(
        proto, family, model_max_length=config.max_position_embeddings
    )
    fast_tokenizer.compare(tokenizer, proto)
    check_tokenizer(tokenizer, config, path)
    special = len(fast_tokenizer.SPECIALS[family])
    cli.say(f"tokenizer of {family}: {len(proto.pieces):,} pieces, {special} behind them")
    return tokenizer


def check_tokenizer(tokenizer, config: GlmConfig, path: Path) -> None:
    """SystemExit when the tokenizer is not that of the model."""
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"{path} has {len(tokenizer)} tokens, the model only {config.vocab_size}; "
            "not its tokenizer?"
        )
    wrong = []
    for name in ("eos_token_id", "pad_token_id"):
        wanted = getattr(tokenizer, name)
        found = getattr(config, name)
        if found != wanted:
            wrong.append(f"{name} {found}, not {wanted}")
    if wrong:
        raise SystemExit(f"{path} does not fit config.json: there is {', '.join(wrong)}")


def generation_config(config: GlmConfig, tokenizer) -> GenerationConfig:
    """ChatGLM3 also ends an answer with the role token of who speaks next."""
    own = config.eos_token_id
    ends = list(own) if isinstance(own, list) else [own]
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    for name in ("<|user|>", "<|observation|>"):
        if name in vocabulary:
            ends.append(vocabulary[name])
    eos = ends if len(ends) > 1 else ends[0]
    return GenerationConfig(eos_token_id=eos, pad_token_id=config.pad_token_id)


# ---- ChatGLM-6B: 150528 -> 130528 ----------------------------------------------------------------


def to_slim(folder: Path, out: Path, dtype: str = "auto", shard_gb: float = SHARD_GB) -> None:
    """ChatGLM-6B without the ids of image tokens in front of its text: the same logits for all
    other tokens."""
    config = ChatGLMConfig.from_pretrained(folder)
    weights = Weights(folder)
    try:
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise SystemExit(f"{folder}: its ice_text.model is needed ({words})") from None
    images = config.bos_token_id - tokenizer.sp_model.piece_to_id("<sop>")
    if images <= 0:
        raise SystemExit(
            f"{folder} has no image tokens in front of its text: it can be used as it is"
        )
    expected = empty_weights(ChatGLMForConditionalGeneration, config)
    check_names(weights, expected, folder)
    for name, wanted in expected.items():
        check_shape(name, weights.shape(name), wanted.shape)
    slim = slim_config(config, tokenizer, images)
    slim.dtype = target_dtype(weights, dtype)

    with new_folder(out) as part:
        slim.save_pretrained(part)
        save_slim_tokenizer(tokenizer, part)
        tensors = slim_tensors(weights, list(expected), images, slim.dtype)
        size = save_sharded(tensors, part, shard_gb)
    cli.say(
        f"{out}: {images:,} image tokens dropped, {slim.vocab_size:,} ids left, {size / 1e9:.2f} GB"
    )


def slim_tensors(
    weights: Weights, names: list[str], images: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name; embedding and head lose their first `images` rows."""
    with Progress("convert", total=len(names), unit="tensors") as progress:
        for name in names:
            tensor = weights[name].to(dtype)
            if re.search("word_embeddings|lm_head", name):
                tensor = tensor[images:].clone()
            yield name, tensor
            progress.update()


def slim_config(config: ChatGLMConfig, tokenizer: ChatGLMTokenizer, images: int) -> ChatGLMConfig:
    """All ids minus `images`; one that lay among the images was none of this vocabulary, so <pad>
    takes its place."""
    fields = config.to_dict()
    pad = tokenizer.sp_model.piece_to_id("<pad>")
    for name in ("bos", "eos", "pad", "mask", "gmask"):
        old = fields[f"{name}_token_id"]
        fields[f"{name}_token_id"] = old - images if old >= images else pad
    fields["vocab_size"] -= images
    fields.pop("auto_map", None)  # remote code for the other vocabulary
    return ChatGLMConfig(**fields)


def save_slim_tokenizer(tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    """Save it without image tokens and with all its pieces in the file."""
    path = folder / tokenizer.vocab_files_names["vocab_file"]
    path.write_bytes(tokenizer.sp_model.serialized_model_proto())
    ChatGLMTokenizer(
        str(path),
        num_image_tokens=0,
        chat_template=tokenizer.chat_template,
        do_lower_case=tokenizer.do_lower_case,
        remove_space=tokenizer.remove_space,
        model_max_length=tokenizer.model_max_length,
    ).save_pretrained(folder)


# ---- LoRA adapters of ChatGLM2 and ChatGLM3 ------------------------------------------------------


def to_native_adapter(folder: Path, out: Path, base: str | None) -> None:
    """A peft adapter trained on the published code -> one for the converted model `base`; the same
    update of weights.

    Of a fused matrix W + s B A the rows of B are split like those of W, and each part keeps A.
    """
    if base is None:
        raise SystemExit("an adapter needs --base, the folder of its converted base model")
    settings, published = adapter.read_plain(folder)
    config = models.model_config(base, "--base")
    if not isinstance(config, GlmConfig):
        raise SystemExit(f"--base {base} is not a converted ChatGLM2 or ChatGLM3")
    names = native_modules(config)
    expected = empty_weights(GlmForCausalLM, config)
    tensors = {}
    for name, tensor in published.items():
        path = name.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, matrix = path.rpartition(".")
        if module not in names or matrix not in ("lora_A", "lora_B"):
            raise SystemExit(f"{folder}: {name} has no place in ChatGLM2 or ChatGLM3")
        new = names[module]
        if matrix == "lora_A":
            columns = expected[f"{new[0]}.weight"].shape[1]
            check_shape(name, tensor.shape, [settings["r"], columns])
            parts = [tensor.clone() for _ in new]
        else:
            rows = sum(len(expected[f"{one}.weight"]) for one in new)
            check_shape(name, tensor.shape, [rows, settings["r"]])
            parts = split_rows(config, tensor, len(new))
        for one, part in zip(new, parts, strict=True):
            tensors[f"base_model.model.{one}.{matrix}.weight"] = part
    kinds = adapter.write_plain(out, settings, tensors, base)
    cli.say(f"{out}: adapter for {base} on {', '.join(kinds)}")


# ---- command line --------------------------------------------------------------------------------


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of a published checkpoint, or of an adapter for one"
    )
    parser.add_argument("--output_dir", required=True, help="where the result goes; must be empty")
    parser.add_argument(
        "--to", choices=["native", "slim"], help="default: what the checkpoint needs"
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as it is")
    parser.add_argument(
        "--family",
        choices=["chatglm2", "chatglm3"],
        help="prompts and tokens; default: by its files",
    )
    parser.add_argument("--base", help="for an adapter: the converted base model")
    parser.add_argument(
        "--max_shard_size", type=float, default=SHARD_GB, help="GB in one file of weights"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    folder = Path(args.model)
    out = Path(args.output_dir)
    check_empty(out)  # fails at once where something stands
    if (folder / "adapter_config.json").is_file():
        return to_native_adapter(folder, out, args.base)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise SystemExit(
            f"--model {folder}: no folder with a config.json; download the checkpoint first"
        )
    model_folder.check(folder)
    is_first = "padded_vocab_size" not in json.loads(config_file.read_text(encoding="utf-8"))
    if args.to and args.to != ("slim" if is_first else "native"):
        raise SystemExit(
            "--to slim is for ChatGLM-6B, which needs no other conversion; --to native for "
            "ChatGLM2 and 3"
        )
    if is_first:
        return to_slim(folder, out, args.dtype, args.max_shard_size)
    to_native(folder, out, args.dtype, args.family, args.max_shard_size)


if __name__ == "__main__":
    cli.run(main)
