"""The memory that training takes, by formulas.

Counted are the weights, their gradients, the optimizer's states and what the layers keep for the
backward pass, for the recipes as they train: attention in blocks, losses in chunks of the
vocabulary (common/fast). Not counted: generation before and after, a driver's own memory,
fragmentation. tests/core/test_memory_plan.py holds it to what is measured.

Sizes are bytes, of one card (or one process of a CPU) unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

GIB = 2**30
BUCKET = 2e8  # elements of each of ZeRO's two buckets
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at most
# as in common.fast.losses: elements of a chunk of logits and its rows; those on a CPU
LOGITS = 2**27
FEWEST_ROWS = 256
MOST_ROWS = 2**14
CPU_ROWS = 512
# as in common.fast.softmax: elements of its float32 buffer on a CPU, where it is compiled elsewhere
CPU_SOFTMAX = 2**19
COMPILED_VOCABULARY = 4096
FOUR_BIT = 0.516  # bytes of a weight in NF4, its scales quantised too
# transformers' names; the configs of older types map theirs to these
NAMES = ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
NAMES += ["hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"]
NAMES += ["tie_word_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size"]
NAMES += ["n_shared_experts"]
FUSED = ("query_key_value", "qkv", "W_pack", "c_attn")  # names of one matrix for all three


# ---- the model -----------------------------------------------------------------------------------


def config_facts(config) -> dict:
    """NAMES from a transformers config, None where it has none of them."""
    text = config.get_text_config()
    facts = {name: getattr(text, name, None) for name in NAMES}
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    facts["num_experts"] = facts["num_experts"] or getattr(text, "n_routed_experts", None)
    if not facts["head_dim"] and facts["num_attention_heads"] and facts["hidden_size"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    return facts


def weight_facts(shapes: dict[str, Sequence[int]], tied: bool) -> dict:
    """What the names and shapes of the weights tell.

    tied: the head is the table of tokens, also where the file has it twice.
    Returns:
        parameters; matrices: elements of weights with 2 dimensions or more that are no table of
        tokens; sides: their inputs + outputs, which LoRA multiplies by its rank; and how a layer
        is built.
    """
    tables = [n for n in shapes if len(shapes[n]) == 2 and ("embed" in n or "wte" in n)]
    heads = [n for n in shapes if "lm_head" in n]
    stored_twice = sum(prod(shapes[n]) for n in heads) if tied and tables else 0
    matrices = matrices_of(shapes)
    # configs of dense models may name a number of experts too
    no_experts = {} if any("experts" in n for n in shapes) else {"num_experts": None}
    return no_experts | {
        "parameters": sum(map(prod, shapes.values())) - stored_twice,
        "matrices": sum(map(prod, matrices.values())),
        "sides": sides(matrices),
        "normed_queries": any("q_norm" in n or "query_layernorm" in n for n in shapes),
        "gated": any("gate_proj" in n or "gate_up" in n for n in shapes),
        "fused_queries": any(name in n for n in shapes for name in FUSED),
        "layer_norm": any("norm" in n and n.endswith("bias") for n in shapes),
    }


def matrices_of(shapes: dict[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Those of the layers, without tables of tokens and heads."""
    outside = ("lm_head", "embed", "wte")
    return {
        n: shape
        for n, shape in shapes.items()
        if len(shape) >= 2 and not (len(shape) == 2 and any(name in n for name in outside))
    }


def sides(matrices: dict[str, Sequence[int]]) -> int:
    """Inputs + outputs of all of them."""
    return sum(prod(shape[:-2]) * (shape[-1] + shape[-2]) for shape in matrices.values())


def adapted(shapes: dict[str, Sequence[int]], targets: str) -> dict[str, Sequence[int]]:
    """The matrices that get an adapter; targets: all-linear, or names of layers with commas."""
    matrices = matrices_of(shapes)
    matrices = {name: shape for name, shape in matrices.items() if len(shape) == 2}
    if targets == "all-linear":
        return matrices
    ends = tuple(f".{name.strip()}.weight" for name in targets.split(","))
    return {name: shape for name, shape in matrices.items() if f".{name}".endswith(ends)}


