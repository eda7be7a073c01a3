"""Several answers to each prompt at once, as reinforcement learning asks for them.

    Groups(model, rows=128).answer([[request, request, ...], ...])     # a list for each prompt

A slot of the cache holds a prompt and behind it the tokens of all its answers, each in the next
free column. So a prompt is computed and kept once, the answers of a slot look at its columns in one
product under a mask that says whose a column is, an answer that has ended costs nothing from then
on, and the next prompt begins as soon as there are rows for its answers. Requests, and how a token
is chosen, are those of generation.py.

A answers that go on, N tokens of a step, S slots in use, M answers of a slot, H heads, K key/value
heads, d size of a head, W columns in use, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from engine.generation import (
    FIRST,
    PREFILL,
    STEP,
    Document,
    Request,
    attend_documents,
    attending,
    choose,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from common.fast.attention import softmax_scale

NAME = "groups"


# ---- the cache -----------------------------------------------------------------------------------


class GroupCache(Cache):
    """Keys and values of every layer, [slots, K, columns, d] each; made when the first ones
    come. bias [slots, M, columns] is 0 where an answer looks at a column, else -inf."""

    def __init__(self, slots: int, members: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.members = members
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.bias = torch.full((slots, members, FIRST), -torch.inf, dtype=dtype, device=device)

    @property
    def columns(self) -> int:
        return self.bias.shape[2]

    def begin(
        self,
        rows: Tensor,
        places: Tensor,
        answers: Tensor,
        used: int,
        width: int,
        documents: list[Document],
    ) -> None:
        """A step: its tokens go to (rows, places) [N]. The last A of them are one of each answer,
        `answers` [A] their numbers (slot * M + place in it); those before them are `documents`, the
        prompts of slots that begin. Of the cache `used` slots and `width` columns are looked at."""
        width = -(-width // STEP) * STEP
        while self.columns < width:
            self.grow()
        self.rows = rows
        self.places = places
        self.answers = answers
        self.used = used
        self.width = width
        self.documents = [one for one in documents if one.end > one.start]
        ends = [0, *(one.end for one in self.documents)]
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=rows.device)
        for document in documents:
            self.bias[document.slot] = -torch.inf
            self.bias[document.slot, :, : document.end - document.start] = 0
        owners = answers % self.members
        self.bias[rows[-len(answers) :], owners, places[-len(answers) :]] = 0
        self.masks: dict[int, Tensor] = {}

    def grow(self) -> None:
        more = (0, self.columns)
        for kept in (self.keys, self.values):
            kept[:] = [F.pad(old, (0, 0, *more)) for old in kept]
        self.bias = F.pad(self.bias, more, value=-torch.inf)

    def mask(self, group: int) -> Tensor:
        """[S, 1, M * group, W], the same in all layers; group: heads of a key/value head."""
        if group not in self.masks:
            seen = self.bias[: self.used, :, : self.width]
            self.masks[group] = seen.repeat_interleave(group, 1)[:, None]
        return self.masks[group]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """key, value [1, K, N, d] of this step are stored, and returned as they are."""
        if layer_idx == len(self.keys):
            size = (len(self.bias), key.shape[1], self.columns, key.shape[3])
            for kept in (self.keys, self.values):
                kept.append(key.new_zeros(size))  # zeros: what is masked still is a factor
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[layer_idx][self.rows, :, self.places] = new[0].transpose(0, 1)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def move(self, start: int, goal: int, length: int) -> None:
        """The first `length` columns of slot `start` to slot `goal`."""
        for tensor in (*self.keys, *self.values):
            tensor[goal, :, :length] = tensor[start, :, :length]
        self.bias[goal] = self.bias[start]


def _attention(
    module, query, key, value, attention_mask, scaling=None, slots: GroupCache | None = None, **_
):
    """query [1, H, N, d], key and value [1, K, N, d] -> [1, N, H, d], None (the interface of
    transformers)."""
    scale = softmax_scale(query, scaling)
    begun = query.shape[2] - len(slots.answers)  # tokens of prompts that begin
    out = _looked_up(query[0, :, begun:].transpose(0, 1), slots, module.layer_idx, scale)
    if begun:
        prompts = (x[0, :, :begun] for x in (query, key, value))
        out = torch.cat([attend_documents(*prompts, slots, module.layer_idx, scale), out])
    return out[None], None


def _looked_up(query: Tensor, slots: GroupCache, layer: int, scale: float) -> Tensor:
    """query [A, H, d] -> [A, H, d]."""
    _, heads, size = query.shape
    keys = slots.keys[layer][: slots.used, :, : slots.width]
    values = slots.values[layer][: slots.used, :, : slots.width]
    shared = keys.shape[1]
    group = heads // shared
    grid = query.new_zeros(slots.used * slots.members, heads, size)
    grid[slots.answers] = query
    # [S, M, K, group, d] -> [S, K, M * group, d]: heads that share keys are queries of one product
    grid = grid.view(slots.used, slots.members, shared, group, size).transpose(1, 2).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        grid, keys, values, attn_mask=slots.mask(group), scale=scale
    )
    out = out.unflatten(2, (slots.members, group)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return out[slots.answers]


AttentionInterface.register(NAME, _attention)


# ---- answering -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Slot:
    """The requests of one prompt, and how many of its slot's columns are in use."""

    requests: list[Request]
    columns: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.requests[0].prompt

    def going(self) -> list[tuple[int, Request]]:
        return [(i, request) for i, request in enumerate(self.requests) if not request.finished]


