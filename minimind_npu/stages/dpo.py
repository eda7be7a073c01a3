"""Direct preference optimisation (Rafailov et al. 2023): prefer the chosen answer, relative to the
model at the start.

Loss: -log sigmoid(beta * ((log pi(w) - log ref(w)) - (log pi(l) - log ref(l)))), log-probs summed
over the answer's tokens, averaged over the pairs of the step. The reference's log-probs are
computed once, before the first step.
Rows: {"chosen": [messages], "rejected": [messages]} and the other shapes of common/data/shapes.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stages import lora
from stages.pretrain import INPUTS
from torch.nn import functional as F

from common import cli, device
from common.data.labels import encode_chat
from common.data.progress import Progress
from common.data.spelling import IGNORE
from common.fast import losses

KIND = "preference"
COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


# ---- rows ----------------------------------------------------------------------------------------


def encode(row: dict, tokenizer, max_length: int) -> dict | None:
    """A canonical pair -> tokens and labels of both sides, max_length tokens together; labels on
    the last answer."""
    pair = {"truncated": False, "notes": []}
    for side in ("chosen", "rejected"):
        turns = row["prompt"] + row[side]
        found = encode_chat(tokenizer, turns, max_length // 2, row.get("tools"))
        if found is None:
            return None
        pair[f"{side}_input_ids"] = found["input_ids"]
        pair[f"{side}_labels"] = only_last_answer(found["labels"])
        pair["truncated"] |= found["truncated"]
        pair["notes"] += found.get("notes", [])
    return pair


def only_last_answer(labels: list[int]) -> list[int]:
    """The labels of a conversation without those of all answers but the last."""
    start = max(i for i, label in enumerate(labels) if label != IGNORE)
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return [IGNORE] * start + labels[start:]


# ---- loss ----------------------------------------------------------------------------------------


def log_probs(model, batch: dict) -> torch.Tensor:
    """Summed log-probs of the answers, fp32 [pairs, 2]: chosen, rejected."""
    inputs = {name: batch[name] for name in INPUTS}
    sums = losses.sequence_logprobs(model, labels=batch["labels"], **inputs)
    return sums[: batch["documents"]].view(-1, 2)


def loss(model, batch: dict, denominator: float, beta: float):
    """-> (this batch's share of the loss of a step with `denominator` pairs, sums over this batch).

    batch["reference"]: [pairs, 2] log-probs under the reference; without it the model's adapters
        are switched off.
    """
    policy = log_probs(model, batch)
    if "reference" in batch:
        reference = batch["reference"]
    else:
        with torch.no_grad(), lora.switched_off(model):
            reference = log_probs(model, batch)
    gained = policy - reference
    margin = beta * (gained[:, 0] - gained[:, 1])
    each = -F.logsigmoid(margin)

    margin = margin.detach()
    ties = (margin == 0).float().sum()  # all of them before the first step: half right
    sums = {
        "nll": each.detach().sum(),
        "accuracy": (margin > 0).float().sum() + 0.5 * ties,
        "margin": margin.sum(),
        "count": margin.new_tensor(len(margin)),
    }
    return each.sum() / denominator, sums


def metrics(sums: dict) -> dict:
    """Sums over the held-out pairs -> {"loss", "accuracy", "margin"}."""
    count = max(1.0, sums["count"])
    return {
        "loss": sums["nll"] / count,
        "accuracy": sums["accuracy"] / count,
        "margin": sums["margin"] / count,
    }


# ---- the reference -------------------------------------------------------------------------------


@torch.no_grad()
def reference(model, loader, dtype: torch.dtype, file: Path, computed_from: str) -> torch.Tensor:
    """Log-probs of all rows under the model as it is now, [rows, 2] on the CPU; all ranks compute
    their share.

    file: where they are kept for a run that is continued; computed_from: names the weights and the
        rows, so that others are not taken for them.
    """
    key = json.dumps([computed_from, str(dtype), loader.windows, loader.world])
    kept = kept_reference(file, key)
    if kept is not None:
        return kept
    values = torch.zeros(len(loader.rows), 2)
    was_training = model.training
    model.eval()
    with Progress("reference", total=len(loader.rows), unit="pairs") as progress:
        for batch in loader.all():
            with device.autocast(dtype):
                found = log_probs(model, batch)
            values[batch["row_ids"]] = found.float().cpu()
            progress.update(len(batch["row_ids"]) * loader.world)
    model.train(was_training)
    if loader.world > 1:  # each row is on one rank, and 0 on the others
        cli.wait_for_all("it computes reference log-probs")
        shared = values.to(loader.where)
        dist.all_reduce(shared)
        values = shared.cpu()
    if cli.is_main():
        save_file({"log_probs": values}, file, {"key": key})
    return values


def kept_reference(file: Path, key: str) -> torch.Tensor | None:
    """What an earlier start of this run kept; None where it is another's, or incomplete."""
    try:
        with safe_open(file, "pt") as kept:
            if kept.metadata() == {"key": key}:
                return kept.get_tensor("log_probs")
    except (OSError, SafetensorError):
        pass
    return None


def add_references(args, training, model, loaders: dict, computed_from: str) -> None:
    """The log-probs of the model as it is now, into the batches of its loaders, where --reference
    cached of stage dpo wants them.

    computed_from: names the weights and the rows.
    """
    if args.stage != "dpo" or args.reference != "cached":
        return
    computed_from = f"{computed_from} {args.eval_ratio}"
    dtype = device.train_dtype(training)
    for name, loader in loaders.items():
        if loader is not None:
            file = Path(training.output_dir, f"reference_{name}.safetensors")
            loader.extra["reference"] = reference(model, loader, dtype, file, computed_from)
