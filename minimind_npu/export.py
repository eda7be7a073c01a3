"""Write a trained model as one that transformers, vLLM, SGLang and llama.cpp know by themselves, or
read one back.

    python minimind_npu/export.py --model output/minimind_npu/sft --output_dir my_model
    python minimind_npu/export.py --adapter output/minimind_npu/lora --output_dir my_model
    python minimind_npu/export.py --import --model my_model --output_dir back
    python minimind_npu/export.py --import --model full_sft_512.pth --tokenizer FOLDER \\
        --output_dir back

An adapter is merged into its base; what --import writes can be trained on.

Generation 3 becomes Qwen3 or Qwen3-MoE, generation 2 Llama or Qwen2-MoE (whose shared expert stands
behind a gate and whose query, key and value have biases: the gate is next to 0, which halves, the
expert's last matrix is doubled, the biases are 0). Afterwards both models answer the same token
ids; logits that differ end with an error.

What only some programs read is not left to them: a YaRN model gets the magnitude that all of them
use, and smaller queries; Qwen2-MoE gets a head of its own and a gate that is not quite 0, since
llama.cpp needs both. Whether the weights of chosen experts sum to 1 is fixed in llama.cpp; where
that differs, a line says so.

--import takes such folders, also of others as long as this recipe's model can compute the same, and
weight files named as MiniMind names them, {weight}_{hidden}[_moe].pth or .safetensors.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: I001  (before torch and transformers: it brings the device)

import argparse
import json
import math
import re
from collections.abc import Mapping

import torch
from model import YARN, MiniMindConfig, MiniMindForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from common.convert import adapter, models, weight_files
from common.convert.older_readers import save_tokenizer
from common.data.files import new_folder
from common.demo.chat_model import find_model
from common.runs.generate import remember_ends

KINDS = {  # (generation, use_moe) -> config and class of transformers
    (2, False): (LlamaConfig, "LlamaForCausalLM"),
    (2, True): (Qwen2MoeConfig, "Qwen2MoeForCausalLM"),
    (3, False): (Qwen3Config, "Qwen3ForCausalLM"),
    (3, True): (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
}
SAME = (  # fields with one name and meaning on both sides
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
SPARSE = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SILENT = {torch.float32: 1e-20, torch.bfloat16: 1e-20, torch.float16: 2**-24}  # gates: no effect
NORMALISES = {"qwen2_moe": False, "qwen3_moe": True}  # llama.cpp, whatever norm_topk_prob says
CLOSE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of the largest logit


# ---- out -----------------------------------------------------------------------------------------


def native_config(config: MiniMindConfig) -> PretrainedConfig:
    """The config of transformers' own model that computes the same; SystemExit where there is
    none."""
    kind, architecture = KINDS[config.generation, config.use_moe]
    fields = {name: getattr(config, name) for name in SAME}
    fields["rope_parameters"] = rope_parameters(config)
    if config.use_moe:
        fields |= native_expert_fields(config)
    if kind is Qwen2MoeConfig:
        fields["tie_word_embeddings"] = False
    return kind(**fields, architectures=[architecture])


def native_expert_fields(config: MiniMindConfig) -> dict:
    fields = {name: getattr(config, name) for name in SPARSE}
    # one expert alone keeps its probability in generation 2, whatever the config says
    several = config.generation == 3 or config.num_experts_per_tok > 1
    fields["norm_topk_prob"] = config.norm_topk_prob and several
    if config.generation == 3:
        if config.n_shared_experts:
            raise SystemExit(
                "this model cannot be exported: generation 3 with shared experts is no "
                "architecture of transformers (Qwen3-MoE has none, Qwen2-MoE does not normalise "
                "query and key)"
            )
        fields["moe_intermediate_size"] = config.moe_intermediate_size
        return fields
    width = config.intermediate_size
    fields["moe_intermediate_size"] = width
    fields["shared_expert_intermediate_size"] = width * max(1, config.n_shared_experts)
    fields["qkv_bias"] = True
    return fields


def rope_parameters(config: MiniMindConfig) -> dict:
    theta = {"rope_theta": float(config.rope_theta)}
    if is_stretched(config):
        return theta | YARN | {"rope_type": "yarn"}
    return theta | {"rope_type": "default"}


def is_stretched(config: MiniMindConfig) -> bool:
    longer = config.max_position_embeddings > YARN["original_max_position_embeddings"]
    return config.inference_rope_scaling and longer


def magnitude() -> float:
    """By which YaRN multiplies query and key (Peng et al. 2023, section 3.4). This recipe's model
    does not; attention_factor 1 would say so, but llama.cpp and vLLM do not read it."""
    return 0.1 * math.log(YARN["factor"]) + 1


def scaled_queries(config: MiniMindConfig, tensors: dict[str, Tensor], factor: float) -> None:
    """Multiply every query, after its norm where it has one."""
    for layer in range(config.num_hidden_layers):
        part = "q_norm" if config.generation == 3 else "q_proj"
        name = f"model.layers.{layer}.self_attn.{part}.weight"
        tensors[name] = (tensors[name].double() * factor).to(tensors[name].dtype)


def native_tensors(config: MiniMindConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of transformers; only Qwen2-MoE's differ, and a YaRN model's
    queries."""
    tensors = dict(weights)
    if is_stretched(config):
        scaled_queries(config, tensors, magnitude() ** -2)
    is_qwen2_moe = config.use_moe and config.generation == 2
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if is_qwen2_moe and config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if is_qwen2_moe:
        for layer in range(config.num_hidden_layers):
            as_qwen2_moe(config, tensors, f"model.layers.{layer}.")
    return tensors


