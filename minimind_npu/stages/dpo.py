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
from tqdm.auto import tqdm

from common import cli, device
from common.data.labels import encode_chat
from common.fast import losses

KIND = "preference"
COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def encode(row: dict, tokenizer, max_length: int) -> dict | None:
    """A canonical pair -> tokens and labels of both sides, max_length tokens together; labels on
    the last answer."""
    sides, cut = {}, False
    for side in ("chosen", "rejected"):
        found = encode_chat(tokenizer, row["prompt"] + row[side], max_length // 2)
        if found is None:
            return None
        last = max(i for i, label in enumerate(found["labels"]) if label != -100)
        start = last
        while start and found["labels"][start - 1] != -100:
            start -= 1
        labels = [-100] * start + found["labels"][start:]
        sides |= {f"{side}_input_ids": found["input_ids"], f"{side}_labels": labels}
        cut |= found["truncated"]
    return sides | {"truncated": cut}


def log_probs(model, batch: dict) -> torch.Tensor:
    """Summed log-probs of the answers, fp32 [pairs, 2]: chosen, rejected."""
    sums = losses.sequence_logprobs(
        model, labels=batch["labels"], **{name: batch[name] for name in INPUTS}
    )
    return sums[: batch["documents"]].view(-1, 2)


def loss(model, batch: dict, items: float, beta: float):
    """-> (loss of the batch as its part of a step with `items` pairs, sums over this batch).

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
    seen = margin.detach()
    right = (seen > 0).float().sum() + 0.5 * (
        seen == 0
    ).float().sum()  # a tie, as before the first step, is half
    sums = {
        "nll": each.detach().sum(),
        "accuracy": right,
        "margin": seen.sum(),
        "count": seen.new_tensor(len(seen)),
    }
    return each.sum() / items, sums


def metrics(sums: dict) -> dict:
    """Sums over the held-out pairs -> {"loss", "accuracy", "margin"}."""
    count = max(1.0, sums["count"])
    return {
        "loss": sums["nll"] / count,
        "accuracy": sums["accuracy"] / count,
        "margin": sums["margin"] / count,
    }


@torch.no_grad()
def reference(model, loader, dtype: torch.dtype, file: Path, *about) -> torch.Tensor:
    """Log-probs of all rows under the model as it is now, [rows, 2] on the CPU; all ranks compute
    their part.

    file: where they are kept for a run that is continued; `about` names what they were computed
        from.
    """
    about = json.dumps([*about, str(dtype), loader.windows, loader.world], default=str)
    kept = kept_reference(file, about)
    if kept is not None:
        return kept
    values, was_training = torch.zeros(len(loader.rows), 2), model.training
    model.eval()
    for batch in tqdm(loader.all(), desc="reference", disable=None if cli.is_main() else True):
        with device.autocast(dtype):
            found = log_probs(model, batch)
        values[batch["row_ids"]] = found.float().cpu()
    model.train(was_training)
    if loader.world > 1:  # each row is on one rank, and 0 on the others
        shared = values.to(loader.where)
        dist.all_reduce(shared)
        values = shared.cpu()
    if cli.is_main():
        save_file({"log_probs": values}, file, {"about": about})
    return values


def kept_reference(file: Path, about: str) -> torch.Tensor | None:
    """What an earlier start of this run kept; None where it is another's, or torn."""
    try:
        with safe_open(file, "pt") as kept:
            return kept.get_tensor("log_probs") if kept.metadata() == {"about": about} else None
    except (OSError, SafetensorError):
        return None
