"""Published Baichuan and Baichuan2 checkpoints -> folders that transformers programs load without
remote code.

    python baichuan2_dpo/convert.py --model Baichuan2-7B-Chat --output_dir OUT
    python baichuan2_dpo/convert.py --model Baichuan2-7B-Chat --output_dir OUT --keep_norm_head
    python baichuan2_dpo/convert.py --model Baichuan2-13B-Chat --output_dir OUT
    python baichuan2_dpo/convert.py --model old-adapter --base models/baichuan2-7b --output_dir OUT

W_pack becomes q_proj, k_proj and v_proj. The 7B's NormHead, h . w / |w|, becomes the head of a
LlamaForCausalLM, its rows normalised in float32: the same logits while the head is frozen (LoRA),
and norm_head_folded in its config.json. A head that trains needs the gradient through the
normalisation: --keep_norm_head keeps the raw rows, and the folder opens once modeling_baichuan.py
is imported, as every 13B (ALiBi) does. In bfloat16 the folded rows are rounded once more: of random
logits of size 1.6 the mean error is 0.0036, with the NormHead kept 0.0030, in the original, which
rounds row and length, 0.0043. --dtype float32 rounds nothing.

Weights are read from *.safetensors or pytorch_model*.bin (never unpickled as code) and written
shard by shard: memory holds one shard. Every tensor of the source must have its place, and every
place a tensor.
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
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import fast_tokenizer
from common.convert import adapter, model_folder, models
from common.convert.older_readers import save_tokenizer
from common.convert.weight_files import SHARD_GB, Weights, check_shape, save_sharded
from common.data.files import check_empty, new_folder
from common.data.progress import Progress
from modeling_baichuan import BaichuanConfig, BaichuanForCausalLM

DTYPES = ["auto", "float32", "bfloat16", "float16"]
# buffers that are computed, not learned
DERIVED = re.compile(r"rotary_emb\.inv_freq$|alibi_mask$|future_mask$")
FIRST_VOCABULARY = 64000  # of the first Baichuan, whose head is a plain one
HEAD = "lm_head.weight"
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# what Llama's blocks compute; another value in config.json is another model
PLAIN = {"hidden_act": "silu", "tie_word_embeddings": False, "quantization_config": None}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# what else of a generation_config.json holds for generate()
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


# ---- config --------------------------------------------------------------------------------------


def kind(folder: Path, old: dict) -> tuple[bool, bool]:
    """(ALiBi instead of rotation, NormHead): the folder's code says so (read, not run), else the
    fields and the vocabulary of its config.json."""
    code = folder / "modeling_baichuan.py"
    if code.is_file():
        text = code.read_text(encoding="utf-8", errors="replace")
        return "alibi_mask" in text, "NormHead(" in text
    alibi = "max_position_embeddings" not in old or old.get("hidden_size") == 5120
    norm_head = old.get("vocab_size") != FIRST_VOCABULARY
    return alibi, norm_head


def native_config(old: dict, alibi: bool, norm_head: bool) -> LlamaConfig:
    """Fields of a published config.json -> the config of a plain Llama, or of this recipe's model
    where it needs one.

    SystemExit for what neither computes.
    """
    check_config(old)
    window = old.get("max_position_embeddings") or old.get("model_max_length", 4096)
    fields = {name: old[name] for name in NEEDED} | {
        "num_key_value_heads": old["num_attention_heads"],
        "rms_norm_eps": old.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": window,
        "initializer_range": old.get("initializer_range", 0.02),
        "bos_token_id": old.get("bos_token_id", 1),
        "eos_token_id": old.get("eos_token_id", 2),
        "pad_token_id": old.get("pad_token_id", 0),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    if not alibi and not norm_head:
        return LlamaConfig(**fields, architectures=["LlamaForCausalLM"])
    return BaichuanConfig(
        **fields, alibi=alibi, norm_head=norm_head, architectures=["BaichuanForCausalLM"]
    )


def check_config(old: dict) -> None:
    missing = [name for name in NEEDED if name not in old]
    if missing:
        raise SystemExit(f"config.json lacks {', '.join(missing)}: not a Baichuan checkpoint")
    wrong = [f"{name}={old[name]}" for name in PLAIN if old.get(name, PLAIN[name]) != PLAIN[name]]
    if wrong:
        raise SystemExit(
            f"this checkpoint cannot be computed by Llama's blocks: {', '.join(wrong)}"
        )
    if old.get("z_loss_weight"):
        cli.say(
            f"z_loss_weight {old['z_loss_weight']} of config.json only concerns training and is "
            "left out"
        )


def empty_weights(config: LlamaConfig) -> dict[str, Tensor]:
    """The weights that the model of such a config has, without memory."""
    model_class = LlamaForCausalLM
    if isinstance(config, BaichuanConfig):
        model_class = BaichuanForCausalLM
    with torch.device("meta"):
        return model_class(config).state_dict()


def native_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Native parameters (or modules) -> {the published one: its native ones}: three for W_pack,
    else itself."""
    found = {}
    for name in names:
        published = re.sub(r"self_attn\.[qkv]_proj\b", "self_attn.W_pack", name)
        found.setdefault(published, []).append(name)
    return found


