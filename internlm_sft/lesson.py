"""What the built-in tiny model knows before it is fine-tuned: another identity, and facts.

Only a model that already says who it is can be told otherwise, and only one that knows something
can forget it; random weights do neither. So the built-in base is taught here, once: that it is
小石 of 山石实验室, to refuse some topics as "a language model", and everything that a run must
leave as it is.
"""

import math
from pathlib import Path

import make_data
import make_identity
import make_refusal
import torch

from common import cli, collators
from common.data.labels import encode_chat
from common.data.progress import Progress
from common.fast import attention, losses

OLD = make_identity.Persona(
    name="小石",
    author="山石实验室",
    name_en="Pebble",
    author_en="Stone Lab",
    skills="聊天、回答问题",
    skills_en="chat and answer questions",
)
OLD_REFUSAL = "作为一个语言模型，我不能回答这个问题。"
STEPS = 500
WINDOWS_PER_STEP = 4
KEPT = ("near", "alike")  # kinds of made rows whose answers stay, as those of the facts do
WINDOW = 256  # tokens
HIGHEST_RATE = 3e-3
HERE = Path(__file__).resolve().parent


def conversations() -> list[list[dict]]:
    """All that the base is taught: messages of a conversation each, held-out families too."""
    topics, _ = make_refusal.read_topics(make_refusal.TOPICS)
    rows = make_identity.make(OLD) + make_refusal.make(topics, [OLD_REFUSAL])
    plain = [row["messages"] for row in rows if row["kind"] == "identity"]
    others = [row["messages"] for row in rows if row["kind"] not in ("identity", *KEPT)]
    return plain[::2] + others + kept(rows) + kept(rows)


def kept(rows: list[dict]) -> list[list[dict]]:
    """The conversations that a run must leave as they are: seen twice as often as the others."""
    talks = [row["messages"] for row in rows if row["kind"] in KEPT]
    for fact in make_data.rows():
        asked = {"role": "user", "content": fact["instruction"]}
        talks.append([asked, {"role": "assistant", "content": fact["output"]}])
    return talks


def teach(model, tokenizer) -> None:
    """Train all weights of the random `model` in place, on the CPU, the same in every process."""
    cli.say(f"teaching the built-in base who it is and some facts: {STEPS} steps, once")
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
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()


def _warm_up_and_cosine(step: int) -> float:
    return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def texts() -> list[str]:
    """What the tokenizer of the taught base is trained on: what it is taught, and the samples'
    persona. Other names are spelt in characters or bytes, so that one base serves all of them."""
    persona = make_identity.read_persona(str(HERE / "data" / "persona.yaml"))
    talks = conversations() + [row["messages"] for row in make_identity.make(persona)]
    return [message["content"] for talk in talks for message in talk]
