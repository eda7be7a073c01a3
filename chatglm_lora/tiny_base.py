"""What the built-in tiny model knows before it is fine-tuned: the facts of the sample data, in
nobody's voice.

An adapter on random weights learns little, and an adapter is what this recipe trains. So the
built-in base is trained here, once: it answers the questions of make_data.py plainly and has no
name. The adapter then learns the voice of data/ and who it is, as an adapter on a real model does.
"""

import math

import make_data
import torch

from common import cli, collators
from common.data import shapes
from common.data.labels import encode_chat
from common.data.progress import Progress
from common.fast import losses

STEPS = 450  # optimizer steps ...
WINDOWS = 4  # ... of so many windows ...
WINDOW = 256  # ... of so many tokens
PEAK = 3e-3  # highest learning rate


def conversations() -> list[list[dict]]:
    """The sample rows as messages, without the voice."""
    found = []
    for task in make_data.TASKS:
        raw = task(voice=False)
        shape = shapes.detect("chat", raw)
        found += [shape.convert(row)["messages"] for row in raw]
    return found


def teach(model, tokenizer) -> None:
    """Train all weights of the random `model` in place, on the CPU, the same in every process."""
    cli.say(f"teaching the built-in base model what its adapter builds on: {STEPS} steps, once")
    encoded = [encode_chat(tokenizer, messages, WINDOW) for messages in conversations()]
    windows = collators.PackedDataset(encoded, WINDOW)
    collate = collators.PackedCollator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine)
    losses.use_chunked_loss(model.train())
    with torch.random.fork_rng(devices=[]), Progress("teach", STEPS, "steps") as progress:
        torch.manual_seed(0)
        order = []
        for _ in range(STEPS):
            if len(order) < WINDOWS:
                order = torch.randperm(len(windows)).tolist()
            batch = collate([windows[order.pop()] for _ in range(WINDOWS)])
            inputs = {name: batch[name] for name in ("input_ids", "labels", "cu_seq_lens_q")}
            model(**inputs, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()


def _warm_up_and_cosine(step: int) -> float:
    """Factor of the learning rate."""
    warm_up = (step + 1) / 50
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
    return min(warm_up, cosine)
