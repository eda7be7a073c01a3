"""How MiniMind trains, told again in plain torch: what tests/bench/minimind.py compares this project with.

    python tests/bench/minimind_restated.py --check ../shared/golden/minimind_moe      # its model against the original
    python tests/bench/minimind_restated.py pretrain --data a.jsonl b.jsonl --tokenizer FOLDER --size 26m \
        --minutes 20 --eval_text held_out.jsonl --threads 1 --seed 0 [--output FOLDER]

Written from a description, in words of our own, with the choices that decide its speed: every document is a row of its
own, padded to the length of its stage; a row is turned into tokens each time it is asked for; attention looks at whole
padded rows, key and value heads written out once per query head; experts are gone through in a Python loop; logits of
all positions in fp32; AdamW as torch makes it by default, with decay on all parameters; a cosine without warm-up, from
1.0 to 0.1 of the rate, counted in micro-batches; a loss that is averaged per micro-batch; in DPO a second model that
scores each batch again. fp32 on a CPU. Left out: the system prompts and empty thoughts that it adds and drops at
random, since both sides of a comparison shall see the same tokens; YaRN.

`pretrain` prints one JSON line a minute: seconds and CPU seconds of training (without the evaluation), micro-batches,
updates, tokens that are not padding, and bits per byte of the held-out text.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100
STAGES = {  # as its scripts set them: tokens of a row, rows of a micro-batch, micro-batches of an update, learning rate
    "pretrain": {"length": 340, "batch": 32, "accumulation": 8, "rate": 5e-4},
    "sft": {"length": 768, "batch": 16, "accumulation": 1, "rate": 1e-5},
    "dpo": {"length": 1024, "batch": 4, "accumulation": 1, "rate": 4e-8},
}
SIZES = {  # hidden, layers, key/value heads, mixture of experts, generation
    "26m": (512, 8, 2, False, 2),
    "104m": (768, 16, 2, False, 2),
    "145m-moe": (640, 8, 2, True, 2),
    "64m": (768, 8, 4, False, 3),
    "198m-moe": (768, 8, 4, True, 3),
}


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Shape:
    """Fields that this model reads, under the names of the original's config."""

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float = 1e6
    use_moe: bool = False
    generation: int = 2
    num_experts: int = 4
    num_experts_per_tok: int | None = None
    n_shared_experts: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float | None = None
    seq_aux: bool = True

    def __post_init__(self):
        old = self.generation == 2
        usual = {
            "intermediate_size": 64 * math.ceil(int(self.hidden_size * 8 / 3) / 64) if old
            else 64 * math.ceil(self.hidden_size * math.pi / 64),
            "rms_norm_eps": 1e-5 if old else 1e-6,
            "num_experts_per_tok": 2 if old else 1,
            "n_shared_experts": 1 if old else 0,
            "router_aux_loss_coef": 0.01 if old else 5e-4,
        }  # fmt: skip
        for name, value in usual.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size


def shape_of(config: dict, **changes) -> Shape:
    """From an original's or this project's config.json; fields that decide nothing here are left out."""
    renames = {
        "_generation": "generation",
        "n_routed_experts": "num_experts",
        "aux_loss_alpha": "router_aux_loss_coef",
    }
    config = {renames.get(name, name): value for name, value in config.items()} | changes
    return Shape(
        **{name: value for name, value in config.items() if name in Shape.__dataclass_fields__}
    )


def named_shape(size: str, vocab: int, **changes) -> Shape:
    hidden, layers, groups, moe, generation = SIZES[size]
    found = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "use_moe": moe,
    }
    return Shape(**{"vocab_size": vocab, "generation": generation, **found, **changes})


