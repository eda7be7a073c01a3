"""Write a trained model as one that transformers, vLLM, SGLang and llama.cpp know by themselves, or
read one back.

    python minimind_npu/export.py --model output/minimind_npu/sft --output_dir my_model
    python minimind_npu/export.py --adapter output/minimind_npu/lora --output_dir my_model        # merged into its base
    python minimind_npu/export.py --import --model my_model --output_dir back                     # to train it on
    python minimind_npu/export.py --import --model full_sft_512.pth --tokenizer FOLDER --output_dir back

Generation 3 becomes Qwen3 or Qwen3-MoE, generation 2 Llama or Qwen2-MoE (whose shared expert stands
behind a gate and whose query, key and value have biases: the gate is 0, which halves, the expert's
last matrix is doubled, the biases are 0). Afterwards both models answer the same token ids; logits
that differ end with an error.

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

from common.convert import adapter, weight_files
from common.demo.chat_model import find_model

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
CLOSE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of the largest logit


# ---- out ------------------------------------------------------------------------------------------------------------


def native_config(config: MiniMindConfig) -> PretrainedConfig:
    """The config of transformers' own model that computes the same; SystemExit where there is
    none."""
    kind, architecture = KINDS[config.generation, config.use_moe]
    fields = {name: getattr(config, name) for name in SAME} | {
        "rope_parameters": rope_parameters(config)
    }
    if config.use_moe:
        fields |= {name: getattr(config, name) for name in SPARSE}
        # one expert alone keeps its probability in generation 2, whatever the config says
        fields["norm_topk_prob"] = config.norm_topk_prob and (
            config.generation == 3 or config.num_experts_per_tok > 1
        )
        fields["moe_intermediate_size"] = config.moe_intermediate_size
    if config.use_moe and config.generation == 3 and config.n_shared_experts:
        raise SystemExit(
            "this model cannot be exported: generation 3 with shared experts is no architecture of transformers "
            "(Qwen3-MoE has none, Qwen2-MoE does not normalise query and key)"
        )
    if config.use_moe and config.generation == 2:
        fields["moe_intermediate_size"] = config.intermediate_size
        fields["shared_expert_intermediate_size"] = config.intermediate_size * max(
            1, config.n_shared_experts
        )
        fields["qkv_bias"] = True
    return kind(**fields, architectures=[architecture])


def rope_parameters(config: MiniMindConfig) -> dict:
    plain = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    longer = config.max_position_embeddings > YARN["original_max_position_embeddings"]
    stretched = config.inference_rope_scaling and longer
    return plain | YARN | {"rope_type": "yarn", "attention_factor": 1.0} if stretched else plain


def native_tensors(config: MiniMindConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of transformers; only Qwen2-MoE's differ."""
    tensors = {
        k: v
        for k, v in weights.items()
        if not (k == "lm_head.weight" and config.tie_word_embeddings)
    }
    if not (config.use_moe and config.generation == 2):
        return tensors
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}."
        shared = [name for name in tensors if name.startswith(f"{block}mlp.shared_experts.")]
        mine = {name.removeprefix(block): tensors.pop(name) for name in shared}
        tensors |= {
            f"{block}mlp.{name}": value for name, value in shared_expert(config, mine).items()
        }
        for part in ("q_proj", "k_proj", "v_proj"):
            rows = tensors[f"{block}self_attn.{part}.weight"]
            tensors[f"{block}self_attn.{part}.bias"] = rows.new_zeros(len(rows))
    return tensors


