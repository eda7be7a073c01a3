"""Run a folder of golden numbers through this project's implementation of a model.

    python tests/golden_check.py chatglm_v11 tests/golden/chatglm_v11

FOLDER holds weights.safetensors (names of the original), config.json (fields of the original; keys that begin with "_"
are notes) and cases.npz (arrays CASE__ARRAY, made by the original code in float32). What a case is follows from its
arrays: `sequences` a generation, `labels` a training step, else a forward pass. One JSON line on stdout:
{"name", "folder", "ok", "tolerance", "cases": {case: {"logits", "loss", "grad_norms", "grad", "sequences"}},
"skipped": {case or case.array: reason}}, each number the largest difference: absolute for logits and loss, relative for
gradients, tokens for sequences.
Exit codes: 0 all within tolerance, 1 not, 2 unknown name, or no such folder.

To add a model: a function (folder, config) -> Model, and its line in MODELS.
"""

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FILES = ("weights.safetensors", "config.json", "cases.npz")
TOLERANCE = {
    "logits": 5e-5,
    "loss": 1e-5,
    "grad_norms": 1e-4,
    "grad": 1e-4,
    "sequences": 0,
    "rope": 5e-5,
}
TOLERANCE |= {"norms": 1e-5, "slopes": 1e-7, "aux_loss": 1e-5}
NOTES = ("features_flat",)  # arrays that only tell how a case was made


@dataclass
class Case:
    """The arrays of one case as tensors; `used` collects the names that were looked at."""

    name: str
    arrays: dict
    used: set = field(default_factory=set)

    def get(self, name: str):
        self.used.add(name)
        return self.arrays.get(name)


@dataclass
class Model:
    """What the checks need of one implementation.

    model: called with input_ids, attention_mask, position_ids, labels; has generate().
    inputs: case -> [(way, arguments of a forward pass)], each way compared with the case's numbers.
    prompts: case -> [(way, arguments of generate())].
    real: case -> bool [B, T], False at padding, whose logits mean nothing.
    gradients: model after backward() -> {name in the original: gradient}.
    full_gradients: {array of a case: name in the original}, for gradients that are compared element by element.
    extra: case -> {what: difference} of checks that only this model has; marks its arrays as used.
    skipped: filled by these functions, {case: reason}.
    """

    model: object
    inputs: Callable
    prompts: Callable
    real: Callable
    gradients: Callable = lambda model: {name: p.grad for name, p in model.named_parameters()}
    full_gradients: dict = field(default_factory=dict)
    extra: Callable = lambda case: {}
    skipped: dict = field(default_factory=dict)


# ---- models -----------------------------------------------------------------------------------------------------


