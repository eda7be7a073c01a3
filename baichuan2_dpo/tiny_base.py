"""What the built-in tiny model knows before it is trained on preferences: both answers of every
sample pair.

Preference training moves a model between answers that it could give; random weights give none. So
the built-in base is trained here, once, on chosen and rejected answers alike: it knows the facts,
and is now polite, now curt, now long-winded, sometimes wrong. What preference training then changes
can be seen in its answers.
"""

import math

import make_data
import torch

from common import cli, collators
from common.data.labels import encode_chat
from common.fast import attention, losses

STEPS, WINDOW, WINDOWS, PEAK = (
    300,
    256,
    4,
    3e-3,
)  # optimizer steps of so many windows of tokens; highest learning rate


def conversations() -> list[list[dict]]:
    """Each pair of the samples as two conversations."""
    pairs = [row for task in make_data.TASKS for row in make_data.pairs(task)]
    answers = ("chosen", "rejected")
    return [
        [*row["prompt"], {"role": "assistant", "content": row[name]}]
        for row in pairs
        for name in answers
    ]


def teach(model, tokenizer) -> None:
    """Train all weights of the random `model` in place, on the CPU, the same in every process."""
    cli.say(
        f"teaching the built-in base model both answers of the sample pairs: {STEPS} steps, once"
    )
    encoded = [encode_chat(tokenizer, messages, WINDOW) for messages in conversations()]
    windows, collate, order = (
        collators.PackedDataset(encoded, WINDOW),
        collators.PackedCollator(),
        [],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine)
    model.set_attn_implementation(attention.register())
    losses.use_chunked_loss(model.train())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(STEPS):
            order = order if len(order) >= WINDOWS else torch.randperm(len(windows)).tolist()
            batch = collate([windows[order.pop()] for _ in range(WINDOWS)])
            del batch["row_ids"]
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _warm_up_and_cosine(step: int) -> float:
    return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
