"""A pair's prompt once in a packed row: how the row is laid out.

    prompt[:-1] | prompt[-1] chosen | prompt[-1] rejected

Chosen and rejected are two sequences, each with the positions it would have alone. The queries of
the rejected one are its own columns; its keys are the prompt's columns and its own, and `kv_index`
names them. So every sequence has boundaries of its queries and of its keys, and its queries are the
last of its keys. Prompts cost one forward and one backward instead of two.

The attention over it is common/fast/shared_start.py.

T tokens of a row, n sequences, S keys of all sequences.
"""

from __future__ import annotations

import numpy as np

from common.data.spelling import IGNORE
from common.fast import shared_start


def pack_pairs(rows: list[dict]) -> dict:
    """Rows chosen, rejected, chosen, ... -> one packed row in which the second of two leaves out
    what both begin with. A last row that has no other stands alone.

    Returns what shared_start.pack does.
    """
    marked = []
    for number, row in enumerate(rows):
        shared = common_start(rows[number - 1], row) if number % 2 == 1 else 0
        marked.append(row | {"shared": shared})
    return shared_start.pack(marked)


def packed_length(rows: list[dict]) -> int:
    """Tokens of the row that pack_pairs makes of these pairs."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return sum(len(row["input_ids"]) for row in rows) - sum(common_start(*pair) for pair in pairs)


def common_start(chosen: dict, rejected: dict) -> int:
    """Tokens that both rows begin with, short of the one that predicts the first label."""
    # a label at column c + 1 is predicted by column c, which stays in both
    most = min(_first_predicting(chosen), _first_predicting(rejected))
    a = np.asarray(chosen["input_ids"][:most])
    b = np.asarray(rejected["input_ids"][:most])
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else most


def _first_predicting(row: dict) -> int:
    return int(np.flatnonzero(np.asarray(row["labels"][1:]) != IGNORE)[0])