def settings_of(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def as_checkpoint(folder: Path, config: dict, into: Path) -> Path:
    """The golden folder under the file names of a checkpoint, without its notes."""
    (into / "config.json").write_text(json.dumps(config))
    (into / "model.safetensors").symlink_to((folder / "weights.safetensors").resolve())
    return into


def causal(model, **more) -> Model:
    """A decoder with a 2-D attention_mask and, where a case has them, positions [B, T]."""

    def inputs(case):
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        given = {name: case.get(name) for name in names if case.get(name) is not None}
        derived = {k: v for k, v in given.items() if k != "position_ids"}
        return [("given", given)] + ([("derived", derived)] if "position_ids" in given else [])

    def prompts(case):
        case.get("position_ids")  # generate() makes its own
        ids, mask = case.get("input_ids"), case.get("attention_mask")
        return [
            (
                "derived",
                {
                    "input_ids": ids,
                    "attention_mask": ids.new_ones(ids.shape) if mask is None else mask,
                },
            )
        ]

    def real(case):
        ids, mask = case.get("input_ids"), case.get("attention_mask")
        return (ids == ids) if mask is None else mask.bool()

    return Model(model, inputs, prompts, real, **more)


def chatglm2(folder: Path, config: dict) -> Model:
    """ChatGLM2 through chatglm_lora/convert.py and transformers' GlmForCausalLM."""
    sys.path.insert(0, str(ROOT / "chatglm_lora"))
    import convert
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        (source := Path(place, "original")).mkdir()
        as_checkpoint(folder, settings_of(config), source)
        convert.to_native(source, Path(place, "native"))
        model = AutoModelForCausalLM.from_pretrained(Path(place, "native"), dtype="auto")

    def gradients(model):
        """The native gradients under the original names: parts of a fused matrix are put together again."""
        found, parts = {}, dict(model.named_parameters())
        for old, new in convert.native_names(model.config).items():
            found[old] = torch.cat([parts[name].grad for name in new])
        return found

    qkv = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    return causal(model, gradients=gradients, full_gradients={"grad_qkv0": qkv})


def chatglm(folder: Path, config: dict, first_version: bool = True) -> Model:
    """ChatGLM-6B; `first_version`: numbers of v1.0, where some of the positions and masks are deliberately not ours.

    Every case runs with the mask and positions that its layers saw; and, where these follow the rules of v1.1, with
    none, so that the model derives them from input_ids and the padding.
    """
    sys.path.insert(0, str(ROOT / "chatglm_lora"))
    import torch
    from modeling_chatglm import ChatGLMForConditionalGeneration, rotary

    settings = settings_of(config) | {"residual_scale_layers": config.get("_alpha_layers", 28)}
    with tempfile.TemporaryDirectory() as place:
        as_checkpoint(folder, settings, Path(place))
        model = ChatGLMForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    skipped = {}

    def seen(case):
        """-> (mask [B, 1, T, T], positions [B, 2, T]) of the layers, for a generation those of its prompt."""
        prefix = "prefill_" if "sequences" in case.arrays else ""
        for name in ("given_attention_mask", "given_position_ids"):  # the same again
            case.get(name)
        return case.get(f"{prefix}attention_mask"), case.get(f"{prefix}position_ids")

    def real(case):
        ids, (mask, _) = case.get("input_ids"), seen(case)
        return ids == ids if mask is None else ~mask[:, 0].all(-1).expand(len(ids), -1)

    def derived(case):
        """input_ids and padding for the model's own mask and positions, or None where v1.0 has others."""
        ids, (mask, positions) = case.get("input_ids"), seen(case)
        if mask is None or positions is None:
            return {"input_ids": ids}
        if first_version and len(mask) != len(ids):
            skipped[f"{case.name}.derived"] = (
                "v1.0 takes mask and positions of row 0 for all rows and sees padding"
            )
            return None
        kept = real(case)
        if first_version:
            for row, keep, one_mask, one_position in zip(
                ids, kept, mask[:, 0], positions, strict=True
            ):
                wanted_mask, wanted_position = layout_of_v11(model.config, row[keep])
                where = keep.nonzero()[:, 0]
                if not torch.equal(one_position[:, where], wanted_position):
                    skipped[f"{case.name}.derived"] = (
                        "v1.0 gives <sop> or the answer another position than v1.1"
                    )
                elif not torch.equal(one_mask[where][:, where], wanted_mask):
                    skipped[f"{case.name}.derived"] = (
                        "the mask of this v1.0 collator is not that of generation"
                    )
        return (
            None
            if f"{case.name}.derived" in skipped
            else {"input_ids": ids, "attention_mask": kept.long()}
        )

    def inputs(case):
        mask, positions = seen(case)
        given = {
            "input_ids": case.get("input_ids"),
            "attention_mask": mask,
            "position_ids": positions,
        }
        labels = {} if case.get("labels") is None else {"labels": case.get("labels")}
        given = {name: value for name, value in given.items() if value is not None}
        return [("given", given | labels)] + (
            [("derived", own | labels)] if (own := derived(case)) else []
        )

    def prompts(case):
        own = derived(case)
        return [("derived", own)] if own else []

    def extra(case):
        if "inv_freq_fp32" in case.arrays:
            return rope(case)
        return (
            replay(case)
            if {"sequences", "step_position_ids", "step_logits"} <= set(case.arrays)
            else {}
        )

    def replay(case) -> dict:
        """One pass over the whole sequence with the mask and positions of each step, against step_logits and tokens."""
        (mask, positions), sequence, steps = (
            seen(case),
            case.get("sequences"),
            case.get("step_position_ids"),
        )
        asked, length = mask.shape[-1], sequence.shape[1] - 1
        whole = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(len(sequence), 1, 1, 1)
        whole[:, :, :asked, :asked] = mask
        whole[:, :, asked:, :asked] = mask[:, :, -1:]
        where = torch.cat([positions, steps], 2)[:, :, :length]
        logits = model(sequence[:, :-1], attention_mask=whole, position_ids=where).logits[
            :, asked - 1 :
        ]
        before_end = ending(
            sequence[:, asked:], config.get("eos_token_id"), config.get("pad_token_id") or 0
        )[1]
        chosen = (logits.argmax(-1) != sequence[:, asked:]) & before_end
        return {
            "logits": difference(logits, case.get("step_logits")),
            "sequences": int(chosen.sum()),
        }

    def rope(case) -> dict:
        for name in ("inv_freq_fp16", "inv_freq_fp32", "cos_fp16", "sin_fp16"):
            case.get(name)
        skipped[f"{case.name}.fp16"] = (
            "the angles are computed in float32 whatever the dtype of the weights"
        )
        positions = case.get("positions")
        cos, sin = (
            x[0, :, 0, 0]
            for x in rotary(positions.expand(1, 2, -1), 2 * len(case.get("inv_freq_fp32")))
        )
        return worst(
            *(
                {"rope": difference(x, case.get(f"{n}_fp32"))}
                for x, n in ((cos, "cos"), (sin, "sin"))
            )
        )

    qkv = "transformer.layers.0.attention.query_key_value.weight"
    return Model(
        model,
        inputs,
        prompts,
        real,
        full_gradients={"grad_qkv0": qkv},
        extra=extra,
        skipped=skipped,
    )


def layout_of_v11(config, row):
    """Tokens [T] without left padding -> (mask [T, T], True hidden; positions [2, T]); written once more, to judge."""
    import torch

    tokens = row.tolist()
    prefix, size = tokens.index(config.bos_token_id), len(tokens)
    mark = config.gmask_token_id if config.gmask_token_id in tokens else config.mask_token_id
    place = [min(i, tokens.index(mark)) if i >= prefix else i for i in range(size)]
    block = [max(0, i - prefix + 1) for i in range(size)]
    mask = torch.tensor([[j > i and j >= prefix for j in range(size)] for i in range(size)])
    return mask, torch.tensor([place, block])


def chatglm_v11(folder: Path, config: dict) -> Model:
    return chatglm(folder, config, first_version=False)


def baichuan2(folder: Path, config: dict, seven: bool) -> Model:
    """Baichuan2 through baichuan2_dpo/convert.py: the 7B as plain Llama and with its NormHead kept, the 13B as ours."""
    sys.path.insert(0, str(ROOT / "baichuan2_dpo"))
    import convert
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        (source := Path(place, "original")).mkdir()
        as_checkpoint(folder, settings_of(config), source)
        ways = [{}, {"keep_norm_head": True}] if seven else [{}]
        for i, way in enumerate(ways):
            convert.to_native(source, Path(place, str(i)), **way)
        models = [
            AutoModelForCausalLM.from_pretrained(Path(place, str(i)), dtype="auto").eval()
            for i in range(len(ways))
        ]
    raw, skipped = load_file(folder / "weights.safetensors")["lm_head.weight"], {}

    def gradients(model):
        """Under the original names; of a folded head what the normalisation makes of its gradient."""
        found, parts = {}, dict(model.named_parameters())
        for old, new in convert.native_names(parts).items():
            found[old] = torch.cat([parts[name].grad for name in new])
        if model.config.model_type == "llama":
            row, grad, length = (
                parts["lm_head.weight"],
                found["lm_head.weight"],
                raw.norm(dim=-1, keepdim=True),
            )
            found["lm_head.weight"] = (grad - row * (row * grad).sum(-1, keepdim=True)) / length
        return found | {"rows of lm_head": found["lm_head.weight"][[5, 60, 190, 255]]}

    def packed(case):
        """Segments 1, 2, 3 of the original's mask (0: padding) as one packed row."""
        sizes = torch.unique_consecutive(case.get("attention_mask")[0], return_counts=True)[1]
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
        about = {"cu_seq_lens_q": starts, "max_length_q": int(sizes.max())}
        return [("packed", {"input_ids": case.get("input_ids")} | about)]

    def extra(case):
        if "weight_raw_norms" in case.arrays:
            after, unit = (
                case.get("weight_norms_after_first_eval_forward"),
                torch.eye(config["hidden_size"]),
            )
            found = [difference(model.lm_head(unit).norm(dim=0), after) for model in models]
            return {
                "norms": max(found + [difference(raw.norm(dim=-1), case.get("weight_raw_norms"))])
            }
        if "slopes_40" in case.arrays:
            from common.fast.alibi import alibi_slopes

            pairs = [(config["num_attention_heads"], "slopes_this"), (40, "slopes_40")]
            return {
                "slopes": max(
                    difference(alibi_slopes(heads), case.get(name)) for heads, name in pairs
                )
            }
        found = worst(*({} if one is first else run(one, case) for one in kinds))
        return (
            worst(found, *(training(model, case) for model in models))
            if "train_logits" in case.arrays
            else found
        )

    def run(one, case):
        return (
            check_generation(one, case, config)
            if "sequences" in case.arrays
            else check_forward(one, case)
        )

    def training(model, case) -> dict:
        for name in ("z_loss_weight", "loss_with_z"):
            case.get(name)
        skipped[f"{case.name}.loss_with_z"] = (
            "z_loss_weight is 0 in the published models, and not implemented"
        )
        out = model.train()(**causal(model).inputs(case)[0][1])
        model.eval()
        wanted, kept = case.get("train_logits"), causal(model).real(case)
        return {
            "logits": difference(out.logits[kept], wanted[kept]),
            "loss": difference(out.loss, case.get("train_loss")),
        }

    full = {
        "grad_wpack0": "model.layers.0.self_attn.W_pack.weight",
        "grad_lm_head_rows": "rows of lm_head",
    }
    kinds = [
        causal(model, gradients=gradients, full_gradients=full, skipped=skipped) for model in models
    ]
    first, plain = kinds[0], kinds[0].inputs
    first.inputs = lambda case: packed(case) if case.name == "packed_segments" else plain(case)
    first.extra = extra
    return first


def baichuan2_7b(folder: Path, config: dict) -> Model:
    return baichuan2(folder, config, seven=True)


def baichuan2_13b(folder: Path, config: dict) -> Model:
    return baichuan2(folder, config, seven=False)


def internlm(folder: Path, config: dict, fused: bool) -> Model:
    """InternLM through internlm_sft/convert.py as a Llama; fused: InternLM2, whose q, k and v are one matrix."""
    sys.path.insert(0, str(ROOT / "internlm_sft"))
    import convert
    import layout
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        (source := Path(place, "original")).mkdir()
        as_checkpoint(folder, settings_of(config), source)
        convert.to_native(source, Path(place, "native"))
        model = AutoModelForCausalLM.from_pretrained(Path(place, "native"), dtype="auto")
    if fused != any("wqkv" in name for name in weight_names(folder)):
        raise SystemExit(f"{folder}: these are weights of another InternLM")

    def gradients(model):
        """The native gradients under the original names: parts of a fused matrix are put together again."""
        parts = {name: p.grad for name, p in model.named_parameters()}
        if not fused:
            return parts
        found, groups = {}, model.config.num_key_value_heads
        for old, new in layout.native_names(parts).items():
            grads = [parts[name] for name in new]
            found[old] = grads[0] if len(grads) == 1 else layout.join_wqkv(*grads, groups)
        return found

    return causal(model, gradients=gradients)


def weight_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "weights.safetensors", "pt") as file:
        return list(file.keys())


