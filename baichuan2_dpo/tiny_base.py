"""The built-in tiny model, and what it knows before it is trained on preferences: both answers of
every sample pair.

Preference training moves a model between answers that it could give; random weights give none. So
the built-in base is trained here, once, on chosen and rejected answers alike: it knows the facts,
and is now polite, now curt, now long-winded, sometimes wrong. What preference training then changes
can be seen in its answers.
"""

import json
import math
import time
from functools import partial
from pathlib import Path

import make_data
import torch
from transformers import LlamaConfig

from common import cli, collators, tiny
from common.data.cache import cache_root
from common.data.labels import encode_chat
from common.data.progress import Progress
from common.fast import attention, losses

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
STEPS = 300
WINDOWS_PER_STEP = 4
WINDOW = 256  # tokens
HIGHEST_RATE = 3e-3
HERE = Path(__file__).resolve().parent


def tiny_model(rows: list[str], taught: bool) -> str:
    """Folder of the embedded default: Baichuan2-7B's architecture at toy size, its tokenizer
    trained on the data at hand.

    taught: it gives both answers of the sample pairs (see `teach`); else its weights are random.
    """
    texts = []
    for row in map(json.loads, rows):
        for side in ("prompt", "chosen", "rejected"):
            texts += [message["content"] for message in row[side]]
    tokenizer = tiny.make_tokenizer(
        texts,
        vocab_size=4000,
        special_tokens=SPECIAL_TOKENS,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=(HERE / "templates" / "baichuan2.jinja").read_text(encoding="utf-8"),
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    lesson = None
    if taught:
        lesson = partial(teach, tokenizer=tokenizer)
        if not cli.is_main():
            time.sleep(1)  # whoever comes first teaches, and only rank 0 shows how far it is
    return tiny.save_tiny(config, tokenizer, cache_root() / "tiny", teach=lesson)


def conversations() -> list[list[dict]]:
    """Each pair of the samples as two conversations."""
    found = []
    for task in make_data.TASKS:
        for pair in make_data.pairs(task):
            for side in ("chosen", "rejected"):
                answer = {"role": "assistant", "content": pair[side]}
                found.append([*pair["prompt"], answer])
    return found


def teach(model, tokenizer) -> None:
    """Train all weights of the random `model` in place, on the CPU, the same in every process."""
    cli.say(
        f"teaching the built-in base model both answers of the sample pairs: {STEPS} steps, once"
    )
    encoded = [encode_chat(tokenizer, messages, WINDOW) for messages in conversations()]
    windows = collators.PackedDataset(encoded, WINDOW)
    collate = collators.PackedCollator()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=HIGHEST_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine)
    model.set_attn_implementation(attention.register())
    losses.use_chunked_loss(model.train())
    with torch.random.fork_rng(devices=[]), Progress("teach", STEPS, "steps") as progress:
        torch.manual_seed(0)
        order = []
        for _ in range(STEPS):
            if len(order) < WINDOWS_PER_STEP:
                order = torch.randperm(len(windows)).tolist()
            batch = collate([windows[order.pop()] for _ in range(WINDOWS_PER_STEP)])
            del batch["row_ids"]
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()


def _warm_up_and_cosine(step: int) -> float:
    return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
