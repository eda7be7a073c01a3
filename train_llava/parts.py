"""The three parts of a LLaVA while it trains: what moves, at which rate, adapters, and what of them
a checkpoint holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from model import tower_of
from safetensors.torch import load_file, save_file
from sight import cut_tower, is_frozen, keep_in_eval, layers_of, tower_layers
from torch import nn

from common import cli
from common.convert.weight_files import Weights
from common.data.files import atomic_file

PROJECTOR = "multi_modal_projector"
VISION = "vision_tower"
BEFORE = ".original_module."  # in the names of peft's copy of what trains whole beside an adapter
TRAINED = {  # --train_type -> the parts that move as a whole; "lora" puts adapters into the LLM
    "projector": ("projector",),
    "lora": ("projector",),
    "freeze_vision": ("projector", "language model"),
    "freeze_llm": ("vision tower", "projector"),
    "full": ("vision tower", "projector", "language model"),
}
ALIASES = {"none": "full", "use_lora": "lora"}  # of the older script
IN_WORDS = ("vision tower", "projector", "language model", "tower's adapter", "adapter")


def part_of(name: str) -> str:
    """Where a parameter of this name belongs: one of the first three IN_WORDS."""
    if PROJECTOR in name:
        return "projector"
    return "vision tower" if VISION in name else "language model"


# ---- what moves ----------------------------------------------------------------------------------


def choose_trained(model, train_type: str, adapts_vision: bool = False) -> None:
    """Gradients for what --train_type says and nothing else; a tower that stands still is cut and
    stays in eval mode.

    model: LlavaForConditionalGeneration, before add_lora.
    """
    if not hasattr(model.model, PROJECTOR):
        raise SystemExit(f"--train_type {train_type}: this model has no {PROJECTOR}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in TRAINED[train_type])
    tower = model.model.vision_tower
    if not is_frozen(tower):
        freeze_unused(model)
    elif not adapts_vision:
        left_out = cut_tower(model)
        if left_out:
            cli.say(
                f"note: the tower runs without its last {left_out} layers, which nobody looks at"
            )
        keep_in_eval(tower)


def freeze_unused(model) -> None:
    """Take the gradient from what no feature depends on (the layers behind those looked at, the
    norm and the pooling at the end, a mask token): DistributedDataParallel would wait for it."""
    tower = model.model.vision_tower
    holder, name = tower_layers(tower)
    layers = getattr(holder, name)
    needed = max(layers_of(model.config))
    used = {id(p) for layer in layers[:needed] for p in layer.parameters()}
    can_be_cut = tower_of(model.config.vision_config, "the tower").can_be_cut
    for key, parameter in tower.named_parameters():
        inside = f"{name}." in key
        behind = inside and id(parameter) not in used
        at_the_end = key.startswith(("post_layernorm", "head.", "pooler."))
        ends = key.startswith("layernorm") and (can_be_cut or needed < len(layers))
        if behind or at_the_end or ends or key.endswith("mask_token"):
            parameter.requires_grad_(False)


def as_masters(model) -> None:
    """float32 for what trains, where no engine makes masters of its own; the rest stays as it is
    stored, but for what meets it on the way: peft's copy, and the end of a tower, which runs though
    nobody looks at it."""
    tower_trains = any(
        parameter.requires_grad and ".lora_" not in name and VISION in name
        for name, parameter in model.named_parameters()
    )
    for name, parameter in model.named_parameters():
        meets = BEFORE in name or (tower_trains and VISION in name)
        if parameter.requires_grad or meets:
            parameter.data = parameter.data.float()


# ---- adapters ------------------------------------------------------------------------------------


def adapter_targets(model, names: str, lora_vision: bool) -> str:
    """--target_modules as one pattern over full names, so that no layer of the tower or of the
    projector is meant by chance (q_proj stands in both)."""
    found = {"language_model": set(), VISION: set()}
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            for part, kinds in found.items():
                if f".{part}." in f".{name}":
                    kinds.add(name.rpartition(".")[2])
    llm_kinds = found["language_model"]
    wanted = llm_kinds
    if names != "all-linear":
        wanted = {name.strip() for name in names.split(",") if name.strip()}
        unknown = sorted(wanted - llm_kinds)
        if unknown or not wanted:
            raise SystemExit(
                f"--target_modules: no layer of the language model is called "
                f"{', '.join(unknown) or repr(names)}; give all-linear or some of "
                f"{','.join(sorted(llm_kinds))}"
            )
    pattern = rf".*language_model\..*\.({'|'.join(sorted(map(re.escape, wanted)))})"
    if not lora_vision:
        return pattern
    # layers behind those looked at would get no gradient
    _, name = tower_layers(model.model.vision_tower)
    used = "|".join(str(number) for number in range(max(layers_of(model.config))))
    kinds = "|".join(sorted(map(re.escape, found[VISION])))
    return rf"({pattern}|.*{VISION}\..*{name}\.({used})\..*\.?({kinds}))"


def add_lora(model, args, recompute: bool):
    """Low-rank adapters in the language model (and, if asked, in the tower); the projector trains
    whole beside them. -> the PeftModel."""
    from peft import LoraConfig, get_peft_model

    if recompute:
        model.enable_input_require_grads()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=adapter_targets(model, args.target_modules, args.lora_vision),
        modules_to_save=[PROJECTOR],
    )
    return get_peft_model(model, config)


# ---- rates ---------------------------------------------------------------------------------------


def rates(args, training) -> dict[str, float]:
    """Learning rate of each part."""
    own = {
        "vision tower": args.vision_learning_rate,
        "projector": args.projector_learning_rate,
        "language model": None,
    }
    return {part: training.learning_rate if rate is None else rate for part, rate in own.items()}


def parameter_groups(model, rate_of: dict[str, float], weight_decay: float) -> list[dict]:
    """For an optimizer: a group for each rate, with and without weight decay. Biases and norms
    (everything of one dimension) do not decay."""
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has spread it
        decay = weight_decay if len(shape) > 1 else 0.0
        rate = rate_of[part_of(name)]
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def counted(model) -> dict[str, dict]:
    """part -> {"tensors", "parameters", "trained_tensors", "trained_parameters"}."""
    empty = {"tensors": 0, "parameters": 0, "trained_tensors": 0, "trained_parameters": 0}
    found = {part: dict(empty) for part in IN_WORDS}
    for name, parameter in model.named_parameters():
        if BEFORE in name:
            continue
        row = found[_in_words(name)]
        size = getattr(parameter, "ds_numel", parameter.numel())
        row["tensors"] += 1
        row["parameters"] += size
        if parameter.requires_grad:
            row["trained_tensors"] += 1
            row["trained_parameters"] += size
    return {part: row for part, row in found.items() if row["tensors"]}


def _in_words(name: str) -> str:
    if ".lora_" not in name:
        return part_of(name)
    return "tower's adapter" if VISION in name else "adapter"


def table(model, rate_of: dict[str, float]) -> str:
    """What trains, in lines to print before the first step."""
    lines = [f"  {'part':15} {'trained tensors':>17} {'trained parameters':>28}   learning rate"]
    of_adapters = {"tower's adapter": "vision tower", "adapter": "language model"}
    for part, row in counted(model).items():
        rate = rate_of[of_adapters.get(part, part)]
        tensors = f"{row['trained_tensors']:,} of {row['tensors']:,}"
        size = f"{row['trained_parameters']:,} of {row['parameters']:,}"
        told = f"{rate:g}" if row["trained_tensors"] else "-"
        lines.append(f"  {part:15} {tensors:>17} {size:>28}   {told}")
    return "\n".join(lines)


# ---- on disk -------------------------------------------------------------------------------------


def save_trained(model, folder: str | Path) -> None:
    """What trains and nothing else, by the names of the model's attributes: a checkpoint of the
    projector is a few MB, and the Trainer's resume looks for these names."""
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})


