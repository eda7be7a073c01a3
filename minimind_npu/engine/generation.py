"""Answers to many prompts at once: a key/value cache of slots, each given to the next prompt as
soon as a row ends.

    engine = Engine(model, slots=8)
    engine.generate(prompts, max_new_tokens=64)          # token ids -> new ids of each, in order
    for index, token in engine.stream(prompts, temperature=0.8):     # as they come
        ...
    request = engine.submit(prompt, Sampling(top_p=0.9))     # what both are made of
    engine.step()

A step is one forward pass over one row without padding: what stands before the last token of the
prompts that have just been given a slot (attention of a packed row), then one token of every slot
(attention over what its slot holds). What several prompts begin with alike is computed once: the
others copy its keys and values, also from answers that have ended. It works with any causal
language model whose attention goes through transformers' attention interface.

A active slots, N tokens of a step, H heads, K key/value heads, d size of a head, W columns in use,
V vocabulary.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from model import MiniMindForCausalLM  # noqa: F401  (tells the Auto classes about it)
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from common.data.spelling import encode_text
from common.demo.chat_model import ChatModel
from common.fast.attention import varlen_kernel
from common.runs.generate import end_token_ids

HERE = Path(__file__).resolve().parents[1]
OUTPUT = HERE.parent / "output" / HERE.name
CHATS = (
    "toolcall",
    "reason",
    "dpo",
    "lora",
    "sft",
    "distill",
    "grpo",
    "ppo",
    "spo",
    "cispo",
    "reinforce",
)  # stages that leave a model that answers
NAME = "slots"
# the columns in use are a multiple: oneDNN compiles a kernel for every new shape in half precision
STEP = 64
FIRST = 256  # columns of a new cache; it doubles when a row gets longer
# columns from which plain products are faster than torch's fused attention, on a CPU in half
# precision
EXPLICIT = 512
# tokens of new prompts in one step, so that many long ones do not stop the others for long
PREFILL = 2048
WORTH = 16  # tokens of a common beginning from which a copy pays
NUCLEUS = 256  # candidates looked at before the whole vocabulary is sorted


# ---- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How a request is answered.

    temperature 0: always the likeliest token; top_k 0: among all; ends: token ids that end an
    answer, None: those of the model's generation config; log_probs: whether Request.log_probs is
    filled; top_log_probs: how many of the likeliest tokens Request.top_log_probs has beside each
    chosen one, None: it stays empty.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | str = 0
    ends: frozenset[int] | None = None
    log_probs: bool = False
    top_log_probs: int | None = None

    def __post_init__(self):
        makes_sense = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, good in makes_sense.items():
            if not good:
                raise ValueError(f"{name} {getattr(self, name)} makes no sense")


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it.

    tokens: the end token is among them.
    log_probs: of each token, under the very distribution that it was drawn from (0 where the
        likeliest is taken); empty unless its Sampling asks for them.
    finished: "" while it runs, then "stop", "length" or "cancelled".
    on_token: called with each new token; what it returns is not looked at.
    constraint: what may come next, for answers that follow a grammar: allowed() -> bool [V] on the
        CPU, take(token), and done.
    top_log_probs: (log-probability of the token, [(another, its own), ...]) of each token, of the
        model itself: before penalty, temperature and constraint.
    """

    prompt: list[int]
    sampling: Sampling
    on_token: Callable[[int], object] | None = None
    constraint: object = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    finished: str = ""
    seen: Tensor | None = None  # bool [V]: tokens of prompt and answer, where they are penalised

    def __post_init__(self):
        # of its own: an answer is the same whoever is answered beside it
        self.numbers = random.Random(f"{self.sampling.seed}")
        self.key = tuple(self.prompt)
        self.held = 0  # tokens of the prompt that its slot held before it came

    @property
    def place(self) -> int:
        """Column of its newest token."""
        return len(self.prompt) + len(self.tokens) - 1

    def cancel(self) -> None:
        self.finished = self.finished or "cancelled"

    def take(self, token: int, log_prob: float, ends: frozenset[int], limit: int) -> None:
        self.tokens.append(token)
        if self.sampling.log_probs:
            self.log_probs.append(log_prob)
        if self.seen is not None:
            self.seen[token] = True
        if self.constraint:
            self.constraint.take(token)
        if token in ends or (self.constraint and self.constraint.done):
            self.finished = "stop"
        elif len(self.tokens) >= self.sampling.max_new_tokens or self.place + 1 >= limit:
            self.finished = "length"
        if self.on_token:
            self.on_token(token)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two of them begin with alike."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