def as_qwen2_moe(config: MiniMindConfig, tensors: dict[str, Tensor], block: str) -> None:
    """One block's shared experts under the other name, and biases of 0."""
    shared = {}
    for name in list(tensors):
        if name.startswith(f"{block}mlp.shared_experts."):
            shared[name.removeprefix(f"{block}mlp.shared_experts.")] = tensors.pop(name)
    for name, value in shared_expert(config, shared).items():
        tensors[f"{block}mlp.{name}"] = value
    for projection in ("q_proj", "k_proj", "v_proj"):
        rows = tensors[f"{block}self_attn.{projection}.weight"]
        tensors[f"{block}self_attn.{projection}.bias"] = rows.new_zeros(len(rows))


def shared_expert(config: MiniMindConfig, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shared experts of a layer -> Qwen2-MoE's one: the sum of several is a wider one; none is
    one of zeros.

    own: "0.gate_proj.weight" ... -> the tensor.
    """
    width = config.intermediate_size
    size = config.hidden_size
    if not config.n_shared_experts:
        own = {
            "0.gate_proj.weight": torch.zeros(width, size),
            "0.up_proj.weight": torch.zeros(width, size),
            "0.down_proj.weight": torch.zeros(size, width),
        }
    count = max(1, config.n_shared_experts)
    found = {}
    for name, side in (("gate", 0), ("up", 0), ("down", 1)):
        experts = [own[f"{i}.{name}_proj.weight"] for i in range(count)]
        found[f"shared_expert.{name}_proj.weight"] = torch.cat(experts, side)
    found["shared_expert.down_proj.weight"] *= 2  # the gate halves
    dtype = own["0.down_proj.weight"].dtype
    # not 0, for which llama.cpp's silu(x) / x is NaN
    found["shared_expert_gate.weight"] = torch.full((1, size), SILENT[dtype], dtype=dtype)
    return found


def load(args) -> tuple[MiniMindForCausalLM, str]:
    """The model, an adapter merged into it, and the folder its tokenizer stands in."""
    path = find_model(args.model) if args.model else None
    adapter_path = find_model(args.adapter) if args.adapter else None
    if path and (Path(path) / "adapter_config.json").is_file():
        if adapter_path:
            raise cli.usage_error(
                f"--model {args.model} is an adapter itself; give one adapter, its base as --model"
            )
        adapter_path = path
        path = None
    base = adapter.check_base(adapter_path, path) if adapter_path else path
    model = models.load(AutoModelForCausalLM, base, "--model", dtype=DTYPES[args.dtype])
    if not isinstance(model, MiniMindForCausalLM):
        raise SystemExit(
            f"{base} is a {type(model).__name__} already; nothing to export (--import reads it)"
        )
    if adapter_path:
        model = adapter.merge_into(adapter.put_on(model, adapter_path))
    return model.eval(), adapter_path or path


def write_native(model: MiniMindForCausalLM, tokenizer, out: str | Path) -> float:
    """Write the folder; it opens without this recipe's code. -> largest difference of a logit, see
    `compare`."""
    config = native_config(model.config)
    config.dtype = model.dtype
    tensors = native_tensors(model.config, dict(model.state_dict()))
    with new_folder(out) as part:
        weight_files.save_sharded(tensors.items(), part)
        config.save_pretrained(part)
        if tokenizer is not None:
            remember_ends(model, tokenizer)
        model.generation_config.save_pretrained(part)
        save_tokenizer(tokenizer, part)
        return compare(model, AutoModelForCausalLM.from_pretrained(part, dtype=model.dtype))


def note_for_llama_cpp(config: PretrainedConfig) -> str | None:
    """What llama.cpp computes otherwise from an exported folder; None where nothing."""
    is_qwen2_moe = config.model_type == Qwen2MoeConfig.model_type
    if is_qwen2_moe and config.head_dim * config.num_attention_heads != config.hidden_size:
        return "llama.cpp will not load it: head_dim is not hidden_size / num_attention_heads"
    sums_to_1 = NORMALISES.get(config.model_type)
    if sums_to_1 is None or config.num_experts_per_tok == config.num_experts:
        return None
    if sums_to_1 == config.norm_topk_prob:
        return None
    does = {True: "sum to 1", False: "stay as they are"}
    return (
        f"llama.cpp will answer otherwise: in any {config.model_type} model it lets the weights of "
        f"the chosen experts {does[sums_to_1]}, here they {does[not sums_to_1]} (norm_topk_prob "
        f"{str(config.norm_topk_prob).lower()}, which transformers, vLLM and SGLang read)"
    )


@torch.inference_mode()
def compare(ours, theirs) -> float:
    """Largest difference of a logit over some ids; SystemExit when it is more than rounding."""
    length = 48
    ids = torch.arange(2 * length).view(2, length) * 7919 % ours.config.vocab_size
    window = max(length, ours.config.max_position_embeddings)
    near = torch.arange(length)
    places = torch.stack([near, near * (window // length)])  # side by side, and all over the window
    expected = ours.eval()(ids, position_ids=places, use_cache=False).logits.float()
    found = theirs.eval()(ids, position_ids=places, use_cache=False).logits.float()
    apart = (expected - found).abs().max().item()
    if not apart <= CLOSE[ours.dtype] * max(1.0, expected.abs().max().item()):  # NaN too
        raise SystemExit(
            f"the written model computes other logits (they differ by {apart:.3g}); nothing was "
            "kept"
        )
    return apart


# ---- in ------------------------------------------------------------------------------------------


def own_config(config: PretrainedConfig, weights: Mapping) -> MiniMindConfig:
    """transformers' config -> ours; SystemExit naming all that this recipe's model cannot
    compute."""
    kinds = {kind.model_type: key for key, (kind, _) in KINDS.items()}
    if config.model_type not in kinds:
        raise SystemExit(
            f"a model of type {config.model_type} cannot be imported; {', '.join(kinds)} can"
        )
    generation, sparse = kinds[config.model_type]
    rope = getattr(config, "rope_parameters", None)
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    wrong = foreign(config, rope)
    wrong += [f"{name} is not 0" for name in unsilenced(weights)]
    if wrong:
        raise SystemExit(f"this model cannot be imported: {'; '.join(wrong[:4])}")
    fields = {
        "generation": generation,
        "rope_theta": rope["rope_theta"],
        "inference_rope_scaling": rope["rope_type"] == "yarn",
        "use_moe": sparse,
    }
    for name in SAME:
        value = getattr(config, name, None)
        if value is not None:
            fields[name] = value
    fields["tie_word_embeddings"] = config.tie_word_embeddings or has_tied_head(weights)
    if sparse:
        fields |= own_expert_fields(config, weights, generation)
    return MiniMindConfig(**fields)


def has_tied_head(weights: Mapping) -> bool:
    """Whether the head is the embedding, also where it is written apart."""
    head = weights.get("lm_head.weight")
    table = weights.get("model.embed_tokens.weight")
    return head is not None and table is not None and torch.equal(head, table)


def own_expert_fields(config: PretrainedConfig, weights: Mapping, generation: int) -> dict:
    fields = {name: getattr(config, name) for name in SPARSE}
    fields["norm_topk_prob"] = config.norm_topk_prob
    fields["moe_intermediate_size"] = config.moe_intermediate_size
    fields["n_shared_experts"] = 0
    if generation == 2:
        fields["intermediate_size"] = config.moe_intermediate_size
        fields["n_shared_experts"] = shared_experts(config, weights)
    return fields


def foreign(config: PretrainedConfig, rope: dict) -> list[str]:
    """What differs from this recipe's model, in words."""
    expected = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    found = []
    for name, value in expected.items():
        own = getattr(config, name, None)
        if own is not None and own != value:
            found.append(f"{name} is {own}")
    yarn = YARN | {"rope_type": "yarn"}
    known = rope["rope_type"] == "default" or all(rope.get(k) == v for k, v in yarn.items())
    if not math.isclose(attention_factor(rope), magnitude()):
        known = known and attention_factor(rope) == 1
    if not known or rope.get("partial_rotary_factor", 1) != 1:
        found.append(f"rope_parameters are {rope}")
    is_qwen2_moe = config.model_type == "qwen2_moe"
    if is_qwen2_moe and config.num_experts_per_tok == 1 and config.norm_topk_prob:
        found.append("norm_topk_prob with one expert per token")
    return found


def attention_factor(rope: dict) -> float:
    """YaRN's magnitude, 1 without YaRN."""
    if rope["rope_type"] != "yarn":
        return 1.0
    given = rope.get("attention_factor")
    return magnitude() if given is None else given


def unsilenced(weights: Mapping) -> list[str]:
    """Names of biases, and of gates before shared experts, that do something."""
    found = [name for name in weights if name.endswith(".bias") and weights[name].any()]
    gates = [name for name in weights if name.endswith("shared_expert_gate.weight")]
    most = max(SILENT.values())
    return found + [name for name in gates if weights[name].abs().max() > most]


def shared_experts(config: PretrainedConfig, weights: Mapping) -> int:
    """How many of our shared experts Qwen2-MoE's one is: ours have the width of the routed ones."""
    names = [name for name in weights if ".mlp.shared_expert." in name]
    if not any(weights[name].any() for name in names):
        return 0
    count, rest = divmod(config.shared_expert_intermediate_size, config.moe_intermediate_size)
    if rest or not count:
        raise SystemExit(
            "this model cannot be imported: its shared expert is "
            f"{config.shared_expert_intermediate_size} wide, no multiple of the "
            f"{config.moe_intermediate_size} of the routed ones"
        )
    return count


NOT_OURS = (".bias", "shared_expert_gate.weight", ".freqs_cos", ".freqs_sin")  # 0, or computed


def own_tensors(config: MiniMindConfig, weights: Mapping) -> dict[str, Tensor]:
    """Weights under our names; experts of a layer may stand in one tensor each, as transformers 5
    holds them."""
    found = {}
    for name in weights:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if tied or name.endswith(NOT_OURS):
            continue
        if name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
            found |= routed_experts(name, weights[name])
        elif ".mlp.shared_expert." in name:
            found |= split_shared_expert(name, weights[name], config.n_shared_experts)
        else:
            found[name] = weights[name]
    return found


def routed_experts(name: str, stacked: Tensor) -> dict[str, Tensor]:
    """All experts of a layer in one tensor, [E, 2 * width, D] or [E, D, width] -> theirs."""
    block, _, kind = name.rpartition(".")
    found = {}
    for i, value in enumerate(stacked):
        if kind == "gate_up_proj":
            gate, up = value.chunk(2)
            found[f"{block}.{i}.gate_proj.weight"] = gate
            found[f"{block}.{i}.up_proj.weight"] = up
        else:
            found[f"{block}.{i}.down_proj.weight"] = value
    return found


def split_shared_expert(name: str, value: Tensor, count: int) -> dict[str, Tensor]:
    """A matrix of Qwen2-MoE's shared expert -> those of our `count` ones."""
    block, _, kind = name.partition(".mlp.shared_expert.")
    if not count:
        return {}
    is_last = kind.startswith("down")
    if is_last:
        value = value / 2  # its gate of 0 halves
    matrices = value.chunk(count, int(is_last))
    return {f"{block}.mlp.shared_experts.{i}.{kind}": part for i, part in enumerate(matrices)}


def config_of_weights(weights: Mapping, heads: int, per_token: int | None) -> MiniMindConfig:
    """What the shapes of a weight file tell; heads is needed where there is no norm of a head
    (generation 2)."""
    shape = {name: tuple(value.shape) for name, value in weights.items()}
    first = "model.layers.0."
    if "model.embed_tokens.weight" not in shape or f"{first}self_attn.q_proj.weight" not in shape:
        raise SystemExit(
            "these are not the weights of a whole model under MiniMind's names "
            "(model.embed_tokens ...)"
        )

    def count(pattern: str) -> int:
        """Different numbers at the place of the group."""
        matches = [re.match(pattern, name) for name in shape]
        return len({match[1] for match in matches if match})

    vocab, hidden = shape["model.embed_tokens.weight"]
    queries, _ = shape[f"{first}self_attn.q_proj.weight"]
    keys, _ = shape[f"{first}self_attn.k_proj.weight"]
    norm = shape.get(f"{first}self_attn.q_norm.weight")
    head_dim = norm[0] if norm else queries // heads
    head = weights.get("lm_head.weight")
    table = weights["model.embed_tokens.weight"]
    fields = {
        "generation": 3 if norm else 2,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "tie_word_embeddings": head is None or torch.equal(head, table),
    }
    experts = count(r"model\.layers\.0\.mlp\.experts\.(\d+)\.")
    if not experts:
        width = shape[f"{first}mlp.gate_proj.weight"][0]
        return MiniMindConfig(**fields, intermediate_size=width)
    width = shape[f"{first}mlp.experts.0.gate_proj.weight"][0]
    return MiniMindConfig(
        **fields,
        use_moe=True,
        num_experts=experts,
        n_shared_experts=count(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)\."),
        num_experts_per_tok=per_token,
        moe_intermediate_size=width,
        intermediate_size=None if norm else width,
    )


def read_foreign(args) -> tuple[MiniMindConfig, dict[str, Tensor], Path | None]:
    """--import: config, tensors, and where a tokenizer stands, if there is one."""
    path = Path(args.model)
    factor = 1.0
    if path.is_file():
        is_safe = path.suffix == ".safetensors"
        weights = load_file(path) if is_safe else weight_files.read_pickle(path)
        config = config_of_weights(weights, args.num_attention_heads, args.num_experts_per_tok)
        # beside the file, in a run of ours, or where MiniMind has it
        places = [path.parent, path.parent / "final", path.parent.parent / "model"]
    elif path.is_dir():
        weights = weight_files.Weights(path)
        config, factor = config_of_folder(path, weights)
        places = [path]
    else:
        raise SystemExit(f"--model {path}: no such file or folder")
    found = [place for place in places if (place / "tokenizer.json").is_file()]
    tensors = own_tensors(config, weights)
    if factor != 1:
        scaled_queries(config, tensors, factor**2)
    return config, tensors, found[0] if found else None


def config_of_folder(path: Path, weights: Mapping) -> tuple[MiniMindConfig, float]:
    """-> our config, and what its query and key are multiplied by."""
    config = models.load(AutoConfig, str(path), "--model")
    if config.model_type != MiniMindConfig.model_type:
        rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
        return own_config(config, weights), attention_factor(rope)
    # ours, or of MiniMind's own code, which has no generation
    fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for name in ("auto_map", "model_type"):
        fields.pop(name, None)
    normalises = any("q_norm" in name for name in weights)
    fields.setdefault("generation", 3 if normalises else 2)
    return MiniMindConfig(**fields), 1.0


def bring_in(args) -> str:
    """--import; -> what it was, for people."""
    config, tensors, place = read_foreign(args)
    place = args.tokenizer or place
    tokenizer = models.load(AutoTokenizer, str(place), "--tokenizer") if place else None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"the tokenizer has {len(tokenizer):,} tokens, the model only {config.vocab_size:,}"
        )
    dtype = torch.float32 if args.dtype == "auto" else DTYPES[args.dtype]
    model = MiniMindForCausalLM(config).to(dtype)
    fill(model, tensors, args.model)
    with new_folder(args.output_dir) as part:
        if tokenizer is not None:
            remember_ends(model, tokenizer)
        model.save_pretrained(part)
        save_tokenizer(tokenizer, part)
    experts = ", experts" if config.use_moe else ""
    what = f"generation {config.generation}{experts}, {model.num_parameters():,} parameters"
    if tokenizer is None:
        what += "; no tokenizer was found: --tokenizer FOLDER adds one"
    return what