def internlm1(folder: Path, config: dict) -> Model:
    return internlm(folder, config, fused=False)


def internlm2(folder: Path, config: dict) -> Model:
    return internlm(folder, config, fused=True)


def minimind(folder: Path, config: dict, generation: int, sparse: bool) -> Model:
    """MiniMind through minimind_npu/model.py: the original's names of fields and weights as they are."""
    sys.path.insert(0, str(ROOT / "minimind_npu"))
    import torch
    from model import MiniMindForCausalLM, rotary

    if sparse != bool(config.get("use_moe")):
        raise SystemExit(f"{folder}: use_moe is {config.get('use_moe')} in its config.json")
    settings = settings_of(config) | {"generation": generation, "model_type": "minimind"}
    with tempfile.TemporaryDirectory() as place:
        as_checkpoint(folder, settings, Path(place))
        model, info = MiniMindForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise SystemExit(f"{folder}: {len(wrong)} weights do not fit, {wrong[0]} for one")
    window, scaled = model.config.max_position_embeddings, model.config.inference_rope_scaling

    def inputs(case):
        stretched = "cos_at" in case.arrays
        model.config.inference_rope_scaling = stretched or scaled
        model.config.max_position_embeddings = 32768 if stretched else window
        return causal(model).inputs(case)

    def extra(case):
        found = {}
        if "sequences" in case.arrays:
            return other_generations(model, case)
        arguments = inputs(case)[0][1]
        if (wanted := case.get("aux_loss")) is not None:
            found["aux_loss"] = difference(model(**arguments).aux_loss, wanted)
        if "cos_at" in case.arrays:
            positions = torch.tensor([[0, 1, 100, 2047, 2048, 5000, 32767]])
            tables = [x[0, 0] for x in rotary(model.config, positions)]
            found["rope"] = max(
                difference(x, case.get(f"{n}_at"))
                for x, n in zip(tables, ("cos", "sin"), strict=True)
            )
        return worst(found, training(case, arguments) if "train_logits" in case.arrays else {})

    def training(case, arguments) -> dict:
        names, found = list(case.get("grad_names")), {}
        model.train()
        for balanced, array in ((0, "grad_norms_lm"), (1, "grad_norms_total")):
            model.zero_grad()
            out = model(**arguments)
            (out.loss + balanced * out.aux_loss).backward()
            gradients = dict(model.named_parameters())
            norms = torch.stack([gradients[name].grad.norm() for name in names])
            found = worst(found, {"grad_norms": relative(norms, case.get(array))})
        model.eval()
        return worst(found, {
            "logits": difference(out.logits, case.get("train_logits")),
            "loss": difference(out.loss, case.get("train_loss")),
            "aux_loss": difference(out.aux_loss, case.get("train_aux_loss")),
        })  # fmt: skip

    one = causal(model)
    one.inputs, one.extra = inputs, extra
    return one


