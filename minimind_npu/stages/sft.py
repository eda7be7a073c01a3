"""Supervised fine-tuning: the answers of conversations, each with its end token; the loss is that
of pre-training.

Rows: {"conversations": [{"role", "content", "reasoning_content"?, "tools"?, "tool_calls"?}]} and
the other shapes of common/data/shapes.py.
"""

from stages.pretrain import INPUTS, balance, loss, metrics  # noqa: F401  (on other labels)

from common.data.labels import encode_chat

KIND = "chat"
COLUMNS = ("input_ids", "labels")


def encode(row: dict, tokenizer, max_length: int) -> dict | None:
    """A canonical chat row -> {"input_ids" [T], "labels" [T] on the assistant's turns,
    "truncated"}."""
    return encode_chat(tokenizer, row["messages"], max_length, row.get("tools"))