# ---- how it is trained ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """What a model has around its language model, a vision tower, say.

    frozen: bytes of weights that stand still; trained: parameters that do not; kept: bytes that
    these parts keep for the backward pass; before: bytes that they hold until the language model
    begins.
    """

    frozen: float = 0
    trained: float = 0
    kept: float = 0
    before: float = 0


@dataclass(frozen=True)
class Setup:
    """All of a run that its memory depends on.

    engine: as runs.engine names them; half: it computes in bf16 or fp16; adapter: parameters of a
    LoRA adapter, 0: all weights are trained; adapter_ranks: its rank times the matrices that it
    stands on; adapts_mlp: some are of the feed-forward layers;
    frozen_layers: of the first, with the table of tokens; accumulates: several micro-batches a
    step; casts_once: under autocast a weight is cast once a step, and the input of a layer once
    for all its readers; compiles: device.compile_pays(); offload: "optimizer" and "weights" that
    lie in host memory; step_copies: float32 copies of the trained weights that the optimizer makes
    at its step; references: frozen models beside the trained one; passes_through: the language
    model itself stands still, and gradients go through it to what is beside it; stored: bytes of an
    element of what stands still, 0: as it is computed with; fast_norms: under
    norms.use_fast_norms; last_at_labels: of the last layer only keys and values are computed
    everywhere.
    """

    tokens: int  # of a micro-batch
    engine: str = "single"
    cards: int = 1
    half: bool = True
    adapter: int = 0
    adapter_ranks: int = 0
    adapts_mlp: bool = True
    frozen_layers: int = 0
    recompute: bool = False
    accumulates: bool = True
    casts_once: bool = False
    on_cpu: bool = False
    compiles: bool = False
    four_bit: bool = False
    offload: frozenset[str] = frozenset()
    step_copies: int = 0
    references: int = 0
    passes_through: bool = False
    stored: int = 0
    fast_norms: bool = False
    last_at_labels: bool = False
    beside: Beside = Beside()

    @property
    def stands_still(self) -> bool:
        """The language model's own weights, whatever trains on them or beside them."""
        return bool(self.adapter) or self.passes_through

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def spreads_weights(self) -> bool:
        return self.engine == "zero-3"

    @property
    def autocasts(self) -> bool:
        """Products are cast one by one; DeepSpeed's weights have the half dtype themselves."""
        return self.half and not self.is_zero

    @property
    def norms_keep_inputs(self) -> bool:
        """And nothing else, as norms.use_fast_norms lets them on a CPU."""
        return self.fast_norms and self.on_cpu

    @property
    def masters_in_use(self) -> bool:
        """The float32 weights are those that the forward casts from."""
        return self.autocasts and (not self.stands_still or self.stored == 4)


@dataclass(frozen=True)
class Need:
    """Bytes of a card, and of the host for all of its cards together."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # with the head's part, and what a layer's backward takes beside them
    peak: float  # the highest sum at any time of a step
    host: float = 0  # what offloading takes there

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        return ", ".join(f"{name} {gib(getattr(self, name))}" for name in parts)


def gib(size: float) -> str:
    """Bytes for people: GiB, small ones in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


# ---- weights, gradients, optimizer ---------------------------------------------------------------


def states(facts: dict, how: Setup) -> dict[str, float]:
    """weights, gradients, optimizer; copies: of weights in the half dtype during a forward;
    buffers: at all times; step: at the step only."""
    frozen = facts["parameters"] if how.stands_still else frozen_parameters(facts, how)
    trained = how.adapter or facts["parameters"] - frozen
    trained += how.beside.trained
    stored = 2 if how.half and (how.stands_still or how.is_zero) else 4
    stored = how.stored or stored
    base = stored * frozen + how.beside.frozen
    if how.four_bit:
        base -= (stored - FOUR_BIT) * facts["matrices"]
    base += how.references * (2 if how.half else 4) * facts["parameters"]
    if how.is_zero:
        return zero_states(how, base, trained, facts["parameters"])
    copies = 0
    if how.autocasts:
        copies = 2 * (how.adapter + how.beside.trained)
        if how.masters_in_use:
            copies += 2 * (facts["matrices"] + table(facts))
    return {
        "weights": base + 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "copies": copies,
        "buffers": 4 * trained if how.cards > 1 else 0,  # DDP's buckets
        "step": 4 * trained * how.step_copies,
    }


