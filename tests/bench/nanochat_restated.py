"""How nanochat trains and answers, told again in plain torch: what tests/bench/nanochat.py compares this project with.

Written from a description, in words of our own: the version of late 2025, whose network transformers ships. The choices
that decide its speed: rows of T + 1 tokens that begin with a document and are filled by the longest that fits, the
shortest being cut where none does, from texts that are tokenised as they are needed; attention over whole rows, across
their documents, by torch's scaled_dot_product_attention; logits of all positions, capped and in fp32; Muon (Newton and
Schulz's iteration in bf16, a matrix at a time) beside a fused AdamW; the gradient clipped at 1; a constant rate that
falls to nothing in the last fifth; torch.compile around the model on every device, a CPU too. It computes in fp32 on a
CPU. Answers come from a cache of one row: the prompt at once, then a token at a time, what a calculator says among
them.

Two things are as transformers has them, so that both sides compute the same: the epsilon of a norm is 1e-6, cos and sin
are fp32. Names of parameters are transformers'.

B rows, T tokens, H heads, d size of a head, D width, V vocabulary.
"""

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_SIZE = 128
CAP = 15.0
EPS = 1e-6
BUFFER = 1000  # tokenised documents that a row is chosen from
ROWS = 32  # of a micro-batch, as its run on a CPU has them
WARMDOWN = 0.2  # share of the run in which the rate falls


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Shape:
    vocab: int
    depth: int
    width: int
    positions: int = 2048

    @property
    def heads(self) -> int:
        return self.width // HEAD_SIZE


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, d], cos and sin [1, T, 1, d / 2]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1).to(x.dtype)