def fill(model: MiniMindForCausalLM, tensors: dict[str, Tensor], source: str) -> None:
    """The tensors into the model; SystemExit for one too many, too few or of another shape."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for name, value in tensors.items():
        if name not in shapes:
            raise SystemExit(f"{source}: {name} is no weight of this recipe's model")
        weight_files.check_shape(name, value.shape, shapes[name])
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise SystemExit(f"{source}: {len(missing)} weights are missing, the first is {missing[0]}")
    model.load_state_dict(tensors, strict=False)


# ---- command line --------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        "--model_name_or_path",
        help="a run, model or adapter folder; with --import also a weight file",
    )
    add("--adapter", help="LoRA folder that is merged in (its base is found by itself)")
    add("--output_dir", required=True)
    add(
        "--import",
        dest="bring_in",
        action="store_true",
        help="the other way: write a folder of this recipe's model",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the written weights; auto: as they are, imported float32",
    )
    add("--tokenizer", help="folder, where the imported weights have none beside them")
    add(
        "--num_attention_heads",
        type=int,
        default=8,
        help="of an imported weight file of generation 2",
    )
    add(
        "--num_experts_per_tok",
        type=int,
        help="of an imported weight file (default: generation 2 two, 3 one)",
    )
    args = parser.parse_args(argv)
    if not args.model and (args.bring_in or not args.adapter):
        other = "" if args.bring_in else " or --adapter FOLDER"
        raise cli.usage_error(f"give --model FOLDER{other}")
    return args


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    if args.bring_in:
        cli.say(f"imported: {bring_in(args)} -> {args.output_dir}")
        return
    model, folder = load(args)
    tokenizer = None
    if (Path(folder) / "tokenizer.json").is_file():
        tokenizer = models.load(AutoTokenizer, folder, "--model")
    apart = write_native(model, tokenizer, args.output_dir)
    _, name = KINDS[model.config.generation, model.config.use_moe]
    cli.say(
        f"exported as {name}, {model.dtype}; logits differ by at most {apart:.1e} -> "
        f"{args.output_dir}"
    )
    note = note_for_llama_cpp(native_config(model.config))
    if note:
        cli.say(f"note: {note}")


if __name__ == "__main__":
    cli.run(main)