def zero_states(how: Setup, frozen: float, trained: float, parameters: float) -> dict[str, float]:
    """The same under ZeRO; frozen: bytes of weights that are not trained."""
    size = 2 if how.half else 4
    shard = trained / how.cards
    weights = frozen + size * trained
    # a CPU gives memory to what is written only
    live = 2 * size * (min(BUCKET, trained) if how.on_cpu else BUCKET)
    if how.spreads_weights:
        weights /= how.cards
        spread = how.cards > 1 or "weights" in how.offload
        live = size * min(parameters, LIVE) * spread
    at_step = min(shard, LIVE) if how.spreads_weights else shard
    return {
        "weights": weights,
        "gradients": size * shard,
        "optimizer": 12 * shard,
        "copies": 0,
        "buffers": live,
        "step": 4 * at_step,
    }


def frozen_parameters(facts: dict, how: Setup) -> float:
    """Of --freeze_layers: the first layers and the table of tokens."""
    if not how.frozen_layers:
        return 0
    share = how.frozen_layers / facts["num_hidden_layers"]
    return table(facts) + share * facts["matrices"]


def table(facts: dict) -> int:
    """Elements of the embedding, and of the head."""
    return (facts["vocab_size"] or 0) * (facts["hidden_size"] or 0)


# ---- activations ---------------------------------------------------------------------------------


def has_shapes(facts: dict) -> bool:
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    return all(facts[name] is not None for name in names)


def feed_forward(facts: dict) -> int:
    """Width of what a token goes through, all its experts together."""
    width = facts["intermediate_size"] or facts["moe_intermediate_size"] or 4 * facts["hidden_size"]
    if facts["num_experts"] and facts["num_experts_per_tok"]:
        experts = facts["num_experts_per_tok"] + (facts.get("n_shared_experts") or 0)
        width = (facts["moe_intermediate_size"] or width) * experts
    return width


def stream(how: Setup) -> int:
    """Bytes of a number of the residual stream: of the weights in use."""
    return 4 if how.masters_in_use or not how.half else 2


def norm_bytes(facts: dict, how: Setup, readers: int) -> int:
    """What a norm and the `readers` layers behind it keep, for each number of its input."""
    size = 2 if how.half else 4
    given = stream(how)  # its input
    normed = 0  # before it is multiplied by the weight, which wants it where it is trained
    if not facts["layer_norm"] and not how.norms_keep_inputs:
        given = 4  # computed in float32
        normed = 0 if how.stands_still else stream(how)
    out = size if readers else 0
    if how.autocasts:  # each reader casts its own copy
        out *= min(readers, 1) if how.casts_once else readers
    return given + normed + out


def layer_bytes(facts: dict, how: Setup) -> float:
    """What a layer keeps of one token for the backward pass."""
    size = 2 if how.half else 4
    h = facts["hidden_size"]
    q = facts["num_attention_heads"] * facts["head_dim"]
    k = facts["num_key_value_heads"] * facts["head_dim"]
    f = feed_forward(facts)
    attention = size * (2 * q + 2 * k)  # queries, keys, values, and what comes out
    if facts["normed_queries"] and how.norms_keep_inputs:
        attention += size * (q + k)
    elif facts["normed_queries"]:
        attention += (4 if how.stands_still else 4 + size) * (q + k)
    if how.adapter and how.autocasts:
        attention += size * q  # the adapter's own copy
    mlp = size * f * (4 if facts["gated"] else 2)
    readers = 1 if facts["fused_queries"] else 3
    mlp_readers = 2 if facts["gated"] else 1
    if how.passes_through or not how.adapts_mlp:
        mlp -= size * f  # the input of a frozen matrix is not needed
        mlp_readers = 0
    norms = norm_bytes(facts, how, 0 if how.passes_through else readers) * h
    norms += norm_bytes(facts, how, mlp_readers) * h
    if facts["num_experts"] and facts["num_experts_per_tok"]:
        # tokens as they are sent to experts and come back
        norms += 2 * size * h * facts["num_experts_per_tok"]
    ranks = size * how.adapter_ranks / facts["num_hidden_layers"]
    return norms + attention + mlp + ranks


