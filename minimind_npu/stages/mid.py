"""Between pre-training and fine-tuning: whole conversations as text, so that a model meets the
marks of turns, tools, letters for choices and spelt characters before it is tuned on answers.

Loss: that of pre-training, on every token of a conversation, questions too. Rows: those of sft.py.
"""

from stages.pretrain import INPUTS, balance, loss, metrics  # noqa: F401  (on other rows)

from common.data.labels import encode_chat

KIND = "chat"
COLUMNS = ("input_ids", "labels")


def encode(row: dict, tokenizer, max_length: int) -> dict | None:
    """A canonical chat row -> {"input_ids" [T], "labels" [T], the same ids, "truncated"}; None
    where no answer fits into the window, as in sft."""
    encoded = encode_chat(tokenizer, row["messages"], max_length, row.get("tools"))
    if encoded is not None:
        encoded["labels"] = list(encoded["input_ids"])
    return encoded
