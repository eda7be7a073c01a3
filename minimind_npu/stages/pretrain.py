"""Pre-training: predict the next token of every document.

Loss: cross entropy summed over label tokens / the label tokens of the whole step, plus the balance
of experts.
Rows: {"text"}; a document is <|im_start|> text <|im_end|>, cut into equal pieces where it is longer
than the window. A row that carries such marks already is as many documents as they frame.
"""

from __future__ import annotations

import json
import math
import re

from common.data.spelling import encode_document
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


# how MiniMind's corpora frame their documents
MARKS = (("<|im_start|>", "<|im_end|>"), ("<s>", "</s>"))


def documents(text: str) -> list[str]:
    """The texts between the marks of a row that begins with one; of any other row the text as it
    is, whatever it mentions."""
    for opening, closing in MARKS:
        if text.lstrip().startswith(opening):
            border = rf"(?:{re.escape(closing)}\s*)?{re.escape(opening)}|{re.escape(closing)}\s*\Z"
            parts = re.split(border, text)
            return [part.strip() for part in parts if part.strip()]
    return [text]


def encode(row: dict, tokenizer, max_length: int) -> list[dict]:
    """A row -> pieces of its documents {"input_ids": [T]}, T <= max_length, none of a single
    token."""
    return [
        piece for text in documents(row["text"]) for piece in pieces(text, tokenizer, max_length)
    ]


def pieces(text: str, tokenizer, max_length: int) -> list[dict]:
    ids = encode_document(tokenizer, text, [tokenizer.bos_token_id])
    count = math.ceil(len(ids) / max_length)
    size = math.ceil(len(ids) / count)
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
    return out.loss + balance(getattr(out, "aux_loss", 0.0), count, denominator), sums


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
    rows = [json.loads(row["row"])["text"] for row in eval_rows if row["source"] in encoded]
    return sum(len(text.encode()) for row in rows for text in documents(row))


def first_document(row: str) -> str:
    """A canonical text row (JSON) -> one with nothing but its first document."""
    return json.dumps({"text": documents(json.loads(row)["text"])[0]}, ensure_ascii=False)