def backward_bytes(facts: dict, how: Setup) -> float:
    """What the backward pass of one layer holds beside that, of one token: gradients of the
    stream and inside the feed-forward part."""
    size = 2 if how.half else 4
    inside = 3 if facts["gated"] else 2
    return 2 * stream(how) * facts["hidden_size"] + inside * size * feed_forward(facts)


def kept(facts: dict, how: Setup) -> float:
    """All layers together."""
    layers = facts["num_hidden_layers"] - how.frozen_layers
    if how.recompute:
        return how.tokens * layers * stream(how) * facts["hidden_size"]
    if how.last_at_labels:  # which are few
        layers -= 1
    return how.tokens * layers * layer_bytes(facts, how)


def head_kept(facts: dict, how: Setup) -> float:
    """What the last norm and the head keep: hidden states, and the gradients of them and of the
    head's weight, which are computed in the forward pass."""
    size = 2 if how.half else 4
    weight = 0
    if not how.stands_still:
        weight = (2 if how.half and how.is_zero else 4) * table(facts)
    return how.tokens * facts["hidden_size"] * (8 + 2 * size) + weight


def head_work(facts: dict, how: Setup) -> float:
    """A chunk of logits and, unless it is compiled, its softmax in float32."""
    size = 2 if how.half else 4
    vocabulary = facts["vocab_size"] or 0
    if how.on_cpu:
        rows = min(how.tokens, CPU_ROWS)
        return size * rows * vocabulary + 4 * CPU_SOFTMAX
    rows = min(MOST_ROWS, max(FEWEST_ROWS, LOGITS // max(1, vocabulary)))
    if how.compiles and vocabulary >= COMPILED_VOCABULARY:
        return size * rows * vocabulary
    return (size + 4) * min(how.tokens, rows) * vocabulary


# ---- all of it -----------------------------------------------------------------------------------


def estimate(facts: dict, how: Setup) -> Need:
    """Activations are left out where the config does not tell the shapes."""
    parts = states(facts, how)
    host = 0.0
    if "optimizer" in how.offload:
        host += parts["optimizer"] + parts["gradients"]
        parts["optimizer"] = parts["gradients"] = parts["step"] = 0
    if "weights" in how.offload:
        host += parts["weights"]
        parts["weights"] = 0

    always = parts["weights"] + parts["optimizer"] + parts["buffers"]
    at_step = always + parts["gradients"] + parts["step"]
    # kept from one micro-batch to the next; else they grow while activations go
    if how.accumulates or how.cards > 1 or how.is_zero:
        always += parts["gradients"]
    if not has_shapes(facts):
        return need_of(parts, 0, max(always, at_step), host, how.cards)

    body = kept(facts, how) + how.beside.kept
    head = head_kept(facts, how)
    forward = body + head + parts["copies"] + head_work(facts, how)
    backward = body + head + how.tokens * backward_bytes(facts, how)
    if how.recompute:
        backward += how.tokens * layer_bytes(facts, how)
    if how.casts_once or not how.recompute:
        backward += parts["copies"]
    activations = max(forward, backward, how.beside.before)
    peak = max(always + activations, at_step)
    return need_of(parts, activations, peak, host, how.cards)


def need_of(
    parts: dict[str, float], activations: float, peak: float, host: float, cards: int
) -> Need:
    return Need(
        weights=parts["weights"],
        gradients=parts["gradients"],
        optimizer=parts["optimizer"],
        activations=activations,
        peak=peak,
        host=host * cards,
    )