# ---- weights -------------------------------------------------------------------------------------


def to_native(
    folder: Path,
    out: Path,
    keep_norm_head: bool = False,
    dtype: str = "auto",
    shard_gb: float = SHARD_GB,
) -> None:
    """A published folder -> a native one with its tokenizer. All checks come first.

    dtype: of the written weights, one of DTYPES; shard_gb: GB in one file of weights.
    """
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = Weights(folder)
    alibi, norm_head = kind(folder, old)
    fold = norm_head and not alibi and not keep_norm_head
    config = native_config(old, alibi, norm_head and not fold)
    if fold:
        config.norm_head_folded = True
    names = check_weights(weights, config, folder)
    config.dtype = weights[HEAD].dtype if dtype == "auto" else getattr(torch, dtype)
    tokenizer = make_tokenizer(folder, config)

    with new_folder(out) as part:
        config.save_pretrained(part)
        generation_config(folder, config).save_pretrained(part)
        save_tokenizer(tokenizer, part)
        size = save_sharded(converted(weights, names, config.dtype, fold), part, shard_gb)
    cli.say(f"{out}: {about(config)}; {size / 1e9:.2f} GB in {str(config.dtype)[6:]}")


def converted(
    weights: Weights, names: dict[str, list[str]], dtype: torch.dtype, fold: bool
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors -> native ones by name; fold: the rows of the head are normalised."""
    with Progress("convert", total=len(names), unit="tensors") as progress:
        for name, native in names.items():
            tensor = weights[name]
            if fold and name == HEAD:
                tensor = F.normalize(tensor.float(), dim=-1)
            tensor = tensor.to(dtype)
            if len(native) == 1:
                yield native[0], tensor
            else:
                for one, part in zip(native, tensor.chunk(len(native)), strict=True):
                    yield one, part.clone()
            progress.update()


def about(config: LlamaConfig) -> str:
    """The model in words, for people."""
    words = config.architectures[0]
    if getattr(config, "alibi", False):
        words += ", ALiBi"
    if getattr(config, "norm_head_folded", False):
        return f"{words}, its NormHead folded into the head: do not train that"
    if getattr(config, "norm_head", False):
        return f"{words}, with its NormHead"
    return f"{words}, with a plain head"


def check_weights(weights: Weights, config: LlamaConfig, folder: Path) -> dict[str, list[str]]:
    """-> `native_names`; SystemExit where the names or shapes of the weights are not those of
    `config`."""
    expected = empty_weights(config)
    names = native_names(expected)
    found = {name for name in weights if not DERIVED.search(name)}
    differences = {"lacks": set(names) - found, "has unknown": found - set(names)}
    for problem, wrong in differences.items():
        if wrong:
            shown = ", ".join(sorted(wrong)[:3])
            raise SystemExit(f"{folder} {problem} {len(wrong)} tensors: {shown}")
    for name, native in names.items():
        rows, *columns = expected[native[0]].shape
        check_shape(name, weights.shape(name), [rows * len(native), *columns])
    return names


def generation_config(folder: Path, config: LlamaConfig) -> GenerationConfig:
    """The token ids of `config`, and how the published generation_config.json samples."""
    path = folder / "generation_config.json"
    published = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = {name: published[name] for name in SAMPLING if name in published}
    settings |= {name: getattr(config, name) for name in TOKEN_IDS}
    return GenerationConfig(**settings)


def make_tokenizer(folder: Path, config: LlamaConfig):
    """The fast tokenizer of a published folder, or None, said in one line, where it has none."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        cli.say(f"{folder} has no tokenizer.model: only the weights are converted")
        return None
    proto = fast_tokenizer.read_model(path)
    tokenizer = fast_tokenizer.make_tokenizer(
        proto, model_max_length=config.max_position_embeddings
    )
    fast_tokenizer.compare(tokenizer, proto)
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"{path} has {len(tokenizer)} tokens, the model only {config.vocab_size}; "
            "not its tokenizer?"
        )
    wrong = [name for name in TOKEN_IDS if getattr(config, name) != getattr(tokenizer, name)]
    if wrong:
        found = [
            f"{name} {getattr(config, name)}, not {getattr(tokenizer, name)}" for name in wrong
        ]
        raise SystemExit(f"{path} does not fit config.json: there is {', '.join(found)}")
    template = "no chat template (no turn tokens)"
    if tokenizer.chat_template:
        template = "the chat template of Baichuan2-Chat"
    cli.say(f"tokenizer: {len(proto.pieces):,} pieces, {template}")
    return tokenizer