def general_name(name: str) -> str:
    """A tensor's name in a LLaVA file of any age, as today's models call it. (What ZeRO-3 has
    gathered is saved with one `model.` too many.)"""
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.(model\.)*lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.(model\.)+", "language_model.", name)
    return name.replace(f"{VISION}.vision_model.", f"{VISION}.")


def put_back_frozen(folder: Path, base: Path, trained: Iterable[str]) -> None:
    """In a saved folder every tensor gets the base's name and dtype again, and those that did not
    train the base's values to the last bit: an engine may have rounded them to its half dtype.

    trained: names of the model's parameters that did train.
    """
    moved = {general_name(name) for name in trained}
    weights = Weights(base)
    known = {general_name(name): name for name in weights}
    renamed = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            general = general_name(name)
            renamed[name] = known.get(general, name)
            stored = weights[known[general]] if general in known else tensor
            tensors[renamed[name]] = tensor.to(stored.dtype) if general in moved else stored
        with atomic_file(file) as part:
            save_file(tensors, part, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        places = content["weight_map"]
        content["weight_map"] = {renamed[name]: place for name, place in places.items()}
        with atomic_file(index) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _put_back_dtype(folder / "config.json", base / "config.json")


def _put_back_dtype(file: Path, of_base: Path) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    known = json.loads(of_base.read_text(encoding="utf-8"))
    for part in (settings, settings.get("text_config"), settings.get("vision_config")):
        if part is not None:
            part["dtype"] = known.get("dtype") or known.get("torch_dtype") or "float32"
    with atomic_file(file) as part:
        part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