class Norm(nn.Module):
    def __init__(self, size: int, shape: Shape):
        super().__init__()
        self.weight, self.eps, self.old = (
            nn.Parameter(torch.ones(size)),
            shape.rms_norm_eps,
            shape.generation == 2,
        )

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.type_as(x) if self.old else (self.weight * wide).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, d]; the second half of a head is turned with the first."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def written_out(x: Tensor, times: int) -> Tensor:
    """Key or value heads [B, T, K, d] -> [B, T, K * times, d]."""
    b, t, k, d = x.shape
    return (
        x if times == 1 else x[:, :, :, None].expand(b, t, k, times, d).reshape(b, t, k * times, d)
    )


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.groups = shape.num_attention_heads, shape.num_key_value_heads
        self.size = shape.hidden_size // self.heads
        wide, narrow = self.heads * self.size, self.groups * self.size
        self.q_proj = nn.Linear(shape.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            Norm(self.size, shape) if shape.generation == 3 else nn.Identity() for _ in range(2)
        )  # fmt: skip

    def forward(self, x, cos, sin, mask=None):
        b, t, _ = x.shape
        query = rotate(self.q_norm(self.q_proj(x).view(b, t, self.heads, self.size)), cos, sin)
        key = rotate(self.k_norm(self.k_proj(x).view(b, t, self.groups, self.size)), cos, sin)
        value = self.v_proj(x).view(b, t, self.groups, self.size)
        times = self.heads // self.groups
        query, key, value = (
            y.transpose(1, 2) for y in (query, written_out(key, times), written_out(value, times))
        )
        if mask is None or bool((mask == 1).all()):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.transpose(-2, -1) / math.sqrt(self.size)
            scores = scores + torch.full((t, t), -torch.inf, device=x.device).triu(1)
            scores = scores + (1.0 - mask[:, None, None, :].float()) * -1e9
            out = torch.softmax(scores.float(), -1).type_as(query) @ value
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A router and its experts; `aux` holds the balance loss of the last forward pass."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.aux = shape, None
        hidden, inner = shape.hidden_size, shape.moe_intermediate_size
        self.gate = nn.Linear(hidden, shape.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(hidden, inner) for _ in range(shape.num_experts))
        if shape.n_shared_experts:
            self.shared_experts = nn.ModuleList(
                FeedForward(hidden, inner) for _ in range(shape.n_shared_experts)
            )

    def forward(self, x):
        flat, chosen = x.reshape(-1, x.shape[-1]), self.shape.num_experts_per_tok
        scores = torch.softmax(self.gate(flat), -1)
        weight, index = torch.topk(scores, chosen, -1, sorted=False)
        if self.shape.norm_topk_prob and (chosen > 1 or self.shape.generation == 3):
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        self.aux = self.balance(scores, index, len(x)) if self.training else scores.new_zeros(())
        out = (self.repeated if self.shape.generation == 2 else self.picked)(
            flat, weight, index
        ).view_as(x)
        for expert in self.shared_experts if self.shape.n_shared_experts else ():
            out = out + expert(x)
        return out

    def picked(self, flat, weight, index):
        """Generation 3: each expert takes its tokens out and adds its answers in place."""
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mask = index == number
            if mask.any():
                rows = mask.any(-1).nonzero().flatten()
                out.index_add_(
                    0, rows, (expert(flat[rows]) * weight[mask].view(-1, 1)).to(out.dtype)
                )
            elif self.training:
                out[0, 0] += 0 * sum(p.sum() for p in expert.parameters())
        return out

    def repeated(self, flat, weight, index):
        """Generation 2: every token stands there once for each expert that it goes to."""
        copies, owner = flat.repeat_interleave(index.shape[1], 0), index.flatten()
        answers = torch.empty_like(copies)
        for number, expert in enumerate(self.experts):
            here = expert(copies[owner == number])
            answers[owner == number] = here.to(answers.dtype)
        return (answers.view(*weight.shape, -1) * weight[..., None]).sum(1)

    def balance(self, scores, index, batch):
        """Sum over experts of load times mean probability; padding counts as any token does."""
        shape, count = self.shape, self.shape.num_experts
        if shape.generation == 2 and shape.seq_aux:
            scores, index = scores.view(batch, -1, count), index.reshape(batch, -1)
            load = torch.zeros(batch, count).scatter_add_(
                1, index, torch.ones_like(index, dtype=torch.float32)
            )
            load = load * count / index.shape[1]
            return (load * scores.mean(1)).sum(1).mean() * shape.router_aux_loss_coef
        load = F.one_hot(index.flatten(), count).float().sum(0) / len(index)
        load = load / index.shape[1] if shape.generation == 2 else load
        return (load * scores.mean(0)).sum() * count * shape.router_aux_loss_coef


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn = Attention(shape)
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(shape.hidden_size, shape) for _ in range(2)
        )
        self.mlp = (
            Experts(shape)
            if shape.use_moe
            else FeedForward(shape.hidden_size, shape.intermediate_size)
        )

    def forward(self, x, cos, sin, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape, positions: int = 32768):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape)
        size = shape.hidden_size // shape.num_attention_heads
        speed = 1.0 / shape.rope_theta ** (torch.arange(0, size, 2).float() / size)
        angle = torch.outer(torch.arange(positions), speed).float()
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1), persistent=False)

    def forward(self, ids, mask=None):
        x, length = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length], mask)
        return self.norm(x)