class Cache:
    """Keys and values of one row, [layers, 1, H, T, d], of which `length` are there."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype):
        size = (shape.depth, 1, shape.heads, tokens, HEAD_SIZE)
        self.keys, self.values = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
        self.length = 0

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.heads, self.layer = shape.heads, layer
        linear = lambda: nn.Linear(shape.width, shape.width, bias=False)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear() for _ in range(4))

    def forward(self, x, cos, sin, cache=None):
        b, t, _ = x.shape
        split = lambda y: y.view(b, t, self.heads, HEAD_SIZE)
        query = norm(rotate(split(self.q_proj(x)), cos, sin)).transpose(1, 2)
        key = norm(rotate(split(self.k_proj(x)), cos, sin)).transpose(1, 2)
        value = split(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            key, value = cache.add(self.layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=t == key.shape[2])
        return self.o_proj(out.transpose(1, 2).contiguous().view(b, t, -1))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(shape, layer), FeedForward(shape.width)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(norm(x), cos, sin, cache)
        return x + self.mlp(norm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.depth))


class NanoChat(nn.Module):
    """ids [B, T] -> capped logits [B, T, V] in fp32, or with targets [B, T] their mean loss."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.model = shape, Decoder(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        speed = 1.0 / 10000 ** (torch.arange(0, HEAD_SIZE, 2).float() / HEAD_SIZE)
        angle = torch.outer(torch.arange(shape.positions).float(), speed)[None, :, None]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: Cache | None = None):
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        cos, sin = self.cos[:, start:end], self.sin[:, start:end]
        x = norm(self.model.embed_tokens(ids))
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = end
        logits = self.lm_head(norm(x))
        logits = (CAP * torch.tanh(logits / CAP)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


# ---- rows -----------------------------------------------------------------------------------------------------------


class BestFit:
    """Micro-batches (inputs, targets) [rows, T] from texts without an end.

    seen, dropped: tokens that went into rows, and that were cut off.
    """

    def __init__(self, texts: Iterator[str], tokenizer, length: int, rows: int):
        self.texts, self.tokenizer = texts, tokenizer
        self.length, self.rows = length, rows
        self.documents: list[list[int]] = []
        self.seen = self.dropped = 0

    def refill(self) -> None:
        missing = BUFFER - len(self.documents)
        if missing > 0:
            texts = [next(self.texts) for _ in range(missing)]
            for ids in self.tokenizer(texts, add_special_tokens=False).input_ids:
                self.documents.append([self.tokenizer.bos_token_id, *ids])

    def row(self) -> list[int]:
        found: list[int] = []
        while len(found) < self.length + 1:
            self.refill()
            room = self.length + 1 - len(found)
            sizes = [len(document) for document in self.documents]
            fitting = [i for i, size in enumerate(sizes) if size <= room]
            if fitting:
                chosen = max(fitting, key=sizes.__getitem__)
            else:
                chosen = min(range(len(sizes)), key=sizes.__getitem__)
            document = self.documents.pop(chosen)
            self.dropped += max(0, len(document) - room)
            found += document[:room]
        self.seen += len(found)
        return found

    def batch(self) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([self.row() for _ in range(self.rows)])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ---- the optimizers -------------------------------------------------------------------------------------------------


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, matrices: list, lr: float):
        super().__init__(matrices, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p.grad)
                state["average"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(state["average"], group["momentum"])
                rows, columns = p.shape
                p.add_(
                    newton_schulz(direction).to(p.dtype),
                    alpha=-group["lr"] * max(1, rows / columns) ** 0.5,
                )


class Loop:
    """Micro-batches in, an update after `accumulation` of them.

    rates: {"muon_lr", "learning_rate" of the table, "head_lr"}; half: bf16 as on an accelerator (autocast, the table
    in bf16); compiled: as it does on every device.
    """

    def __init__(self, model: NanoChat, accumulation: int, rates: dict, half: bool, compiled: bool):
        self.model, self.accumulation = model.train(), accumulation
        table, head = model.model.embed_tokens, model.lm_head
        if half:
            table.to(torch.bfloat16)
        groups = [
            {"params": [head.weight], "lr": rates["head_lr"]},
            {"params": [table.weight], "lr": rates["learning_rate"]},
        ]
        adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)
        self.muon = Muon(list(model.model.layers.parameters()), rates["muon_lr"])
        self.optimizers = (adamw, self.muon)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        self.cast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        self.run = torch.compile(model, dynamic=False) if compiled else model
        self.steps = 0

    def step(self, rows: BestFit, progress: float = 0.0) -> float:
        """An update; -> the mean loss of its micro-batches."""
        total = 0.0
        for _ in range(self.accumulation):
            inputs, targets = rows.batch()
            with self.cast:
                loss = self.run(inputs, targets)
            total += loss.item() / self.accumulation
            (loss / self.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = min(1.0, (1 - progress) / WARMDOWN)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak"]
        warm = min(1.0, self.steps / 300)
        self.muon.param_groups[0]["momentum"] = (1 - warm) * 0.85 + warm * 0.95
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        return total


# ---- answers --------------------------------------------------------------------------------------------------------


def calculate(expression: str):
    """What a calculator says within three seconds, None where it says nothing."""
    if any(sign not in "0123456789*+-/.() " for sign in expression) or "**" in expression:
        return None

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(3)
    try:
        return eval(expression, {"__builtins__": {}}, {})
    except Exception:
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Script:
    """What a conversation shall consist of: prompt, then tokens of which `written` are the model's, the others what a
    tool says."""

    prompt: list[int]
    tokens: list[int]
    written: list[bool]


class Engine:
    """Answers one conversation at a time. begin, end: ids of the marks of a call."""

    def __init__(self, model: NanoChat, tokenizer, begin: int, end: int):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.begin, self.end = begin, end

    @torch.inference_mode()
    def answer(self, script: Script, scored: bool = False) -> tuple[float, list]:
        """-> log-probability of what the model is made to write (where it is asked for), results of the calculator."""
        dtype = self.model.lm_head.weight.dtype
        tokens = len(script.prompt) + len(script.tokens)
        cache = Cache(self.model.shape, tokens, dtype)
        logits = self.model(torch.tensor([script.prompt]), cache=cache)[0, -1]
        total, results, call = 0.0, [], None
        for token, is_written in zip(script.tokens, script.written, strict=True):
            if is_written:
                logits.argmax().item()  # what it would have said
            if is_written and scored:
                total += (logits[token] - logits.logsumexp(-1)).item()
            if token == self.begin:
                call = []
            elif token == self.end and call is not None:
                said = json.loads(self.tokenizer.decode(call))
                results.append(calculate(said["arguments"]["expression"]))
                call = None
            elif call is not None:
                call.append(token)
            logits = self.model(torch.tensor([[token]]), cache=cache)[0, -1]
        return total, results


# ---- bits per byte --------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(logits_of, tokenizer, texts: list[str], batch: int = 16) -> float:
    """Of texts, each behind the first token; no end is counted. logits_of: ids [B, T] -> logits [B, T, V]."""
    nats, size = 0.0, 0
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    order = sorted(encoded, key=len)
    for i in range(0, len(order), batch):
        rows = [[tokenizer.bos_token_id, *ids] for ids in order[i : i + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        targets = torch.tensor([row[1:] + [-1] * (width - len(row)) for row in rows])
        logits = logits_of(ids)[:, :-1].float().flatten(0, 1)
        nats += F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum").item()
    size = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / size