def other_generations(model, case: Case) -> dict:
    """The original's own penalty (it divides every score, also negative ones) and its seeded sampling."""
    import torch
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class Penalty(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores.scatter(
                1, ids, scores.gather(1, ids) / float(case.get("repetition_penalty"))
            )

    ids, wanted, sampled = case.get("input_ids"), case.get("sequences"), "sample" in case.name
    settings = {
        "max_new_tokens": wanted.shape[1] - ids.shape[1],
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model.generation_config = GenerationConfig()
    if "repetition_penalty" in case.arrays:
        settings["logits_processor"] = LogitsProcessorList([Penalty()])
    elif sampled:
        torch.manual_seed(int(case.name.partition("seed")[2] or 99))
        settings |= {"temperature": 0.85, "top_k": 50, "top_p": 0.85}
    else:
        return {}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=sampled, **settings)
    return {
        "sequences": int((found != wanted).sum()) if found.shape == wanted.shape else wanted.numel()
    }


def minimind_dense(folder: Path, config: dict) -> Model:
    return minimind(folder, config, 3, False)


def minimind_moe(folder: Path, config: dict) -> Model:
    return minimind(folder, config, 3, True)


def minimind2_dense(folder: Path, config: dict) -> Model:
    return minimind(folder, config, 2, False)


def minimind2_moe(folder: Path, config: dict) -> Model:
    return minimind(folder, config, 2, True)


MODELS = {
    "chatglm": chatglm, "chatglm_v11": chatglm_v11, "chatglm2": chatglm2,
    "baichuan2_7b": baichuan2_7b, "baichuan2_13b": baichuan2_13b,
    "internlm1": internlm1, "internlm2": internlm2,
    "minimind_dense": minimind_dense, "minimind_moe": minimind_moe,
    "minimind2_dense": minimind2_dense, "minimind2_moe": minimind2_moe,
}  # fmt: skip


# ---- checks -----------------------------------------------------------------------------------------------------


def difference(found, wanted) -> float:
    """Largest absolute difference; nan where one is nan, inf for another shape."""
    if found.shape != wanted.shape:
        return math.inf
    return (found.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0


def relative(found, wanted) -> float:
    """Largest difference of two lists of norms, each by its own size; below 1e-6 it is rounding, measured by 1e-3."""
    size = wanted.double().masked_fill(wanted < 1e-6, 1e-3)
    return ((found.double() - wanted.double()).abs() / size).max().item()


def worst(*results: dict) -> dict:
    """The largest of each number; nan counts as the largest."""
    out = {}
    for result in results:
        for key, value in result.items():
            old = out.get(key, -1.0)
            out[key] = old if value <= old or math.isnan(old) else value
    return out


def check_forward(one: Model, case: Case) -> dict:
    """Logits, loss and gradients of a case, the worst of all ways to give its inputs."""
    results, kept = [], one.real(case)
    for _, arguments in one.inputs(case):
        one.model.zero_grad()
        out, found = one.model(**arguments, use_cache=False), {}
        for name in ("logits", "logits_last12"):
            if (wanted := case.get(name)) is not None:
                rows = kept[:, -wanted.shape[1] :]
                found["logits"] = difference(out.logits[:, -wanted.shape[1] :][rows], wanted[rows])
        if (wanted := case.get("loss")) is not None:
            found["loss"] = difference(out.loss, wanted)
        if "grad_norms" in case.arrays:
            out.loss.backward()
            found |= check_gradients(one, case, list(case.get("grad_names")))
        results.append(found)
    return worst(*results)


def check_gradients(one: Model, case: Case, names: list[str]) -> dict:
    import torch

    gradients = one.gradients(one.model)
    norms = torch.stack([gradients[name].norm() for name in names])
    found = {"grad_norms": relative(norms, case.get("grad_norms"))}
    for array, name in one.full_gradients.items():
        if (wanted := case.get(array)) is not None:
            found["grad"] = difference(gradients[name], wanted) / wanted.abs().max().item()
    return found


def check_generation(one: Model, case: Case, config: dict) -> dict:
    """Greedy tokens, and the logits that chose them, with a cache and without; logits up to the end of each row."""
    import torch
    from transformers import GenerationConfig

    results, wanted, logits = [one.extra(case)], case.get("sequences"), case.get("step_logits")
    penalty, pad = case.get("repetition_penalty"), config.get("pad_token_id") or 0
    if logits is None:  # not plainly greedy
        if not results[0]:
            one.skipped[case.name] = "sampled tokens depend on the random generator of one version"
        return results[0]
    asked = case.get("input_ids").shape[1]
    answer = wanted[:, asked:]
    end, before_end = ending(answer, config.get("eos_token_id"), pad)
    for _, arguments in one.prompts(case):
        for cached in (True, False):
            one.model.generation_config = GenerationConfig(
                max_new_tokens=answer.shape[1], do_sample=False, use_cache=cached, pad_token_id=pad, eos_token_id=end,
                output_logits=True, return_dict_in_generate=True,
                repetition_penalty=1.0 if penalty is None else penalty.item(),
            )  # fmt: skip
            out = one.model.generate(**arguments)
            same = out.sequences.shape == wanted.shape
            found = {"sequences": int((out.sequences != wanted).sum()) if same else wanted.numel()}
            if logits is not None and same:
                found["logits"] = difference(
                    torch.stack(out.logits, 1)[before_end], logits[before_end]
                )
            results.append(found)
    return worst(*results)


def ending(answer, eos, pad: int):
    """Generated tokens [B, T] -> (eos if the original stopped there, bool [B, T]: False behind the end of a row)."""
    import torch

    ends = torch.isin(answer, torch.tensor([eos] if isinstance(eos, int) else eos or []))
    behind = ends.cumsum(1) - ends.long() > 0
    stops = eos is not None and bool((answer[behind] == pad).all())
    return (eos, ~behind) if stops else (None, answer == answer)


def check(name: str, folder: Path) -> dict:
    """All cases of `folder` through model `name` -> the report, as in the head of this file."""
    import numpy
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report
        one = MODELS[name](folder, config)
    one.model.eval()
    cases = {}
    with numpy.load(folder / "cases.npz", allow_pickle=False) as file:
        for key in file.files:
            case, _, array = key.partition("__")
            value = file[key]
            value = value if value.dtype.kind == "U" else torch.from_numpy(value)
            cases.setdefault(case, Case(case, {})).arrays[array] = value
    results = {}
    for case in cases.values():
        if "sequences" in case.arrays:
            found = check_generation(one, case, config)
        elif "input_ids" in case.arrays:
            found = worst(check_forward(one, case), one.extra(case))
        else:
            found = one.extra(case)
        if found:
            results[case.name] = found
        if case.name not in one.skipped:
            for array in sorted(set(case.arrays) - case.used - set(NOTES)):
                one.skipped[f"{case.name}.{array}"] = "nothing here compares this array"
    ok = bool(results) and all(
        value <= TOLERANCE[key] for found in results.values() for key, value in found.items()
    )
    about = {"name": name, "folder": str(folder), "ok": ok, "tolerance": TOLERANCE}
    return about | {"cases": results, "skipped": one.skipped}


def main() -> None:
    if len(sys.argv) != 3:
        raise usage(f"python {sys.argv[0]} NAME FOLDER; NAME: {', '.join(MODELS)}")
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name not in MODELS:
        raise usage(f"unknown model {name}; there are {', '.join(MODELS)}")
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise usage(f"{folder} is no golden folder: it has no {', '.join(missing)}")
    from common import cli

    def run() -> None:
        report = check(name, folder)
        plain = lambda x: x if not isinstance(x, float) or math.isfinite(x) else str(x)
        report["cases"] = {
            c: {k: plain(v) for k, v in found.items()} for c, found in report["cases"].items()
        }
        print(json.dumps(report))
        raise SystemExit(0 if report["ok"] else 1)

    cli.run(run)


def usage(message: str) -> SystemExit:
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


if __name__ == "__main__":
    main()
