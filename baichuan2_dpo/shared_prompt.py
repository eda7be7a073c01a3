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
import torch
from torch import Tensor

from common.data.spelling import IGNORE


# ---- the row ----
def pack_pairs(rows: list[dict]) -> dict:
    """Rows chosen, rejected, chosen, ... -> one packed row in which the second of two leaves out
    what both begin with. A last row that has no other stands alone.

    Returns input_ids, labels, position_ids [1, T]; cu_seq_lens_q, cu_seq_lens_k [n + 1] int32, the
    boundaries of queries and keys; kv_index [S], columns of the keys; max_length_q, max_length_k.
    """
    ids = []
    labels = []
    positions = []
    keys = []
    queries_of = []  # how many each sequence has
    keys_of = []
    column = 0
    for number, row in enumerate(rows):
        rejected = number % 2 == 1
        shared = common_start(rows[number - 1], row) if rejected else 0
        own = len(row["input_ids"]) - shared
        prompt = column - len(rows[number - 1]["input_ids"]) if rejected else column
        ids.append(row["input_ids"][shared:])
        labels.append(row["labels"][shared:])
        positions.append(np.arange(shared, shared + own))
        keys.append(np.arange(prompt, prompt + shared))
        keys.append(np.arange(column, column + own))
        queries_of.append(own)
        keys_of.append(shared + own)
        column += own
    cu_seqlens_q = torch.tensor([0, *queries_of]).cumsum(0)
    cu_seqlens_k = torch.tensor([0, *keys_of]).cumsum(0)
    joined_labels = _joined(labels)
    joined_labels[cu_seqlens_q[:-1]] = IGNORE  # nothing before it in the row predicts it
    return {
        "input_ids": _joined(ids)[None],
        "labels": joined_labels[None],
        "position_ids": _joined(positions)[None],
        "kv_index": _joined(keys),
        "cu_seq_lens_q": cu_seqlens_q.to(torch.int32),
        "cu_seq_lens_k": cu_seqlens_k.to(torch.int32),
        "max_length_q": max(queries_of),
        "max_length_k": max(keys_of),
    }


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


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