class Restated(nn.Module):
    """ids [B, T] -> logits [B, T, V], the mean loss of labels [B, T] if given, the experts' balance loss."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.model = shape, Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.model.embed_tokens.weight = self.lm_head.weight

    def forward(self, ids, labels=None, mask=None):
        logits = self.lm_head(self.model(ids, mask))
        loss = None
        if labels is not None:
            shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
            loss = F.cross_entropy(
                shifted.view(-1, shifted.shape[-1]).float(), targets.view(-1), ignore_index=IGNORE
            )
        aux = sum((m.aux for m in self.modules() if isinstance(m, Experts)), logits.new_zeros(()))
        return logits, loss, aux

    def load(self, state: dict) -> "Restated":
        """Weights under the names of the original; the tied head may be there or not."""
        state = {name: value for name, value in state.items() if name in self.state_dict()}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        self.load_state_dict(state)
        return self


# ---- the rows -------------------------------------------------------------------------------------------------------


class Documents(torch.utils.data.Dataset):
    """{"text"} -> ids, labels [length]: bos, text, eos, padding."""

    def __init__(self, rows: list[dict], tokenizer, length: int = STAGES["pretrain"]["length"]):
        self.rows, self.tokenizer, self.length = rows, tokenizer, length

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        tok = self.tokenizer
        text = str(self.rows[index]["text"])
        ids = tok(
            text, add_special_tokens=False, max_length=self.length - 2, truncation=True
        ).input_ids
        ids = [tok.bos_token_id, *ids, tok.eos_token_id]
        ids = torch.tensor(ids + [tok.pad_token_id] * (self.length - len(ids)))
        labels = ids.clone()
        labels[ids == tok.pad_token_id] = IGNORE
        return ids, labels


class Answers:
    """Finds the assistant's turns by comparing lists of ids at every place, as the original does."""

    def __init__(self, tokenizer, end: str = "<|im_end|>\n"):
        self.begin = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
        self.end = tokenizer(end, add_special_tokens=False).input_ids

    def spans(self, ids: list[int]) -> list[tuple[int, int]]:
        found, i = [], 0
        while i < len(ids):
            if ids[i : i + len(self.begin)] != self.begin:
                i += 1
                continue
            start = stop = i + len(self.begin)
            while stop < len(ids) and ids[stop : stop + len(self.end)] != self.end:
                stop += 1
            found.append((start, min(stop + len(self.end), len(ids))))
            i = stop + len(self.end)
        return found


class Chats(torch.utils.data.Dataset):
    """{"conversations"} -> ids, labels [length]: the assistant's turns with their end are labels."""

    def __init__(
        self, rows, tokenizer, length: int = STAGES["sft"]["length"], end: str = "<|im_end|>\n"
    ):
        self.rows, self.tokenizer, self.length = rows, tokenizer, length
        self.answers = Answers(tokenizer, end)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        tok = self.tokenizer
        text = tok.apply_chat_template(
            self.rows[index]["conversations"], tokenize=False, add_generation_prompt=False
        )
        ids = tok(text, add_special_tokens=False).input_ids[: self.length]
        ids += [tok.pad_token_id] * (self.length - len(ids))
        labels = [IGNORE] * len(ids)
        for start, stop in self.answers.spans(ids):
            labels[start:stop] = ids[start:stop]
        return torch.tensor(ids), torch.tensor(labels)


class Pairs(torch.utils.data.Dataset):
    """{"chosen", "rejected"} -> for each of them ids [length - 1], targets one place on, 1 where a target counts."""

    def __init__(
        self, rows, tokenizer, length: int = STAGES["dpo"]["length"], end: str = "<|im_end|>\n"
    ):
        self.rows, self.tokenizer, self.length = rows, tokenizer, length
        self.answers = Answers(tokenizer, end)

    def __len__(self):
        return len(self.rows)

    def side(self, messages):
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False
        )
        ids = self.tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=self.length, padding="max_length",
            padding_side="right",
        ).input_ids  # fmt: skip
        counts = [0] * len(ids)
        for start, stop in self.answers.spans(ids):
            counts[start:stop] = [1] * (stop - start)
        return torch.tensor(ids[:-1]), torch.tensor(ids[1:]), torch.tensor(counts[1:])

    def __getitem__(self, index):
        row = self.rows[index]
        return *self.side(row["chosen"]), *self.side(row["rejected"])


