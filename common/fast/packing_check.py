"""Do the documents of a packed row see each other in this very model? Asked once before step 1,
since no list of architectures is complete."""

from __future__ import annotations

import torch
from accelerate.utils import send_to_device

from common.collators import PackedCollator
from common.data.counts import for_model
from common.data.spelling import IGNORE
from common.fast import losses

# the share of a document's loss, at least 1 a label, that rounding may change ...
BEHIND_ANOTHER = {"float32": 1e-5, "half": 3e-3}  # where the one before it is another ...
ALONE = {"float32": 1e-3, "half": 2e-2}  # ... and where there is none
FEWEST_TOKENS = 8  # of a document that is looked at


def shortest_two(rows: list[dict]) -> list[dict]:
    """The shortest rows that can serve, the last with a label; [] where the data has none."""
    fit = [row for row in rows if len(row["input_ids"]) >= FEWEST_TOKENS]
    fit.sort(key=lambda row: len(row["input_ids"]))
    learned = [row for row in fit if any(label != IGNORE for label in row["labels"][1:])]
    if len(fit) < 2 or not learned:
        return []
    last = learned[0]
    first = next(row for row in fit if row is not last)
    return [first, last]


def with_another_end(row: dict) -> dict:
    """The row with a repetition of its first token in place of its last eight."""
    ids = list(row["input_ids"])
    count = min(8, len(ids) // 2)
    return {**row, "input_ids": [*ids[:-count], *[ids[0]] * count]}


def unlearned(row: dict) -> dict:
    return {**row, "labels": [IGNORE] * len(row["labels"])}


@torch.no_grad()
def refuse_leaks(trainer, rows: list[dict]) -> None:
    """SystemExit where the loss of a document depends on what stands before it in its packed row.
    All ranks call it, with the same rows.

    rows: {"input_ids", "labels"} of the data; nothing is checked where they are too few.
    """
    pair = shortest_two(rows)
    if not pair:
        return
    first, last = unlearned(pair[0]), pair[1]
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    try:
        behind = loss_of(trainer, model, [first, last])
        behind_another = loss_of(trainer, model, [with_another_end(first), last])
        alone = loss_of(trainer, model, [last])
    except (AttributeError, TypeError) as error:  # of a model that handles masks itself
        raise SystemExit(refusal(model, f"cannot be run on a packed row ({error})")) from None
    finally:
        model.train(was_training)
    precision = "float32" if trainer.compute_dtype() == "float32" else "half"
    # what is known by heart has a loss of nearly 0, and rounding changes that many times over
    scale = max(abs(alone), sum(label != IGNORE for label in last["labels"][1:]))
    if abs(behind - behind_another) > BEHIND_ANOTHER[precision] * scale:
        raise SystemExit(refusal(model, "looks from one packed row into the next"))
    if abs(behind - alone) > ALONE[precision] * scale:
        difference = f"gives a row another loss when packed ({behind:.4f}, alone {alone:.4f})"
        raise SystemExit(refusal(model, difference))


def loss_of(trainer, model, rows: list[dict]) -> float:
    """Sum over the labels of one packed row."""
    batch = for_model(PackedCollator()([rows]))
    with trainer.compute_loss_context_manager():
        output = model(**send_to_device(batch, trainer.args.device))
    return losses.loss_counts(output)[0].item()


def refusal(model, what: str) -> str:
    inner = model
    while hasattr(inner, "module"):  # DDP, DeepSpeed
        inner = inner.module
    return f"{type(inner).__name__} {what}: use --packing false"
