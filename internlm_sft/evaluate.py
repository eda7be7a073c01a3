"""What a model says of itself, declines and still knows, in one table.

    python internlm_sft/evaluate.py                        # the run in output/, before and after
    python internlm_sft/evaluate.py --model models/internlm2 --name 小埋 --author 良睦路程序员
    python internlm_sft/evaluate.py --endpoint http://127.0.0.1:8000/v1 --name 小埋 --author …

--model: a run, model or adapter folder, or a hub id; of an adapter the base is asked too.
--endpoint: any OpenAI-compatible server; what it serves has no perplexity and no KL here.
--general: rows whose answers are known, e.g. held-out ones; default: the samples'.

Questions are those of the families that make_identity.py and make_refusal.py hold out (--seed), so
a model that was trained on their rows has not seen them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
import make_identity
import make_refusal
import measures
import requests

from common import cli, device  # noqa: F401  (device before torch and transformers)
from common.data.labels import encode_chat
from common.data.load import load_rows, summary
from common.runs import flags

DEFAULT = HERE.parent / "output" / HERE.name
PATIENCE = 120  # seconds for one answer of a server
WINDOW = 1024  # tokens of a general row
NAMES = ("name", "author", "name_en", "author_en")  # flags


# ---- who is asked --------------------------------------------------------------------------------


def persona_of(settings: dict, file: str = "", **given: str | None) -> make_identity.Persona:
    """From a YAML file and fields that are given; else from the run that left the model; else the
    samples'."""
    if file or any(given.values()):
        return make_identity.read_persona(file, **given)
    known = settings.get("persona")
    if isinstance(known, dict):
        names = {field.name for field in fields(make_identity.Persona)}
        return make_identity.Persona(**{k: v for k, v in known.items() if k in names})
    return make_identity.read_persona(str(HERE / "data" / "persona.yaml"))


def topics_of(settings: dict, topics: str = "", style: str = "") -> tuple[list[dict], list[str]]:
    """What is to be declined, and how: a YAML file and texts that are given; else those of the run
    that left the model; else the samples'."""
    if topics:
        return make_refusal.read_topics(topics, style)
    known = settings.get("topics") or str(make_refusal.TOPICS)
    if not Path(known).is_file():
        cli.say(
            f"warning: {known}, which the run was given, is gone; asked are the samples' topics"
        )
        known = str(make_refusal.TOPICS)
    return make_refusal.read_topics(known, style or settings.get("style") or "")


def say_unused(args) -> None:
    """A line for the flags that have no effect."""
    if args.endpoint:
        flags.say_unused(["model"], "--endpoint is asked")
    else:
        flags.say_unused(["model_id"], "there is no --endpoint")


def of_server(endpoint: str, name: str, prompts: list[list[dict]], most: int) -> list[str]:
    """Greedy answers of an OpenAI-compatible server, one question after another."""
    headers = {}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    answers = []
    for messages in prompts:
        body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": most}
        address = f"{endpoint.rstrip('/')}/chat/completions"
        try:
            reply = requests.post(
                address, json=body, headers=headers, timeout=PATIENCE, allow_redirects=False
            )
            reply.raise_for_status()
            answers.append(reply.json()["choices"][0]["message"]["content"] or "")
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            line = " ".join(str(error).split())[:200]
            raise SystemExit(f"--endpoint {endpoint}: no answer ({line})") from None
    return answers


def of_folder(chat, asked: list[dict], general: list[dict], who: tuple, most: int) -> list[dict]:
    """Metrics of a loaded model: of an adapter those of its base, then its own."""
    from asking import Asked

    tokens = token_rows(chat.tokenizer, general)
    seen = Asked(chat.model, chat.tokenizer, asked, who, most, tokens)
    found = []
    if chat.adapter:
        with chat.model.disable_adapter():
            found.append(seen.without_base() | perplexity(chat.model, tokens))
    metrics, _ = seen()
    return [*found, metrics | perplexity(chat.model, tokens)]


def token_rows(tokenizer, general: list[dict]) -> list[dict]:
    """Those of the general rows that the chat template writes; Asked tells of the others."""
    found = []
    for row in general:
        try:
            found.append(encode_chat(tokenizer, row["messages"], WINDOW, row.get("tools")))
        except ValueError:
            continue
    return [row for row in found if row]


def perplexity(model, rows: list[dict]) -> dict[str, float]:
    """Of the answers of general rows, per label token."""
    import torch

    from common.data.counts import label_index

    total = 0.0
    count = 0
    for row in rows:
        index = label_index(torch.tensor([row["labels"]]))
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), logits_to_keep=index.to(model.device))
        targets = ids[0, index + 1].to(model.device)
        total += float(
            torch.nn.functional.cross_entropy(logits.logits[0].float(), targets, reduction="sum")
        )
        count += len(index)
    return {"perplexity": math.exp(min(50, total / count))} if count else {}


# ---- the table -----------------------------------------------------------------------------------


def table(columns: dict[str, dict]) -> str:
    """{title: metrics} -> Markdown, a metric a line."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        cells = [f"{m[name]:.4f}" if name in m else "-" for m in columns.values()]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(DEFAULT), help="run, model or adapter folder, or a hub id")
    add("--endpoint", default="", help="an OpenAI-compatible server instead, e.g. http://…/v1")
    add("--model_id", default="default", help="what the server calls the model")
    for name in NAMES:
        add(f"--{name}", help="as in make_identity.py; default: of the run, else the samples'")
    add("--persona", default="", help="YAML file")
    add("--topics", default="", help="YAML file; default: of the run, else the samples'")
    add("--style", default="", help="texts of the refusal with |; default: as the topics")
    add("--general", default=str(HERE / "data" / "general.jsonl"), help="rows with known answers")
    add("--most", type=int, default=64, help="questions of a kind and language")
    add("--max_new_tokens", type=int, default=128)
    add("--seed", type=int, default=0, help="of make_identity.py and make_refusal.py")
    add("--output", default="", help="a JSON file for the figures")
    args = parser.parse_args()
    cli.quiet_libraries()
    say_unused(args)
    chat = None
    if not args.endpoint:
        import published  # noqa: F401  (InternLM's own layout is answered with its conversion)

        from common.demo.chat_model import ChatModel

        chat = ChatModel(args.model)
    settings = chat.settings if chat else {}
    persona = persona_of(settings, args.persona, **{name: getattr(args, name) for name in NAMES})
    topics, texts = topics_of(settings, args.topics, args.style)
    rows, stats = load_rows(args.general, "chat")
    cli.say(summary(stats))
    general = [json.loads(row) for row in measures.spread(rows["row"], args.most)]
    asked = measures.questions(persona, topics, texts, general, args.most, args.seed)
    if chat:
        found = of_folder(chat, asked, general, (persona, texts), args.max_new_tokens)
        titles = ["before", "after"] if chat.adapter else [chat.name]
    else:
        prompts = measures.prompts(asked)
        answers = of_server(args.endpoint, args.model_id, prompts, args.max_new_tokens)
        found = [measures.score(asked, answers, persona, texts)]
        titles = [args.model_id]
    columns = dict(zip(titles, found, strict=True))
    cli.say(f"{len(asked)} questions, name {' / '.join(persona.names())}\n{table(columns)}")
    if args.output:
        text = json.dumps(columns, indent=1, ensure_ascii=False)
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
