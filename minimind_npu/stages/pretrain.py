"""Pre-training: predict the next token of every document.

Loss: cross entropy summed over label tokens / the label tokens of the whole step, plus the balance
of experts.
Rows: {"text"}; a document is <|im_start|> text <|im_end|>, cut into equal pieces where it is longer
than the window.
"""

from __future__ import annotations

import json
import math

KIND, COLUMNS = "text", ("input_ids",)
INPUTS = (
    "input_ids",
    "position_ids",
    "counted",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def encode(row: dict, tokenizer, max_length: int) -> list[dict]:
    """A document -> pieces {"input_ids": [T]}, T <= max_length, none of a single token."""
    ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    size = math.ceil(len(ids) / math.ceil(len(ids) / max_length))
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [{"input_ids": piece} for piece in pieces if len(piece) > 1]


def loss(model, batch: dict, items: float):
    """-> (loss of the batch as its part of a step with `items` label tokens, sums over this batch).

    model: under losses.use_chunked_loss, which computes logits at label positions only, chunk by
        chunk.
    """
    out = model(
        **{name: batch[name] for name in INPUTS}, labels=batch["labels"], num_items_in_batch=items
    )
    nll, correct, count = out.logits[:3].detach().unbind()
    return out.loss + balance(out.aux_loss, count, items), {
        "nll": nll,
        "correct": correct,
        "count": count,
    }


def balance(aux_loss, count, items: float):
    """The balance of the experts, weighted by this batch's part of the step."""
    return aux_loss * (count / items)


def metrics(sums: dict) -> dict:
    """Sums over the held-out rows -> {"loss", "perplexity", "token_accuracy"}."""
    mean = sums["nll"] / sums["count"]
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 50)),
        "token_accuracy": sums["correct"] / sums["count"],
    }


def text_bytes(held_out, encoded) -> int:
    """UTF-8 bytes of the held-out texts (rows as read) that were encoded: what bits per byte divide
    by."""
    used = set(encoded["source"])
    return sum(
        len(json.loads(row["row"])["text"].encode()) for row in held_out if row["source"] in used
    )
