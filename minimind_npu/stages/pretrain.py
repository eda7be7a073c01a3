"""Pre-training: predict the next token of every document.

Loss: cross entropy summed over label tokens / the label tokens of the whole step, plus the balance
of experts.
Rows: {"text"}; a document is <|im_start|> text <|im_end|>, cut into equal pieces where it is longer
than the window.
"""

from __future__ import annotations

import json
import math

from common.fast import losses

KIND = "text"
COLUMNS = ("input_ids",)
INPUTS = (
    "input_ids",
    "position_ids",
    "token_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def encode(row: dict, tokenizer, max_length: int) -> list[dict]:
    """A document -> pieces {"input_ids": [T]}, T <= max_length, none of a single token."""
    ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    pieces = math.ceil(len(ids) / max_length)
    size = math.ceil(len(ids) / pieces)
    cut = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [{"input_ids": piece} for piece in cut if len(piece) > 1]


def loss(model, batch: dict, denominator: float):
    """-> (this batch's share of the loss of a step with `denominator` label tokens, sums over this
    batch).

    model: under losses.use_chunked_loss, which computes logits at label positions only, chunk by
        chunk.
    """
    inputs = {name: batch[name] for name in INPUTS}
    out = model(**inputs, labels=batch["labels"], num_items_in_batch=denominator)
    nll, correct, count = losses.loss_counts(out).unbind()
    sums = {"nll": nll, "correct": correct, "count": count}
    return out.loss + balance(out.aux_loss, count, denominator), sums


def balance(aux_loss, count, denominator: float):
    """The balance of the experts, weighted by this batch's share of the step."""
    return aux_loss * (count / denominator)


def metrics(sums: dict) -> dict:
    """Sums over the held-out rows -> {"loss", "perplexity", "token_accuracy"}, the last one where
    right tokens were counted."""
    mean = sums["nll"] / sums["count"]
    found = {"loss": mean, "perplexity": math.exp(min(mean, 50))}
    if "correct" in sums:
        found["token_accuracy"] = sums["correct"] / sums["count"]
    return found


def text_bytes(eval_rows, eval_ids) -> int:
    """UTF-8 bytes of the held-out texts (rows as read) that were encoded: what bits per byte divide
    by."""
    encoded = set(eval_ids["source"])
    texts = [json.loads(row["row"])["text"] for row in eval_rows if row["source"] in encoded]
    return sum(len(text.encode()) for text in texts)