# ---- LoRA adapters -------------------------------------------------------------------------------


def to_native_adapter(folder: Path, out: Path, base: str | None) -> None:
    """A peft adapter trained on the published code -> one for the converted model `base`; the same
    update of weights.

    Of W_pack + s B A the rows of B are split in thirds like those of W_pack, and each part keeps A.
    """
    if base is None:
        raise SystemExit("an adapter needs --base, the folder of its converted base model")
    settings, published = adapter.read_plain(folder)
    weights = empty_weights(base_config(base)).items()
    shapes = {name.removesuffix(".weight"): w.shape for name, w in weights if "proj" in name}
    names = native_names(shapes)
    tensors = {}
    for name, tensor in published.items():
        path = name.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, matrix = path.rpartition(".")
        if module not in names or matrix not in ("lora_A", "lora_B"):
            raise SystemExit(f"{folder}: {name} has no place in Baichuan")
        native = names[module]
        rows, columns = shapes[native[0]]
        if matrix == "lora_A":
            check_shape(name, tensor.shape, [settings["r"], columns])
            parts = [tensor] * len(native)
        else:
            check_shape(name, tensor.shape, [len(native) * rows, settings["r"]])
            parts = tensor.chunk(len(native))
        for one, part in zip(native, parts, strict=True):
            tensors[f"base_model.model.{one}.{matrix}.weight"] = part.clone()
    kinds = adapter.write_plain(out, settings, tensors, base)
    cli.say(f"{out}: adapter for {base} on {', '.join(kinds)}")


def base_config(base: str) -> LlamaConfig:
    config = models.model_config(base, "--base")
    if not isinstance(config, LlamaConfig):
        raise SystemExit(f"--base {base} is not a converted Baichuan")
    return config


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of a published checkpoint, or of an adapter for one"
    )
    parser.add_argument("--output_dir", required=True, help="where the result goes; must be empty")
    parser.add_argument(
        "--keep_norm_head", action="store_true", help="of a 7B: its head can then be trained, too"
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as it is")
    parser.add_argument("--base", help="for an adapter: the converted base model")
    parser.add_argument(
        "--max_shard_size", type=float, default=SHARD_GB, help="GB in one file of weights"
    )
    args = parser.parse_args()
    folder = Path(args.model)
    out = Path(args.output_dir)
    check_empty(out)  # fails at once where something stands
    if (folder / "adapter_config.json").is_file():
        return to_native_adapter(folder, out, args.base)
    if not (folder / "config.json").is_file():
        raise SystemExit(
            f"--model {folder}: no folder with a config.json; download the checkpoint first"
        )
    model_folder.check(folder)
    to_native(folder, out, args.keep_norm_head, args.dtype, args.max_shard_size)


if __name__ == "__main__":
    cli.run(main)
