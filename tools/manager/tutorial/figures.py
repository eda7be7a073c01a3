"""What each figure of the tutorial shows: computed by the recipe's own code on a loaded model.

T tokens, E experts, V vocabulary, D width, d size of a head.
"""

from __future__ import annotations

import json
import math

import torch
from model import SparseFeedForward, build, config_of, frequencies, rotate
from rl.losses import grpo
from toolcall.calls import read_call
from toolcall.tools import built_in
from torch import Tensor
from torch.nn import functional as F

from common.data.labels import encode_chat, encode_prompt
from common.data.spelling import IGNORE
from tools.manager.tutorial.lesson import SEEN, Lesson, Misfit, forward

MOST = 256  # tokens of a text
ROW = 40  # tokens of a figure that has a cell for each pair
NEIGHBOURS = 10
CANDIDATES = 20
FORMATS = {  # bits of a weight, with the scales that a block of 32 shares
    "fp32": 32,
    "bf16 / fp16": 16,
    "GGUF Q8_0": 8.5,
    "GGUF Q4_0": 4.5,
}


# ---- text and its numbers ------------------------------------------------------------------------


def tokens(lesson: Lesson, text: str) -> dict:
    ids = lesson.encode(text, MOST)
    special = set(lesson.tokenizer.all_special_ids)
    return {
        "tokens": [
            {
                "id": number,
                "text": lesson.piece(number),
                "bytes": lesson.raw(number).hex(" "),
                "special": number in special,
            }
            for number in ids
        ],
        "characters": len(text),
        "bytes": len(text.encode()),
        "vocabulary": len(lesson.tokenizer),
    }


def embedding(lesson: Lesson, text: str, chosen: int) -> dict:
    """The nearest tokens of one, and its neighbourhood drawn in the two directions in which it
    spreads most."""
    ids = lesson.encode(text, MOST)
    if chosen >= len(ids):
        raise Misfit(f"the text has {len(ids)} tokens", "chosen")
    table = lesson.model.get_input_embeddings().weight.float()[: len(lesson.tokenizer)]
    unit = F.normalize(table, dim=-1)
    cosine = unit @ unit[ids[chosen]]
    cosine[ids[chosen]] = -2  # itself
    nearest = cosine.topk(NEIGHBOURS).indices.tolist()
    shown = list(dict.fromkeys([*ids, *nearest]))
    places = flattened(table[shown])
    return {
        "tokens": lesson.pieces(ids),
        "width": table.shape[1],
        "norm": table[ids[chosen]].norm().item(),
        "neighbours": [
            {"id": number, "text": lesson.piece(number), "cosine": cosine[number].item()}
            for number in nearest
        ],
        "points": [
            {"text": lesson.piece(number), "x": x, "y": y, "own": number in ids}
            for number, (x, y) in zip(shown, places, strict=True)
        ],
    }


def flattened(rows: Tensor) -> list[list[float]]:
    """rows [n, D] -> [n, 2], the first two principal components."""
    centred = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    flat = u[:, :2] * s[:2]
    return F.pad(flat, (0, 2 - flat.shape[1])).tolist()


# ---- layers --------------------------------------------------------------------------------------


def attention(lesson: Lesson, text: str, layer: int, head: int) -> dict:
    ids = lesson.encode(text, ROW)
    forward(lesson, ids)
    layers = len(SEEN)
    if layer >= layers:
        raise Misfit(f"the model has {layers} layers", "layer")
    heads = len(SEEN[layer])
    if head >= heads:
        raise Misfit(f"a layer has {heads} heads", "head")
    return {
        "tokens": lesson.pieces(ids),
        "layers": layers,
        "heads": heads,
        "weights": rounded(SEEN[layer][head]),
    }


def rope(lesson: Lesson, position: int, distance: int) -> dict:
    """How far each pair of numbers is turned at a position; and what a query finds in a key that
    stands `distance` before it, wherever both are."""
    config = lesson.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = base_of(config)
    speed = frequencies(size, theta, False, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=generator)
    places = torch.arange(0, 65)
    curve = products(vector, speed, places, torch.zeros(1))
    starts = torch.arange(0, 513, 32)
    moved = products(vector, speed, starts + distance, starts)
    return {
        "size": size,
        "base": theta,
        "pairs": [
            {
                "wavelength": 2 * math.pi / one,
                "angle": (position * one) % (2 * math.pi),
                "turns": position * one / (2 * math.pi),
            }
            for one in speed.tolist()
        ],
        "curve": points(places, curve),
        "moved": points(starts, moved),
    }


