"""Between pre-training and fine-tuning: whole conversations as text, so that a model meets the
marks of turns, tools, letters for choices and spelt characters before it is tuned on answers.

Loss: that of pre-training, on every token of a conversation, questions too. Rows: those of sft.py,
and documents where a mixture has some (road/mixture.py), so that they are not forgotten.
"""

import json

from stages import pretrain
from stages.pretrain import INPUTS, balance, loss, metrics  # noqa: F401  (on other rows)

from common.data.labels import encode_chat

KIND = "chat"
COLUMNS = ("input_ids", "labels")


def encode(row: dict, tokenizer, max_length: int) -> dict | list[dict] | None:
    """A canonical chat row -> {"input_ids" [T], "labels" [T], the same ids, "truncated"}; None
    where no answer fits into the window, as in sft. A text row -> such pieces, as in pretrain."""
    if "text" in row:
        pieces = pretrain.encode(row, tokenizer, max_length)
        return [piece | {"labels": piece["input_ids"]} for piece in pieces]
    encoded = encode_chat(tokenizer, row["messages"], max_length, row.get("tools"))
    if encoded is not None:
        encoded["labels"] = list(encoded["input_ids"])
    return encoded


def conversations(rows):
    """Held-out rows as read, without the documents: they ask nothing."""
    if not len(rows):
        return rows
    asked = [i for i, row in enumerate(rows["row"]) if "text" not in json.loads(row)]
    return rows.select(asked)