# ---- the cache -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """The part of a prompt that a step computes: tokens [start, end) of the step, in `slot`, which
    already `held` so many columns before them."""

    start: int
    end: int
    slot: int
    held: int


class SlotCache(Cache):
    """Keys and values of every layer, [slots, K, columns, d] each; made when the first ones
    come."""

    def __init__(self, slots: int):
        super().__init__(layers=[])
        self.slots = slots
        self.columns = FIRST
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def begin(
        self,
        rows: Tensor,
        columns: Tensor,
        active: int,
        width: int,
        documents: list[Document],
        dtype,
        copies: list[tuple[int, int, int]],
    ) -> None:
        """A step: its tokens go to (rows, columns) [N]; the last `active` of them look at `width`
        columns, those before them are `documents`.

        copies: (slot, another, length): what a slot gets in this step goes to another one too.
        """
        width = -(-width // STEP) * STEP
        while self.columns < width:
            self.columns *= 2
        for kept in (self.keys, self.values):
            for i, old in enumerate(kept):
                if old.shape[2] < self.columns:
                    kept[i] = F.pad(old, (0, 0, 0, self.columns - old.shape[2]))
        self.rows = rows
        self.places = columns
        self.copies = copies
        self.active = active
        self.width = width
        self.documents = documents
        ends = [0, *(document.end for document in documents)]
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=rows.device)
        not_yet = torch.arange(width, device=rows.device) > columns[-active:, None]
        bias = torch.zeros(not_yet.shape, dtype=dtype, device=rows.device)
        self.bias = bias.masked_fill_(not_yet, -torch.inf)[:, None, None]  # [A, 1, 1, W]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """key, value [1, K, N, d] of this step are stored, and returned as they are."""
        if layer_idx == len(self.keys):
            size = (self.slots, key.shape[1], self.columns, key.shape[3])
            for kept in (self.keys, self.values):
                kept.append(key.new_zeros(size))  # zeros: what is masked still is a factor
        for kept, new in ((self.keys, key), (self.values, value)):
            layer = kept[layer_idx]
            layer[self.rows, :, self.places] = new[0].transpose(0, 1)
            for start, goal, length in self.copies:
                layer[goal, :, :length] = layer[start, :, :length]
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def exchange(self, one: int, other: int, length: int) -> None:
        """The first `length` columns of two slots change places."""
        for tensor in (*self.keys, *self.values):
            tensor[[one, other], :, :length] = tensor[[other, one], :, :length]

    def move(self, start: int, goal: int, length: int) -> None:
        """The first `length` columns of slot `start` to slot `goal`."""
        for tensor in (*self.keys, *self.values):
            tensor[goal, :, :length] = tensor[start, :, :length]


def _attention(
    module, query, key, value, attention_mask, scaling=None, slots: SlotCache | None = None, **_
):
    """query [1, H, N, d], key and value [1, K, N, d] -> [1, N, H, d], None (the interface of
    transformers)."""
    _, heads, tokens, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    active = slots.active
    begun = tokens - active  # tokens of prompts that begin; after them one of every slot
    keys = slots.keys[module.layer_idx][:active, :, : slots.width]
    values = slots.values[module.layer_idx][:active, :, : slots.width]
    # the heads that share a key/value head are its queries: nothing is repeated
    last = query[0, :, begun:].transpose(0, 1).reshape(active, keys.shape[1], -1, size)
    out = _looked_up(last, keys, values, slots.bias.to(query.dtype), scale)
    out = out.reshape(1, active, heads, size)
    if begun:
        prompts = (x[0, :, :begun] for x in (query, key, value))
        out = torch.cat([attend_documents(*prompts, slots, module.layer_idx, scale)[None], out], 1)
    return out, None


def _looked_up(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """query [A, K, G, d], key and value [A, K, W, d], bias [A, 1, 1, W] -> [A, K, G, d]."""
    if query.device.type == "cpu" and query.dtype != torch.float32 and key.shape[2] >= EXPLICIT:
        scores = torch.matmul(query * scale, key.transpose(2, 3)) + bias
        return torch.matmul(scores.softmax(-1), value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, slots, layer: int, scale: float
) -> Tensor:
    """query [H, T, d], key and value [K, T, d] of documents side by side -> [T, H, d]. slots: the
    cache, with `documents` and their boundaries `cu_seqlens`."""
    kernel = varlen_kernel(query)
    if kernel and not any(document.held for document in slots.documents):
        max_seqlen = max(document.end - document.start for document in slots.documents)
        return kernel(query, key, value, slots.cu_seqlens, max_seqlen, scale)
    grouped = len(query) != len(key)
    found = []
    for document in slots.documents:
        q, k, v = (x[None, :, document.start : document.end] for x in (query, key, value))
        mask = None
        if document.held:
            whole = document.held + document.end - document.start
            k = slots.keys[layer][document.slot, None, :, :whole]
            v = slots.values[layer][document.slot, None, :, :whole]
            ones = torch.ones(q.shape[2], whole, dtype=torch.bool, device=q.device)
            mask = ones.tril(document.held)
        attend = F.scaled_dot_product_attention
        causal = mask is None
        found.append(attend(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)[0])
    return torch.cat(found, 1).transpose(0, 1)


AttentionInterface.register(NAME, _attention)


# ---- the engine ----------------------------------------------------------------------------------


class Engine:
    """Answers requests with `model` in `slots` rows; one thread at a time may use it.

    max_length: tokens of prompt and answer together, default (and at most) the model's positions.
    share_beginnings: False: only whole prompts are taken over, so that what an answer's numbers
        are, to the last bit, does not depend on who was answered before.
    """

    def __init__(
        self,
        model,
        slots: int = 8,
        max_length: int | None = None,
        share_beginnings: bool = True,
    ):
        window = getattr(model.config, "max_position_embeddings", None) or 4096
        ends = model.generation_config.eos_token_id
        self.model = model
        self.slots = slots
        self.share_beginnings = share_beginnings
        self.max_length = min(max_length or window, window)
        self.ends = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
        self.cache = SlotCache(slots)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # number i has slot i; there are no gaps in a step
        # tokens whose keys and values each slot holds, also of what has ended
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.used = [0] * slots  # the step in which each was used last
        self.steps = 0

    # ---- asking ----

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        on_token: Callable | None = None,
        constraint: object = None,
    ) -> Request:
        """Put a prompt in the queue. ValueError when it is empty or leaves no room for an
        answer."""
        if not prompt:
            raise ValueError("an empty prompt; begin with the tokenizer's bos token")
        if len(prompt) >= self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in a window of {self.max_length}"
            )
        if sampling.ends is None:
            sampling = replace(sampling, ends=self.ends)
        request = Request(list(prompt), sampling, on_token, constraint)
        self.waiting.append(request)
        return request

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int = 256, **sampling
    ) -> list[list[int]]:
        """New token ids of each prompt, the end token among them; sampling: fields of Sampling."""
        answers: list[list[int]] = [[] for _ in prompts]
        for index, token in self.stream(prompts, max_new_tokens, **sampling):
            answers[index].append(token)
        return answers

    def stream(
        self, prompts: list[list[int]], max_new_tokens: int = 256, **sampling
    ) -> Iterator[tuple[int, int]]:
        """(number of the prompt, its next token id), as they come; leaving the iteration ends all
        requests.

        Prompt i draws its random numbers from "seed:i", so its answer is the same beside any
        others.
        """
        how = Sampling(max_new_tokens, **sampling)
        number = {}
        for i, prompt in enumerate(prompts):
            request = self.submit(prompt, replace(how, seed=f"{how.seed}:{i}"))
            number[request] = i
        try:
            while any(not request.finished for request in number):
                for request, token in self.step():
                    if request in number:
                        yield number[request], token
        finally:
            for request in number:
                request.cancel()

    # ---- one step ----

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One forward pass: a new token of every request that has a slot; [] when there is nothing
        to do."""
        fresh, copies = self._fill_slots()
        self._close_gaps()
        if not self.running:
            return []
        logits = self._logits(fresh, copies).float()
        curious = [i for i, r in enumerate(self.running) if r.sampling.top_log_probs is not None]
        own = logits[curious].log_softmax(-1)  # before what follows changes them
        tokens, log_probs = choose(constrained(logits, self.running), self.running)
        if curious:
            note_top(own, tokens[curious], [self.running[i] for i in curious])
        tokens = tokens.tolist()  # the wait for the device
        if any(request.sampling.log_probs for request in self.running):
            log_probs = log_probs.tolist()
        else:
            log_probs = [0.0] * len(tokens)
        for request, token, log_prob in zip(self.running, tokens, log_probs, strict=True):
            request.take(token, log_prob, request.sampling.ends, self.max_length)
        return list(zip(self.running, tokens, strict=True))

    def _fill_slots(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Give the slots of what has ended to waiting requests; -> slots whose prompt has to be
        computed in this step, and copies: see SlotCache.begin.

        What a slot holds of a prompt's beginning (the same instructions, an earlier turn of the
        conversation) is copied, and the rest computed.
        """
        self.waiting = deque(request for request in self.waiting if not request.finished)
        free = self._free_slots() if self.waiting else []
        begun: dict[tuple, int] = {}  # prompts that this step computes
        copies = []
        room = PREFILL
        while free and self.waiting:
            request = self.waiting[0]
            source, held = self._longest(request.prompt)
            if request.key in begun:
                slot = self._take_slot(free, source, 0)
                copies.append((begun[request.key], slot, len(request.prompt) - 1))
            elif self.share_beginnings and any(
                common(request.prompt, key) > held + WORTH for key in begun
            ):
                break  # one step later it finds more
            elif begun and len(request.prompt) - held > room:
                break
            else:
                slot = self._take_slot(free, source, held)
                request.held = held
                if held < len(request.prompt) - 1:
                    begun[request.key] = slot
                    room -= len(request.prompt) - held
            self.waiting.popleft()
            self.running[slot : slot + 1] = [request]
        return list(begun.values()), copies

    def _free_slots(self) -> list[int]:
        running = self.running
        return [i for i in range(self.slots) if i >= len(running) or running[i].finished]

    def _longest(self, prompt: list[int]) -> tuple[int, int]:
        """The slot that holds the most of the beginning of a prompt, and how many tokens: all but
        the last at most, none where it is too little to be worth a copy."""
        lengths = [common(prompt[:-1], held) for held in self.held]
        source = max(range(self.slots), key=lengths.__getitem__)
        whole = lengths[source] == len(prompt) - 1
        pays = self.share_beginnings and lengths[source] >= WORTH
        return source, lengths[source] if whole or pays else 0

    def _take_slot(self, free: list[int], source: int, held: int) -> int:
        """Take the first of the free slots; it then holds the first `held` tokens of `source`.

        What it held before stays in another free slot: lost is what was used longest ago, or what
        the request goes on from.
        """
        slot = free[0]
        goes_on = held > len(self.held[source]) // 2
        lost = min(free, key=self.used.__getitem__)
        if goes_on and source in free:
            lost = source
        self._exchange(slot, lost)
        source = {slot: lost, lost: slot}.get(source, source)
        if held and source != slot:
            self.cache.move(source, slot, held)
            self.held[slot] = self.held[source]
        self.held[slot] = self.held[slot][:held]
        return free.pop(0)

    def _exchange(self, slot: int, other: int) -> None:
        """Two slots change places, with all they hold."""
        if slot == other:
            return
        self.cache.exchange(slot, other, max(len(self.held[slot]), len(self.held[other])))
        for facts in (self.held, self.used):
            facts[slot], facts[other] = facts[other], facts[slot]

    def _close_gaps(self) -> None:
        """Requests in the last slots move to those that are free; those that begin now stand before
        the first gap."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finished:
                last = self.running.pop()
                if slot < len(self.running):
                    self._exchange(slot, len(self.running))
                    self.running[slot] = last

    def _logits(self, fresh: list[int], copies: list[tuple[int, int, int]]) -> Tensor:
        """Logits after the newest token of every slot, [A, V]; `fresh`, `copies`: see
        _fill_slots."""
        ids = []
        columns = []
        rows = []
        documents = []
        for slot in fresh:
            request = self.running[slot]
            begun = request.prompt[request.held : -1]
            documents.append(Document(len(ids), len(ids) + len(begun), slot, request.held))
            ids += begun
            columns += range(request.held, request.held + len(begun))
            rows += [slot] * len(begun)
        for slot, request in enumerate(self.running):
            newest = (request.tokens or request.prompt)[-1]
            ids.append(newest)
            if not request.tokens:
                self.held[slot] = request.prompt[:-1]
            self.held[slot].append(newest)
            self.used[slot] = self.steps
            columns.append(request.place)
            rows.append(slot)
        self.steps += 1
        active = len(self.running)
        width = 1 + max(request.place for request in self.running)
        ids, columns, rows = torch.tensor([ids, columns, rows]).to(self.model.device)
        self.cache.begin(rows, columns, active, width, documents, self.model.dtype, copies)
        with attending(self.model, NAME):
            out = self.model(
                input_ids=ids[None],
                position_ids=columns[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=active,
                slots=self.cache,
            )
        return out.logits[0]


@contextmanager
def attending(model, name: str):
    """The model computes with this attention, without dropout; afterwards as before."""
    config = model.config
    was_training = model.training
    before = config._attn_implementation
    config._attn_implementation = name
    if was_training:
        model.eval()
    try:
        yield
    finally:
        config._attn_implementation = before
        if was_training:
            model.train()


# ---- choosing a token ----------------------------------------------------------------------------


def constrained(logits: Tensor, requests: list[Request]) -> Tensor:
    """logits [A, V] -> the same, -inf where a request's constraint forbids a token."""
    rows = [i for i, request in enumerate(requests) if request.constraint]
    if not rows:
        return logits
    allowed = torch.stack([requests[row].constraint.allowed() for row in rows])
    logits = logits.clone()
    logits[rows] = logits[rows].masked_fill(~allowed.to(logits.device), -torch.inf)
    return logits


def note_top(log_probs: Tensor, tokens: Tensor, requests: list[Request]) -> None:
    """Write down the likeliest of log_probs [R, V] beside the chosen tokens [R] of requests that
    want it."""
    own = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
    most = max(request.sampling.top_log_probs for request in requests)
    values, ids = log_probs.topk(most)
    for i, request in enumerate(requests):
        wanted = request.sampling.top_log_probs
        top = zip(ids[i, :wanted].tolist(), values[i, :wanted].tolist(), strict=True)
        request.top_log_probs.append((own[i], list(top)))


def choose(logits: Tensor, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """logits [A, V] -> the next token of each request, [A], and its log-prob under the distribution
    that it was drawn from, [A]."""
    logits = _penalised(logits.float(), requests)
    tokens = logits.argmax(-1)
    log_probs = logits.new_zeros(len(logits))
    # each kind is drawn apart, so that a draw is the same whoever is in the batch
    kinds: dict[str, list[int]] = {}
    for row, request in enumerate(requests):
        if request.sampling.temperature > 0:
            kinds.setdefault(_kind(request.sampling), []).append(row)
    for kind, rows in kinds.items():
        # one kind for all, as in a rollout: no copy of the logits
        some = logits if len(rows) == len(logits) else logits[rows]
        tokens[rows], log_probs[rows] = _drawn(some, [requests[row] for row in rows], kind)
    return tokens, log_probs


def _kind(sampling: Sampling) -> str:
    """ "top_k" (the rest of the vocabulary is not looked at), "top_p" (of all tokens) or "all"."""
    if sampling.top_k:
        return "top_k"
    return "top_p" if sampling.top_p < 1 else "all"


def _penalised(logits: Tensor, requests: list[Request]) -> Tensor:
    """Keskar et al. 2019: what stands in prompt or answer is less likely, by a factor on its
    logit."""
    rows = [i for i, request in enumerate(requests) if request.sampling.repetition_penalty != 1]
    if not rows:
        return logits
    penalised = [requests[row] for row in rows]
    for request in penalised:
        if request.seen is None:
            request.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            request.seen[request.prompt + request.tokens] = True
    seen = torch.stack([request.seen for request in penalised])
    factor = _column("repetition_penalty", penalised, logits)
    old = logits[rows]
    lower = torch.where(old > 0, old / factor, old * factor)
    logits[rows] = torch.where(seen, lower, old)
    return logits


def _column(name: str, requests: list[Request], like: Tensor) -> Tensor:
    """A field of each request's Sampling, [R, 1]."""
    return like.new_tensor([getattr(request.sampling, name) for request in requests])[:, None]


def _drawn(logits: Tensor, requests: list[Request], kind: str) -> tuple[Tensor, Tensor]:
    """One token for each row of logits [R, V]: temperature, top_k, top_p, then a random number of
    the request's own; and its log-prob under what they leave. kind: see _kind; all requests are of
    it."""
    logits = logits / _column("temperature", requests, logits)
    top_p = _column("top_p", requests, logits)
    order = None  # token of each column, where they are no longer in the vocabulary's order
    if kind == "top_k":
        top_k = [min(request.sampling.top_k, logits.shape[1]) for request in requests]
        logits, order = logits.topk(max(top_k))
        rank = torch.arange(logits.shape[1], device=logits.device)
        beyond = rank >= _column("top_k", requests, logits)
        logits = logits.masked_fill(beyond, -torch.inf)
    chances = logits.softmax(-1)
    if kind == "top_p":
        chances, order = _likeliest(chances, top_p)
    if kind != "all":
        before = chances.cumsum(-1) - chances
        chances = chances * ((before < top_p) | (top_p >= 1))
    sums = chances.cumsum(-1)
    numbers = [request.numbers.getrandbits(24) / 2**24 for request in requests]
    drawn = sums.new_tensor(numbers)[:, None] * sums[:, -1:]
    place = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
    log_probs = (chances.gather(1, place) / sums[:, -1:]).log()
    if order is not None:
        place = order.gather(1, place)
    return place[:, 0], log_probs[:, 0]


def _likeliest(chances: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """(chances, tokens), the likeliest first, of enough tokens for top_p: rarely is all of the
    vocabulary sorted."""
    few, order = chances.topk(min(NUCLEUS, chances.shape[1]))
    if (few.sum(-1, keepdim=True) >= top_p).all():
        return few, order
    return chances.sort(-1, descending=True)


# ---- one conversation ----------------------------------------------------------------------------


def newest(root: Path = OUTPUT) -> str:
    """The folder of the newest finished run that chats, else of the pre-trained one; SystemExit
    when there is none."""
    for stages in (CHATS, ("pretrain",)):
        found = [path for stage in stages for path in root.glob(f"{stage}/final/*config.json")]
        if found:
            return str(max(found, key=lambda path: path.stat().st_mtime).parents[1])
    raise SystemExit(
        f"no finished run under {root}: bash {HERE.name}/run_all.sh trains one, or name a model's "
        "folder"
    )


class MiniMindChatModel(ChatModel):
    """Answers through the engine; a model that was only pre-trained continues the last text.

    ends: token ids that end an answer.
    """

    def __init__(self, model: str | Path):
        super().__init__(model, pretraining_stage="pretrain")
        self.ends = frozenset(end_token_ids(self.model, self.tokenizer))

    def text_prompt(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return encode_text(self.tokenizer, text, [] if bos is None else [bos])

    def _generate(self, prompt, room, heard, **sampling):
        engine = Engine(self.model, slots=1)
        seed = random.getrandbits(32)
        ids = list(prompt)
        for _, token in engine.stream([prompt], room, seed=seed, ends=self.ends, **sampling):
            ids.append(token)
            if heard(torch.tensor([ids])).all():
                return