ROWS = {"pretrain": Documents, "sft": Chats, "dpo": Pairs}


# ---- the loop -------------------------------------------------------------------------------------------------------


def rate_at(progress: float, rate: float) -> float:
    """progress: share of all micro-batches that are done."""
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def logprobs(model: Restated, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target [B, T], from a log-softmax over all logits; and the balance loss."""
    logits, _, aux = model(ids)
    return torch.log_softmax(logits.float(), -1).gather(2, targets[..., None]).squeeze(-1), aux


def preference_loss(
    policy: Tensor, reference: Tensor, counts: Tensor, beta: float = 0.15
) -> Tensor:
    """Log-probabilities [2B, T], chosen rows first, and where they count; sums over a row, no division by lengths."""
    policy, reference = ((x * counts).sum(1).chunk(2) for x in (policy, reference))
    return -F.logsigmoid(beta * ((policy[0] - policy[1]) - (reference[0] - reference[1]))).mean()


class Loop:
    """Micro-batches in, an update after every `accumulation` of them.

    half: autocast to bf16, which the original does on accelerators only.
    """

    def __init__(
        self, model, stage, accumulation=None, rate=None, total=None, reference=None, half=False
    ):
        usual = STAGES[stage]
        self.model, self.stage, self.reference, self.total = model.train(), stage, reference, total
        self.accumulation, self.rate = accumulation or usual["accumulation"], rate or usual["rate"]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate)
        self.steps = self.updates = 0
        self.cast = torch.autocast("cpu", torch.bfloat16, enabled=half)

    def loss(self, batch) -> Tensor:
        """The loss of a micro-batch, balance loss included."""
        if self.stage != "dpo":
            _, loss, aux = self.model(*batch)
            return loss + aux
        ids, targets, counts = (torch.cat(pair) for pair in zip(batch[:3], batch[3:], strict=True))
        with torch.no_grad():
            reference, _ = logprobs(self.reference, ids, targets)
        policy, aux = logprobs(self.model, ids, targets)
        return preference_loss(policy, reference, counts) + aux

    def step(self, batch, progress: float | None = None) -> float:
        rate = rate_at(self.steps / self.total if progress is None else progress, self.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.cast:
            loss = self.loss(batch) / self.accumulation
        loss.backward()
        self.steps += 1
        if self.steps % self.accumulation == 0:
            self.update()
        return loss.item() * self.accumulation

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1


# ---- pre-training by the clock --------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(
    model: Restated, documents: list[list[int]], texts: list[str], batch: int = 16
) -> float:
    """Of bos + text + eos, the end being one of the tokens that are predicted; bytes are those of the texts."""
    nats, was = 0.0, model.training
    model.eval()
    order = sorted(documents, key=len)
    for i in range(0, len(order), batch):
        rows = order[i : i + batch]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
        logits = model(ids)[0][:, :-1].flatten(0, 1).float()
        nats += F.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
    model.train(was)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def read_texts(paths: list[str]) -> list[str]:
    """The texts of .jsonl files ({"text"} a line) and of other files, a document a line."""
    texts = []
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        texts += [
            json.loads(line)["text"] if path.endswith(".jsonl") else line
            for line in lines
            if line.strip()
        ]
    return texts


def endless(rows, batch: int, seed: int):
    """Micro-batches of shuffled rows, epoch after epoch."""
    epoch = 0
    while True:
        shuffle = torch.Generator().manual_seed(seed + epoch)
        yield from torch.utils.data.DataLoader(rows, batch, shuffle=True, generator=shuffle)
        epoch += 1


def pretrain(args) -> None:
    """Trains for args.minutes; the share of the time that is gone takes the place of the share of the steps."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(args.tokenizer)
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    model = Restated(named_shape(args.size, len(tok), **changes))
    rows = Documents([{"text": text} for text in read_texts(args.data)], tok)
    held_out = read_texts([args.eval_text])[: args.eval_rows or None]
    documents = [
        [tok.bos_token_id, *tok(t, add_special_tokens=False).input_ids, tok.eos_token_id]
        for t in held_out
    ]
    loop = Loop(model, "pretrain", args.accumulation, args.rate)
    wall = cpu = tokens = 0.0
    minute, end, losses = 0, args.minutes * 60, []
    for batch in endless(rows, args.batch, args.seed):
        at = time.time(), time.process_time()
        used = cpu if args.clock == "cpu" else wall
        losses.append(loop.step(batch, min(1.0, used / end)))
        wall, cpu = wall + time.time() - at[0], cpu + time.process_time() - at[1]
        used = cpu if args.clock == "cpu" else wall
        if used >= end and loop.steps % loop.accumulation:
            loop.update()  # what is left over at the end is used too
        tokens += int((batch[1] != IGNORE).sum())
        if used >= min(end, 60 * (minute + 1)):
            minute = int(used // 60)
            line = {"seconds": wall, "cpu_seconds": cpu, "steps": loop.steps, "updates": loop.updates,
                    "real_tokens": int(tokens), "loss": sum(losses) / len(losses),
                    "held_out_bits_per_byte": bits_per_byte(model, documents, held_out)}  # fmt: skip
            print(
                json.dumps(
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
                ),
                flush=True,
            )
            losses = []
        if used >= end:
            break
    if args.output:
        save(model, tok, Path(args.output))


def save(model: Restated, tok, folder: Path) -> None:
    """Weights under the original's names, for this project's eval.py, and the tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {name: value for name, value in vars(model.shape).items() if value is not None}
    more = {"model_type": "minimind", "tie_word_embeddings": True, "bos_token_id": tok.bos_token_id,
            "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields | more, indent=2))
    tok.save_pretrained(folder)


# ---- against the original's numbers ---------------------------------------------------------------------------------


def check(folder: Path) -> bool:
    """Largest differences from a folder of golden numbers; whether all are small."""
    import numpy
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    arrays = numpy.load(folder / "cases.npz")
    good = True
    for case in sorted({name.split("__")[0] for name in arrays.files}):
        found = {
            name.split("__")[1]: arrays[name]
            for name in arrays.files
            if name.startswith(f"{case}__")
        }
        if case == "yarn" or "sequences" in found:
            continue
        model = Restated(shape_of(config)).load(load_file(folder / "weights.safetensors"))
        line = compare(
            model, {k: torch.from_numpy(v) if v.dtype.kind != "U" else v for k, v in found.items()}
        )
        good &= all(value < (1e-4 if "grad" in name else 5e-5) for name, value in line.items())
        print(json.dumps({"case": case, **line}))
    return good


def compare(model: Restated, case: dict) -> dict:
    mask, line = case.get("attention_mask"), {}
    logits = model.eval()(case["input_ids"], case.get("labels"), mask)[0]
    real = torch.ones_like(case["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    if "logits" in case:
        line["logits"] = (logits - case["logits"])[real].abs().max().item()
    if "logits_last12" in case:
        line["logits"] = (logits[:, -12:] - case["logits_last12"]).abs().max().item()
    if "train_loss" in case:
        _, loss, aux = model.train()(case["input_ids"], case["labels"])
        line |= {
            "loss": abs(loss - case["train_loss"]).item(),
            "aux": abs(aux - case["train_aux_loss"]).item(),
        }
        (loss + aux).backward()
        norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
        pairs = [(norms[n if n in norms else "lm_head.weight"], want)
                 for n, want in zip(case["grad_names"], case["grad_norms_total"], strict=True)]  # fmt: skip
        line["grad"] = max(abs(a - b).item() / max(b.item(), 1e-6) for a, b in pairs)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=["pretrain"])
    parser.add_argument(
        "--check", metavar="FOLDER", help="compare the model with golden numbers instead"
    )
    parser.add_argument("--data", nargs="+", help="text files")
    parser.add_argument("--tokenizer", help="folder")
    parser.add_argument("--size", default="26m", choices=SIZES)
    parser.add_argument("--layers", type=int, default=0, help="another number of layers")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="whose minutes; cpu: on a busy machine",
    )
    parser.add_argument("--eval_text", help="held-out documents, not in --data")
    parser.add_argument("--eval_rows", type=int, default=0, help="only the first ones; 0: all")
    parser.add_argument(
        "--batch", type=int, default=STAGES["pretrain"]["batch"], help="rows of a micro-batch"
    )
    parser.add_argument("--accumulation", type=int, default=STAGES["pretrain"]["accumulation"])
    parser.add_argument("--rate", type=float, default=STAGES["pretrain"]["rate"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the trained model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.check:
        return 0 if check(Path(args.check)) else 1
    if not (args.stage and args.data and args.tokenizer and args.eval_text):
        parser.error("pretrain needs --data, --tokenizer and --eval_text")
    pretrain(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