def shared_expert(config: MiniMindConfig, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shared experts of a layer -> Qwen2-MoE's one: the sum of several is a wider one; none is
    one of zeros."""
    width, size, like = config.intermediate_size, config.hidden_size, torch.zeros(())
    if not config.n_shared_experts:
        mine = {
            f"mlp.shared_experts.0.{name}_proj.weight": torch.zeros(width, size)
            for name in ("gate", "up")
        }
        mine["mlp.shared_experts.0.down_proj.weight"] = torch.zeros(size, width)
    found = {"shared_expert_gate.weight": torch.zeros(1, size)}
    for name, side in (("gate", 0), ("up", 0), ("down", 1)):
        all_of_it = [
            mine[f"mlp.shared_experts.{i}.{name}_proj.weight"]
            for i in range(max(1, config.n_shared_experts))
        ]
        like = all_of_it[0]
        found[f"shared_expert.{name}_proj.weight"] = torch.cat(all_of_it, side) * (
            2 if name == "down" else 1
        )
    return {name: value.to(like.dtype) for name, value in found.items()}


def load(args) -> tuple[MiniMindForCausalLM, str]:
    """The model, an adapter merged into it, and the folder its tokenizer stands in."""
    path = find_model(args.model) if args.model else None
    extra = find_model(args.adapter) if args.adapter else None
    if path and (Path(path) / "adapter_config.json").is_file():
        if extra:
            raise cli.usage_error(
                f"--model {args.model} is an adapter itself; give one adapter, its base as --model"
            )
        path, extra = None, path
    base = adapter.check_base(extra, path) if extra else path
    model = cli.load(AutoModelForCausalLM, base, "--model", dtype=DTYPES[args.dtype])
    if not isinstance(model, MiniMindForCausalLM):
        raise SystemExit(
            f"{base} is a {type(model).__name__} already; nothing to export (--import reads it)"
        )
    if extra:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, extra).merge_and_unload(safe_merge=True)
    return model.eval(), extra or path


def write_native(model: MiniMindForCausalLM, tokenizer, out: str | Path) -> float:
    """Write the folder; it opens without this recipe's code. -> largest difference of a logit, see
    `compare`."""
    config = native_config(model.config)
    config.dtype = model.dtype
    with weight_files.Draft(out) as part:
        weight_files.save_sharded(
            native_tensors(model.config, dict(model.state_dict())).items(), part
        )
        config.save_pretrained(part)
        for_older_readers(part / "config.json")
        model.generation_config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        return compare(model, AutoModelForCausalLM.from_pretrained(part, dtype=model.dtype))


def for_older_readers(file: Path) -> None:
    """The rotary settings once more, under the names they had before transformers 5."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def compare(ours, theirs) -> float:
    """Largest difference of a logit over some ids; SystemExit when it is more than rounding."""
    vocab = ours.config.vocab_size
    ids, size = torch.arange(2 * 48).view(2, 48) * 7919 % vocab, 48
    window = max(size, ours.config.max_position_embeddings)
    places = torch.stack(
        [torch.arange(size), torch.arange(size) * (window // size)]
    )  # near ones, and all over it
    a, b = (
        m.eval()(ids, position_ids=places, use_cache=False).logits.float() for m in (ours, theirs)
    )
    apart = (a - b).abs().max().item()
    if not apart <= CLOSE[ours.dtype] * max(1.0, a.abs().max().item()):
        raise SystemExit(
            f"the written model computes other logits (they differ by {apart:.3g}); nothing was kept"
        )
    return apart


# ---- in -------------------------------------------------------------------------------------------------------------


def own_config(config: PretrainedConfig, weights: Mapping) -> MiniMindConfig:
    """transformers' config -> ours; SystemExit naming all that this recipe's model cannot
    compute."""
    kinds = {kind.model_type: key for key, (kind, _) in KINDS.items()}
    if config.model_type not in kinds:
        raise SystemExit(
            f"a model of type {config.model_type} cannot be imported; {', '.join(kinds)} can"
        )
    generation, sparse = kinds[config.model_type]
    rope = getattr(config, "rope_parameters", None) or {
        "rope_type": "default",
        "rope_theta": 10000.0,
    }
    wrong = [*foreign(config, rope), *(f"{name} is not 0" for name in unsilenced(weights))]
    if wrong:
        raise SystemExit(f"this model cannot be imported: {'; '.join(wrong[:4])}")
    fields = {name: value for name in SAME if (value := getattr(config, name, None)) is not None}
    fields |= {"generation": generation, "rope_theta": rope["rope_theta"], "use_moe": sparse}
    fields["inference_rope_scaling"] = rope["rope_type"] == "yarn"
    if sparse:
        fields |= {name: getattr(config, name) for name in SPARSE} | {
            "norm_topk_prob": config.norm_topk_prob
        }
        fields |= {"moe_intermediate_size": config.moe_intermediate_size, "n_shared_experts": 0}
    if sparse and generation == 2:
        fields["intermediate_size"] = config.moe_intermediate_size
        fields["n_shared_experts"] = shared_experts(config, weights)
    return MiniMindConfig(**fields)


def foreign(config: PretrainedConfig, rope: dict) -> list[str]:
    """What differs from this recipe's model, in words."""
    expected = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }
    expected |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    found = [
        f"{k} is {getattr(config, k)}"
        for k, v in expected.items()
        if getattr(config, k, v) not in (v, None)
    ]
    yarn = YARN | {"rope_type": "yarn", "attention_factor": 1.0}
    known = rope["rope_type"] == "default" or all(rope.get(k) == v for k, v in yarn.items())
    found += (
        []
        if known and rope.get("partial_rotary_factor", 1) == 1
        else [f"rope_parameters are {rope}"]
    )
    one = (
        config.model_type == "qwen2_moe"
        and config.num_experts_per_tok == 1
        and config.norm_topk_prob
    )
    return [*found, *["norm_topk_prob with one expert per token"] * one]


def unsilenced(weights: Mapping) -> list[str]:
    """Names of biases, and of gates before shared experts, that do something."""
    extra = re.compile(r"\.bias$|shared_expert_gate\.weight$")
    return [name for name in weights if extra.search(name) and weights[name].any()]


def shared_experts(config: PretrainedConfig, weights: Mapping) -> int:
    """How many of our shared experts Qwen2-MoE's one is: ours have the width of the routed ones."""
    names = [name for name in weights if ".mlp.shared_expert." in name]
    if not any(weights[name].any() for name in names):
        return 0
    count, rest = divmod(config.shared_expert_intermediate_size, config.moe_intermediate_size)
    if rest or not count:
        raise SystemExit(
            f"this model cannot be imported: its shared expert is {config.shared_expert_intermediate_size} wide, no "
            f"multiple of the {config.moe_intermediate_size} of the routed ones"
        )
    return count


def own_tensors(config: MiniMindConfig, weights: Mapping) -> dict[str, Tensor]:
    """Weights under our names; experts of a layer may stand in one tensor each, as transformers 5
    holds them."""
    found = {}
    for name in weights:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith((".bias", "shared_expert_gate.weight")) or name.endswith(
            (".freqs_cos", ".freqs_sin")
        ):
            continue
        block, _, part = name.partition(".mlp.experts.")
        if part in ("gate_up_proj", "down_proj"):
            for i, value in enumerate(weights[name]):
                halves = value.chunk(2) if part == "gate_up_proj" else [value]
                kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
                found |= {
                    f"{block}.mlp.experts.{i}.{k}.weight": v
                    for k, v in zip(kinds, halves, strict=True)
                }
        elif ".mlp.shared_expert." in name:
            block, _, part = name.partition(".mlp.shared_expert.")
            value = weights[name] / 2 if part.startswith("down") else weights[name]
            parts = (
                value.chunk(config.n_shared_experts, int(part.startswith("down")))
                if config.n_shared_experts
                else []
            )
            found |= {f"{block}.mlp.shared_experts.{i}.{part}": v for i, v in enumerate(parts)}
        else:
            found[name] = weights[name]
    return found


def config_of_weights(weights: Mapping, heads: int, per_token: int | None) -> MiniMindConfig:
    """What the shapes of a weight file tell; heads is needed where there is no norm of a head
    (generation 2)."""
    first, shape = "model.layers.0.", {name: tuple(value.shape) for name, value in weights.items()}
    if "model.embed_tokens.weight" not in shape or f"{first}self_attn.q_proj.weight" not in shape:
        raise SystemExit(
            "these are not the weights of a whole model under MiniMind's names (model.embed_tokens ...)"
        )
    vocab, hidden = shape["model.embed_tokens.weight"]
    generation = 3 if f"{first}self_attn.q_norm.weight" in shape else 2
    query, key = (shape[f"{first}self_attn.{name}_proj.weight"][0] for name in "qk")
    size = shape[f"{first}self_attn.q_norm.weight"][0] if generation == 3 else query // heads
    count = lambda pattern: len({m[1] for name in shape if (m := re.match(pattern, name))})  # noqa: E731
    fields = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "generation": generation,
        "head_dim": size,
    }
    fields |= {"num_attention_heads": query // size, "num_key_value_heads": key // size}
    fields["num_hidden_layers"] = count(r"model\.layers\.(\d+)\.")
    experts, shared = (
        count(rf"model\.layers\.0\.mlp\.{kind}\.(\d+)\.") for kind in ("experts", "shared_experts")
    )
    head, table = weights.get("lm_head.weight"), weights["model.embed_tokens.weight"]
    fields["tie_word_embeddings"] = head is None or torch.equal(head, table)
    if not experts:
        return MiniMindConfig(**fields, intermediate_size=shape[f"{first}mlp.gate_proj.weight"][0])
    fields["moe_intermediate_size"] = shape[f"{first}mlp.experts.0.gate_proj.weight"][0]
    if generation == 2:
        fields["intermediate_size"] = fields["moe_intermediate_size"]
    return MiniMindConfig(
        **fields,
        use_moe=True,
        num_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=per_token,
    )


def read_foreign(args) -> tuple[MiniMindConfig, dict[str, Tensor], Path | None]:
    """--import: config, tensors, and where a tokenizer stands, if there is one."""
    path = Path(args.model)
    if path.is_file():
        weights = (
            load_file(path) if path.suffix == ".safetensors" else weight_files.read_pickle(path)
        )
        config = config_of_weights(weights, args.num_attention_heads, args.num_experts_per_tok)
        places = [
            path.parent,
            path.parent / "final",
            path.parent.parent / "model",
        ]  # ours, or where MiniMind has it
    elif path.is_dir():
        weights = weight_files.Weights(path)
        config = cli.load(AutoConfig, str(path), "--model")
        if (
            config.model_type == MiniMindConfig.model_type
        ):  # ours, or of MiniMind's own code, which has no generation
            fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
            fields.setdefault("generation", 3 if any("q_norm" in name for name in weights) else 2)
            config = MiniMindConfig(
                **{k: v for k, v in fields.items() if k not in ("auto_map", "model_type")}
            )
        else:
            config = own_config(config, weights)
        places = [path]
    else:
        raise SystemExit(f"--model {path}: no such file or folder")
    tokenizer = next((p for p in places if (p / "tokenizer.json").is_file()), None)
    return config, own_tensors(config, weights), tokenizer


def bring_in(args) -> str:
    config, tensors, found = read_foreign(args)
    tokenizer = args.tokenizer or found
    tokenizer = tokenizer and cli.load(AutoTokenizer, str(tokenizer), "--tokenizer")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"the tokenizer has {len(tokenizer):,} tokens, the model only {config.vocab_size:,}"
        )
    model = MiniMindForCausalLM(config).to(
        torch.float32 if args.dtype == "auto" else DTYPES[args.dtype]
    )
    known = {name: value.shape for name, value in model.state_dict().items()}
    for name, value in tensors.items():
        if name not in known:
            raise SystemExit(f"{args.model}: {name} is no weight of this recipe's model")
        weight_files.check_shape(name, value.shape, known[name])
    missing = [
        n
        for n in known
        if n not in tensors and not (n == "lm_head.weight" and config.tie_word_embeddings)
    ]
    if missing:
        raise SystemExit(
            f"{args.model}: {len(missing)} weights are missing, the first is {missing[0]}"
        )
    model.load_state_dict(tensors, strict=False)
    with weight_files.Draft(args.output_dir) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    what = f"generation {config.generation}{', experts' * config.use_moe}, {model.num_parameters():,} parameters"
    return what + (
        "" if tokenizer is not None else "; no tokenizer was found: --tokenizer FOLDER adds one"
    )


# ---- command line ---------------------------------------------------------------------------------------------------


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
        raise cli.usage_error(
            "give --model FOLDER" + (" or --adapter FOLDER" if not args.bring_in else "")
        )
    return args


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    if args.bring_in:
        cli.say(f"imported: {bring_in(args)} -> {args.output_dir}")
        return
    model, folder = load(args)
    tokenizer = (
        cli.load(AutoTokenizer, folder, "--model")
        if (Path(folder) / "tokenizer.json").is_file()
        else None
    )
    apart = write_native(model, tokenizer, args.output_dir)
    name = KINDS[model.config.generation, model.config.use_moe][1]
    cli.say(
        f"exported as {name}, {model.dtype}; logits differ by at most {apart:.1e} -> {args.output_dir}"
    )


if __name__ == "__main__":
    cli.run(main)
