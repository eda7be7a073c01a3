"""One number for a pre-training: --depth says width and heads, tokens, steps and learning rates.

    python minimind_npu/road/dial.py --vocab_size 6400          # the table of README.md

The rules are nanochat's (Karpathy 2025), tuned there at depths 12 to 24 on English text; with the
network of MiniMind they are a guess. What somebody types is never changed: the rest follows it.

    width       64 a layer, up to a multiple of the 128 numbers of a head
    tokens      --tokens_per_parameter (12) of the blocks' matrices and the head
    batch       2^19 tokens at depth 12, growing with the tokens to the power 0.383, a power of 2
    rates       with the root of the batch; of AdamW also with the root of 768 / width
    decay       with the root of the batch, against the tokens; below depth 8, where that would be
                far too much, it is 0.1 as everywhere in this recipe
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this folder
from common import cli, device  # noqa: I001  (device before torch and transformers)

import defaults
import torch
import weights
from loop import tracking

from common.callbacks import clock
from common.runs import memory_check
from common.runs.memory_plan import GIB

TOKENS_PER_PARAMETER = 12.0
REFERENCE_DEPTH = 12
REFERENCE_WIDTH = 768
REFERENCE_BATCH = 2**19  # tokens of a step at the reference
BATCH_POWER = 0.383
MUON_RATE = 0.02  # of the matrices at the reference
ADAMW_RATES = {  # at the reference: of the table of tokens, of a head that is none
    # 1e-3, the rate of this recipe, at its usual steps of 16,384 tokens
    "minimind": (0.0057, 0.0057),
    "nanochat": (0.3, 0.008),
}
WEIGHT_DECAY = 0.1  # at the reference
DECAY_FROM_DEPTH = 8
# of a large product's speed, what a step is taken to reach before one was made
SHARE_OF_PEAK = 0.4
# on a CPU in half precision products are the smaller part of a step: with AMX they are ten times as
# fast as in float32, what stands between them is not. Depth 4 reached 3 to 12 % on an Intel Xeon
SHARE_IN_HALF_ON_CPU = 0.05
DEPTHS = (4, 6, 8, 12, 16, 20, 24, 32)


# ---- sizes ---------------------------------------------------------------------------------------


def sizes_of(depth: int) -> dict:
    """Width, layers and heads, as configs name them."""
    width = weights.width_of_depth(depth)
    heads = width // weights.HEAD_DIM
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


@dataclass(frozen=True)
class Count:
    """Parameters of a model: all, those in matrices of the blocks, those of the head."""

    total: int
    matrices: int
    head: int

    @property
    def scaled(self) -> int:
        """Those that the number of tokens follows."""
        return self.matrices + self.head


def count(config) -> Count:
    shapes = memory_check.shapes_of(config)
    matrices = 0
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) == 2:
            matrices += prod(shape)
    return Count(sum(map(prod, shapes.values())), matrices, config.vocab_size * config.hidden_size)


def flops_of_token(config, counted: Count, window: int) -> float:
    """Forward and backward of a token: 6 per parameter that is multiplied with (Kaplan et al.
    2020), and attention over half the window on average."""
    attention = 6 * config.num_hidden_layers * config.hidden_size * window
    return 6 * counted.scaled + attention


# ---- how long and how fast -----------------------------------------------------------------------


def batch_of(tokens: float, reference_tokens: float) -> int:
    """Tokens of a step of a run over so many."""
    wanted = REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_POWER
    return 2 ** round(math.log2(wanted))


def rates_of(arch: str, width: int, batch: int) -> dict:
    """Peak learning rates by the names of their flags, for a width and the tokens of a step."""
    by_batch = math.sqrt(batch / REFERENCE_BATCH)
    by_width = math.sqrt(REFERENCE_WIDTH / width)
    table, head = ADAMW_RATES[arch]
    return {
        "muon_lr": MUON_RATE * by_batch,
        "learning_rate": table * by_batch * by_width,
        "head_lr": head * by_batch * by_width,
    }


def weight_decay_of(depth: int, batch: int, tokens: float, reference_tokens: float) -> float:
    if depth < DECAY_FROM_DEPTH:
        return WEIGHT_DECAY
    return WEIGHT_DECAY * math.sqrt(batch / REFERENCE_BATCH) * reference_tokens / tokens


@dataclass(frozen=True)
class Budget:
    """Of a run: tokens in all, of a step, steps, FLOP."""

    tokens: int
    batch: int
    steps: int
    flops: float


# ---- for train.py --------------------------------------------------------------------------------


def turn(args, training, vocab_size: int) -> None:
    """Fill in what --depth says and nobody has typed, and print it. Call when the tokenizer is
    known and before batches are cut for a device; without --depth nothing happens.

    args, training: of settings.parse_args, which has set the sizes; changed in place.
    """
    if not args.depth:
        return
    config = weights.config_of("depth", args, vocab_size)
    counted = count(config)
    reference_tokens = TOKENS_PER_PARAMETER * reference(args.arch, vocab_size).scaled
    wanted = args.tokens_per_parameter * counted.scaled
    batch = set_batch(args, training, batch_of(wanted, reference_tokens))
    steps = set_steps(training, wanted, batch)
    tokens = steps * batch if steps else wanted
    set_rates(args, training, rates_of(args.arch, config.hidden_size, batch))
    if not cli.given_by_user("weight_decay"):
        training.weight_decay = weight_decay_of(args.depth, batch, tokens, reference_tokens)
    flops = tokens * flops_of_token(config, counted, args.model_max_length)
    tell(args, training, config, counted, Budget(round(tokens), batch, steps, flops))


def reference(arch: str, vocab_size: int) -> Count:
    """The model that the rules were tuned at, with this vocabulary."""
    sizes = sizes_of(REFERENCE_DEPTH)
    return count(weights.config_of_sizes(arch, vocab_size, sizes, window=0))


def set_batch(args, training, wanted: int) -> int:
    """Windows of a step on each device; -> tokens of a step in all."""
    by_hand = ("per_device_train_batch_size", "gradient_accumulation_steps")
    window_of_all = args.model_max_length * training.world_size
    if not any(map(cli.given_by_user, by_hand)):
        training.per_device_train_batch_size = max(1, wanted // window_of_all)
        training.gradient_accumulation_steps = 1
        defaults.fit_batches_to_cpu(args, training)
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return windows * window_of_all


def set_steps(training, wanted: float, batch: int) -> int:
    """-> steps of the run, 0 where epochs say how long it is."""
    if cli.given_by_user("num_train_epochs") and training.max_steps <= 0:
        return 0
    if training.max_steps <= 0:
        training.max_steps = max(1, round(wanted / batch))
    return training.max_steps


def set_rates(args, training, rates: dict) -> None:
    """The rates that were not typed; one that was takes those of AdamW with it where it is Muon's,
    so that there is one dial."""
    if cli.given_by_user("muon_lr"):
        factor = args.muon_lr / rates["muon_lr"]
        rates = {name: factor * rate for name, rate in rates.items()}
    for name, rate in rates.items():
        if not cli.given_by_user(name):
            setattr(training if name == "learning_rate" else args, name, rate)


def share_of_peak(kind: str, dtype: torch.dtype) -> float:
    """kind: of device."""
    if kind == "cpu" and dtype is not torch.float32:
        return SHARE_IN_HALF_ON_CPU
    return SHARE_OF_PEAK


# ---- what people see -----------------------------------------------------------------------------


def tell(args, training, config, counted: Count, budget: Budget) -> None:
    dtype = device.train_dtype(training)
    peak = training.world_size * tracking.peak_flops(dtype, training.device)
    share = share_of_peak(training.device.type, dtype)
    seconds = budget.flops / (share * peak)
    heads = config.num_attention_heads
    rates = f"AdamW {training.learning_rate:.2g}"
    if args.head_lr and not config.tie_word_embeddings:
        rates += f", head {args.head_lr:.2g}"
    if args.optimizer == "muon":
        rates = f"Muon {args.muon_lr:.2g}, {rates}"
    elif not defaults.muon_runs_here():
        rates += f" (Muon computes in bfloat16, which {device.name()} lacks)"
    steps = f"{budget.steps:,} steps of {budget.batch:,}" if budget.steps else "by epochs"
    per_parameter = budget.tokens / counted.scaled
    cli.say(
        f"depth {args.depth}, {args.arch}: {config.num_hidden_layers} layers, "
        f"{config.hidden_size} wide, {heads} heads; {counted.total:,} parameters, "
        f"{counted.matrices:,} in matrices, {counted.head:,} in the head\n"
        f"  tokens   {budget.tokens:,}, {per_parameter:.3g} for each parameter of matrices and "
        f"head; {steps}\n"
        f"  rates    {rates}; weight decay {training.weight_decay:.2g}\n"
        f"  compute  {budget.flops:.2e} FLOP; about {clock(seconds)} at {share:.0%} of "
        f"{peak / 1e12:.3g} TFLOP/s, measured here"
    )


def table(vocab_size: int, window: int) -> list[str]:
    """A Markdown table of DEPTHS for both networks: sizes, length, FLOP and memory without
    activations."""
    lines = [
        "| depth | width | heads | parameters | tokens | batch | steps | FLOP | GiB | "
        "nanochat: parameters | FLOP |",
        f"|{'---:|' * 11}",
    ]
    for depth in DEPTHS:
        cells = [str(depth)]
        for arch in weights.ARCHITECTURES:
            config = weights.config_of_sizes(arch, vocab_size, sizes_of(depth), window)
            counted = count(config)
            reference_tokens = TOKENS_PER_PARAMETER * reference(arch, vocab_size).scaled
            tokens = TOKENS_PER_PARAMETER * counted.scaled
            batch = batch_of(tokens, reference_tokens)
            flops = f"{tokens * flops_of_token(config, counted, window):.1e}"
            parameters = f"{counted.total / 1e6:,.1f} M"
            if arch == "minimind":
                sizes = (config.hidden_size, config.num_attention_heads, parameters)
                cells += [str(one) for one in sizes]
                cells += [f"{tokens / 1e9:.2f} B", f"2^{round(math.log2(batch))}"]
                cells += [f"{round(tokens / batch):,}", flops]
                cells.append(f"{training_bytes(counted) / GIB:.1f}")
            else:
                cells += [parameters, flops]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def training_bytes(counted: Count) -> float:
    """float32 weights and gradients, one moment of Muon, two of AdamW."""
    return 12 * counted.matrices + 16 * (counted.total - counted.matrices)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--vocab_size", type=int, default=6400, help="tokens of the tokenizer")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a row")
    args = parser.parse_args()
    if args.vocab_size < 1 or args.window < 1:
        raise cli.usage_error("--vocab_size and --window: 1 or more")
    print("\n".join(table(args.vocab_size, args.window)))


if __name__ == "__main__":
    cli.run(main)