class Groups:
    """Answers requests with `model`.

    rows: answers at a time; all of one prompt begin together, however few rows there are.
    max_length: tokens of prompt and answer together.
    """

    def __init__(self, model, rows: int, max_length: int):
        self.model = model
        self.rows = rows
        self.max_length = max_length
        self.slots: list[Slot] = []
        self.waiting: deque[list[Request]] = deque()

    def answer(self, groups: list[list[Request]]) -> None:
        """Each request to its end; those of a list have the same prompt. ValueError for a prompt
        that is empty or leaves no room."""
        for group in groups:
            if not 0 < len(group[0].prompt) < self.max_length:
                size = len(group[0].prompt)
                raise ValueError(f"a prompt of {size} tokens in a window of {self.max_length}")
        # prompts of a length side by side, so that few columns are masked
        self.waiting.extend(sorted(groups, key=lambda group: -len(group[0].prompt)))
        members = max(map(len, groups), default=1)
        # twice as many as rows fill: at the end of a prompt some of its answers go on alone
        most = min(len(groups), 2 * -(-self.rows // members))
        self.cache = GroupCache(most, members, self.model.dtype, self.model.device)
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """One forward pass: a new token of every answer that has a row; False when there is
        nothing to do."""
        begun = self.begin_slots()
        going = [
            (slot, member, request)
            for slot, one in enumerate(self.slots)
            for member, request in one.going()
        ]
        if not going:
            return False
        logits = self.logits(begun, going)
        requests = [request for _, _, request in going]
        tokens, log_probs = choose(logits.float(), requests)
        chosen = zip(requests, tokens.tolist(), log_probs.tolist(), strict=True)
        for request, token, log_prob in chosen:
            request.take(token, log_prob, request.sampling.ends, self.max_length)
        self.end_slots()
        return True

    def begin_slots(self) -> list[int]:
        """Give slots to waiting prompts; -> those whose prompt this step has to compute."""
        going = sum(len(slot.going()) for slot in self.slots)
        begun: list[int] = []
        room = PREFILL
        while self.waiting and len(self.slots) < len(self.cache.bias):
            group = self.waiting[0]
            size = len(group[0].prompt)
            if (going and going + len(group) > self.rows) or (begun and size > room):
                break
            begun.append(len(self.slots))
            self.slots.append(Slot(self.waiting.popleft()))
            going += len(group)
            room -= size
        return begun

    def end_slots(self) -> None:
        """The last slots move to those that are free."""
        for number in reversed(range(len(self.slots))):
            if self.slots[number].going():
                continue
            last = self.slots.pop()
            if number < len(self.slots):
                self.cache.move(len(self.slots), number, last.columns)
                self.slots[number] = last

    def logits(self, begun: list[int], going: list[tuple[int, int, Request]]) -> Tensor:
        """Logits after the newest token of every answer, [A, V]."""
        ids: list[int] = []
        rows: list[int] = []
        columns: list[int] = []
        positions: list[int] = []
        documents = []
        for slot in begun:
            prompt = self.slots[slot].prompt[:-1]
            documents.append(Document(len(ids), len(ids) + len(prompt), slot, held=0))
            ids += prompt
            rows += [slot] * len(prompt)
            columns += range(len(prompt))
            positions += range(len(prompt))
            self.slots[slot].columns = len(prompt)
        for slot, _, request in going:
            ids.append((request.tokens or request.prompt)[-1])
            rows.append(slot)
            columns.append(self.slots[slot].columns)
            positions.append(request.place)
            self.slots[slot].columns += 1
        answers = [slot * self.cache.members + member for slot, member, _ in going]
        table = torch.tensor([ids, rows, columns, positions]).to(self.model.device)
        ids, rows, columns, positions = table
        answers = torch.tensor(answers).to(self.model.device)
        width = max(slot.columns for slot in self.slots)
        self.cache.begin(rows, columns, answers, len(self.slots), width, documents)
        with attending(self.model, NAME):
            out = self.model(
                input_ids=ids[None],
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=len(going),
                slots=self.cache,
            )
        return out.logits[0]