def base_of(config) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    base = getattr(config, "rope_theta", None) or parameters.get("rope_theta")
    if not base:
        raise Misfit("this model has no rotary positions", "weights")
    return float(base)


def products(vector: Tensor, speed: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The same vector [d] turned to positions of queries and of keys -> their cosines."""

    def turned(places: Tensor) -> Tensor:
        angle = places[:, None] * speed
        both = torch.cat([angle, angle], -1)
        return rotate(vector.expand(len(places), -1), both.cos(), both.sin())

    return F.cosine_similarity(turned(queries.float()), turned(keys.float()), dim=-1)


def experts(lesson: Lesson, text: str, layer: int) -> dict:
    """Which experts each token of a text goes through in one layer."""
    ids = lesson.encode(text, ROW)
    sparse = [one for one in lesson.model.modules() if isinstance(one, SparseFeedForward)]
    if layer >= len(sparse):
        raise Misfit(f"the model has {len(sparse)} layers with experts", "layer")
    heard = []
    gate = sparse[layer].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        forward(lesson, ids)
    finally:
        gate.remove()
    config = lesson.model.config
    scores = F.linear(heard[0][0].float(), sparse[layer].gate.weight.float()).softmax(-1)
    _, chosen = sparse[layer].choose(scores)
    sent = F.one_hot(chosen, config.num_experts).sum((0, 1)).float()
    whole = sum(p.numel() for p in lesson.model.parameters())
    idle = config.num_experts - config.num_experts_per_tok
    per_expert = sum(p.numel() for p in sparse[0].experts[0].parameters())
    return {
        "tokens": lesson.pieces(ids),
        "layers": len(sparse),
        "experts": config.num_experts,
        "picks": config.num_experts_per_tok,
        "probabilities": rounded(scores),
        "chosen": chosen.tolist(),
        "shares": (sent / sent.sum()).tolist(),
        "parameters": whole,
        "active": whole - idle * per_expert * len(sparse),
    }


# ---- training ------------------------------------------------------------------------------------


def next_token(lesson: Lesson, text: str, temperature: float, top_k: int, top_p: float) -> dict:
    ids = lesson.encode(text, MOST)
    plain = forward(lesson, ids)[-1, : len(lesson.tokenizer)].softmax(-1)
    drawn = sampled(plain, temperature, top_k, top_p)
    best = plain.topk(CANDIDATES).indices.tolist()
    bits = -(plain * plain.clamp(min=1e-12).log2()).sum().item()
    return {
        "tokens": lesson.pieces(ids),
        "candidates": [
            {
                "id": number,
                "text": lesson.piece(number),
                "probability": plain[number].item(),
                "sampled": drawn[number].item(),
            }
            for number in best
        ],
        "rest": 1 - plain[best].sum().item(),
        "kept": int((drawn > 0).sum()),
        "vocabulary": len(plain),
        "entropy": bits,
    }


def sampled(plain: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] -> those that are drawn from: sharpened, then the likeliest k, then the
    fewest that make up p."""
    found = (plain.clamp(min=1e-30).log() / temperature).softmax(-1)
    ordered, order = found.sort(descending=True)
    if top_k:
        ordered[top_k:] = 0
    ordered = ordered / ordered.sum()
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p] = 0
    return torch.zeros_like(found).scatter(0, order, ordered / ordered.sum())


def row_loss(lesson: Lesson, question: str, answer: str) -> dict:
    """A row of fine-tuning token by token: what has a label, and how surprised the model is."""
    row = encoded(lesson, question, answer)
    ids = row["input_ids"]
    losses = token_losses(lesson, ids)
    is_label = [label != IGNORE for label in row["labels"]]
    trained = [loss for loss, label in zip(losses, is_label, strict=True) if label]
    mean = sum(trained) / len(trained)
    return {
        "tokens": [
            {"text": text, "label": label, "loss": loss, "probability": math.exp(-loss)}
            for text, label, loss in zip(lesson.pieces(ids), is_label, losses, strict=True)
        ],
        "loss": mean,
        "perplexity": math.exp(mean),
        "labels": len(trained),
        "uniform": math.log(len(lesson.tokenizer)),
    }


def encoded(lesson: Lesson, question: str, answer: str, param: str = "answer") -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        row = encode_chat(lesson.tokenizer, turns, 2 * MOST)
    except (SystemExit, ValueError) as error:
        raise Misfit(str(error), "weights") from None
    if row is None or row["truncated"]:
        raise Misfit(f"question and answer have more than {2 * MOST} tokens", param)
    return row


def token_losses(lesson: Lesson, ids: list[int]) -> list[float]:
    """Cross entropy of each token after those before it, in nats; 0 for the first."""
    logits = forward(lesson, ids)[:-1]
    return [0.0, *F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()]


def dpo(
    lesson: Lesson,
    prompt: str,
    chosen: str,
    rejected: str,
    beta: float,
    gained_chosen: float,
    gained_rejected: float,
) -> dict:
    """The loss over the margin, and where a pair stands on it. At the start of training policy and
    reference are the same model: nothing is gained, and the loss is log 2."""
    margin = beta * (gained_chosen - gained_rejected)
    grid = torch.linspace(-6, 6, 97)
    return {
        "chosen": answer_log_prob(lesson, prompt, chosen, "chosen"),
        "rejected": answer_log_prob(lesson, prompt, rejected, "rejected"),
        "margin": margin,
        "loss": -F.logsigmoid(torch.tensor(margin, dtype=torch.float64)).item(),
        "pull": beta * torch.sigmoid(torch.tensor(-margin, dtype=torch.float64)).item(),
        "curve": points(grid, -F.logsigmoid(grid)),
        "pulls": points(grid, beta * torch.sigmoid(-grid)),
    }


def answer_log_prob(lesson: Lesson, prompt: str, answer: str, param: str) -> dict:
    row = encoded(lesson, prompt, answer, param)
    pairs = zip(token_losses(lesson, row["input_ids"]), row["labels"], strict=True)
    trained = [-loss for loss, label in pairs if label != IGNORE]
    return {"log_prob": sum(trained), "tokens": len(trained)}


def rl(lesson: Lesson, rewards: list[float]) -> dict:
    """The advantages of the answers to one prompt, as the algorithms that compare a group have
    them."""
    group = torch.tensor([rewards], dtype=torch.float64)
    return {
        "mean": group.mean().item(),
        "deviation": group.std().item(),
        "grpo": grpo.advantages(group, True)[0].tolist(),
        "reinforce": grpo.advantages(group, False)[0].tolist(),
        "silent": bool(grpo.without_signal(group)[0]),
    }


# ---- use -----------------------------------------------------------------------------------------


def tools(lesson: Lesson, question: str, call: str) -> dict:
    """A call step by step: the prompt, what the model writes, what the tool gives, the next
    prompt."""
    registry = built_in()
    asked = [{"role": "user", "content": question}]
    found = read_call(call.strip())
    result = registry.answer(found)
    steps = [{"kind": "prompt", "text": prompt_text(lesson, asked, registry.schemas)}]
    steps.append({"kind": "call", "text": f"<tool_call>\n{call.strip()}\n</tool_call>"})
    steps.append({"kind": "result", "text": result})
    if not found.problem:
        function = {"name": found.name, "arguments": found.arguments}
        said = {"role": "assistant", "content": ""}
        said["tool_calls"] = [{"type": "function", "function": function}]
        told = {"role": "tool", "content": result}
        again = prompt_text(lesson, [*asked, said, told], registry.schemas)
        steps.append({"kind": "again", "text": again})
    return {
        "steps": steps,
        "problem": found.problem or registry.problem(found.name, found.arguments),
        "tools": [tool["function"]["name"] for tool in registry.schemas],
        "failed": "error" in parsed(result),
    }


def prompt_text(lesson: Lesson, messages: list[dict], schemas: list[dict]) -> str:
    try:
        ids = encode_prompt(lesson.tokenizer, messages, schemas)
    except (SystemExit, ValueError) as error:
        raise Misfit(str(error), "weights") from None
    return lesson.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def parsed(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def deploy(lesson: Lesson, size: str, context: int, batch: int) -> dict:
    """Bytes of a model's weights by format, and of the keys and values of a batch."""
    config = config_of(size)
    with torch.device("meta"):
        model = build(size)
    count = sum(p.numel() for p in model.parameters())
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    unshared = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return {
        "parameters": count,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "shared_heads": config.num_key_value_heads,
        "formats": [{"name": name, "bytes": count * bits / 8} for name, bits in FORMATS.items()],
        "cache": per_token * 2 * context * batch,  # two bytes a number
        "cache_unshared": unshared * 2 * context * batch,
        "training": count * 16,  # master weight, gradient and two moments of AdamW in float32
    }


# ---- numbers -------------------------------------------------------------------------------------


def rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in matrix.tolist()]


def points(x: Tensor, y: Tensor) -> list[list[float]]:
    return torch.stack([x.double(), y.double()], -1).tolist()


FIGURES = {
    figure.__name__: figure
    for figure in (
        tokens,
        embedding,
        attention,
        rope,
        experts,
        next_token,
        row_loss,
        dpo,
        rl,
        tools,
        deploy,
    )
}
