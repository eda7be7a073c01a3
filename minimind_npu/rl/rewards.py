"""What an answer is worth: a weighted sum of rules, tests that its code passes, a reward model, a
judge, and functions of the user's own.

    rewards = Rewards.of(args)              # "exact:1 repetition:0.2 my_reward.py:0.5"
    total, parts = rewards(answers)

A reward that cannot be had (a function that raises, takes too long or returns no number; a judge
that says none) is NaN, counted by its reason, and its answer takes no part in the update. A step
without any reward ends the run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from evaluation.answers import numbers, same
from rl.code_tests import CodeTests
from rl.user_function import UserFunction
from stages.reason import IN_FORM
from torch import Tensor

from common import cli, device

GRAM = 4  # characters: words have no blanks between them in Chinese
NONE = float("nan")
PARTS = ("code", "model", "judge")  # beside rules and files of the user's
JUDGES = 8  # questions that a judge is asked at once
JUDGEMENT = (
    "Judge an answer. Reply with one number from 0 (wrong or useless) to 10 (right and clear) and "
    "nothing else.\n\nQuestion:\n{question}\n\nReference:\n{reference}\n\nAnswer:\n{answer}"
)


# ---- rules: an answer -> 0 to 1 ------------------------------------------------------------------


def exact(answer, args) -> float:
    """Whether its final part is the data's, numbers by value (evaluation/answers.py)."""
    return float(same(answer.text, answer.prompt.expected))


def in_form(answer, args) -> float:
    """Whether it reads <think>...</think> and then an answer."""
    return float(IN_FORM.fullmatch(answer.text) is not None)


def length(answer, args) -> float:
    """1 within --length_range, less the further it is outside; what tools said does not count."""
    low, high = range_of(args.length_range)
    size = sum(answer.trained)
    return min(1.0, size / low, high / size)


def repetition(answer, args) -> float:
    """Share of its groups of four characters that are new."""
    text = answer.text
    grams = [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


RULES: dict[str, Callable] = {
    "exact": exact,
    "format": in_form,
    "length": length,
    "repetition": repetition,
}


def range_of(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    if not (low.strip().isdecimal() and high.strip().isdecimal() and 0 < int(low) <= int(high)):
        raise cli.usage_error(f'--length_range {text}: two numbers of tokens, like "16,256"')
    return int(low), int(high)


# ---- all of them ---------------------------------------------------------------------------------


class Rewards:
    """parts: name -> (weight, function of a list of answers -> a list of numbers, NaN where there
    is none). problems: how often which reason was met since they were last told."""

    def __init__(self):
        self.parts: dict[str, tuple[float, Callable]] = {}
        self.problems: Counter = Counter()
        self.examples: dict[str, str] = {}

    @classmethod
    def of(cls, args) -> Rewards:
        """From --rewards; a usage error or SystemExit for what is not there. Nothing big is loaded
        yet: see load_models."""
        made = cls()
        for name, weight in weights_of(args.rewards).items():
            if name in RULES:
                if name == "length":
                    range_of(args.length_range)
                part = by_rule(RULES[name], args)
            elif name == "model":
                refuse_missing(args.reward_model, "model", "--reward_model FOLDER")
                part = RewardModel(args.reward_model)
            elif name == "code":
                part = CodeTests(args.reward_timeout, made.missed)
            elif name == "judge":
                refuse_missing(args.judge_url, "judge", "--judge_url http://host:8000/v1")
                part = Judge(args.judge_url, args.judge_model, args.reward_timeout, made.missed)
            else:
                part = UserFunction(name, args.reward_timeout, made.missed)
            made.parts[label_of(name)] = (weight, part)
        return made

    def load_models(self, training) -> None:
        for _, part in self.parts.values():
            if isinstance(part, RewardModel):
                part.load(training)

    def __call__(self, answers: list) -> tuple[Tensor, dict[str, Tensor]]:
        """-> totals [n], NaN where a part is missing, and the parts as they were before weighting,
        [n] each."""
        parts = {}
        total = torch.zeros(len(answers))
        for name, (weight, part) in self.parts.items():
            values = torch.tensor(part(answers), dtype=torch.float32)
            parts[name] = values.masked_fill(values.isinf(), NONE)
            total = total + weight * parts[name]
        return total, parts

    def missed(self, reason: str, example: str) -> float:
        """Count a reward that could not be had."""
        self.problems[reason] += 1
        self.examples.setdefault(reason, example)
        return NONE

    def tell_problems(self) -> None:
        for reason, count in self.problems.items():
            example = self.examples[reason]
            cli.say(f"warning: {count} answer(s) without a reward: {reason}, e.g. {example}")
        self.problems.clear()

    def close(self) -> None:
        for _, part in self.parts.values():
            if isinstance(part, UserFunction):
                part.close()


def weights_of(spec: str) -> dict[str, float]:
    """ "exact:1 my.py:0.5" -> {"exact": 1.0, "my.py": 0.5}; a usage error for what is no such
    list."""
    found = {}
    labels = set()
    for word in spec.split():
        name, colon, number = word.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            name, weight = word, 1.0
        name = name if colon and name else word
        known = (*RULES, *PARTS)
        if name not in known and not name.partition("::")[0].endswith(".py"):
            raise cli.usage_error(
                f"--rewards {word}: {', '.join(known)} or a file that ends in .py, each with a "
                "weight: exact:1"
            )
        if not math.isfinite(weight):
            raise cli.usage_error(f"--rewards {word}: a finite weight")
        label = label_of(name)
        if label in labels:
            raise cli.usage_error(f"--rewards {word}: another part is called {label}; rename it")
        labels.add(label)
        found[name] = weight
    if not any(found.values()):
        raise cli.usage_error(f"--rewards {spec!r}: at least one with a weight")
    return found


def label_of(name: str) -> str:
    """What a part is called in figures and files: mine/my.py is my, my.py::f is my_f."""
    file, _, function = name.partition("::")
    return f"{Path(file).stem}_{function}" if function else Path(file).stem


def by_rule(rule: Callable, args) -> Callable:
    def part(answers: list) -> list[float]:
        return [rule(answer, args) for answer in answers]

    return part


def refuse_missing(value: str, name: str, remedy: str) -> None:
    if not value:
        raise cli.usage_error(f"--rewards {name}: needs {remedy}")


# ---- models --------------------------------------------------------------------------------------


class RewardModel:
    """A classifier with one output (AutoModelForSequenceClassification), over the conversation in
    its own template."""

    BATCH = 32

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        from common.convert import models

        self.name = name
        config = models.model_config(name, "--reward_model")
        if config.num_labels != 1:
            raise SystemExit(
                f"--reward_model {name} has {config.num_labels} outputs; a reward model has one"
            )
        self.tokenizer = models.load(AutoTokenizer, name, "--reward_model")
        if not self.tokenizer.chat_template:
            raise SystemExit(
                f"--reward_model {name} has no chat template, so nothing says how it reads a "
                "conversation; add a chat_template.jinja to its folder"
            )
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def load(self, training) -> None:
        from transformers import AutoModelForSequenceClassification

        from common.convert import models

        kind = AutoModelForSequenceClassification
        dtype = device.train_dtype(training)
        self.model = models.load(kind, self.name, "--reward_model", dtype=dtype)
        self.model.to(training.device).requires_grad_(False).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, answers: list) -> list[float]:
        found = []
        for start in range(0, len(answers), self.BATCH):
            texts = [self.text(answer) for answer in answers[start : start + self.BATCH]]
            batch = self.tokenizer(
                texts, padding=True, return_tensors="pt", add_special_tokens=False
            )
            scores = self.model(**batch.to(self.model.device)).logits[:, 0]
            found += scores.float().tolist()
        return found

    def text(self, answer) -> str:
        said = {"role": "assistant", "content": answer.text}
        turns = [*answer.prompt.extra["messages"], said]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)


class Judge:
    """An OpenAI-like endpoint that is asked for a number from 0 to 10; the reward is a tenth of it.
    Its key is in the variable JUDGE_API_KEY."""

    def __init__(self, url: str, model: str, timeout: float, missed: Callable):
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self.timeout = timeout
        self.missed = missed

    def __call__(self, answers: list) -> list[float]:
        with ThreadPoolExecutor(JUDGES) as pool:
            said = list(pool.map(self.ask, answers))
        return [self.score(one) for one in said]

    def ask(self, answer) -> str | Exception:
        import os

        import requests

        asked = JUDGEMENT.format(
            question=answer.prompt.question, reference=answer.prompt.reference, answer=answer.text
        )
        body = {"messages": [{"role": "user", "content": asked}], "temperature": 0.0}
        if self.model:
            body["model"] = self.model
        key = os.environ.get("JUDGE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # a redirect would carry question and key elsewhere
            reply = requests.post(
                self.url, json=body, headers=headers, timeout=self.timeout, allow_redirects=False
            )
            reply.raise_for_status()
            return str(reply.json()["choices"][0]["message"]["content"])
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            return error

    def score(self, said: str | Exception) -> float:
        if isinstance(said, Exception):
            text = " ".join(str(said).split())
            return self.missed("the judge cannot be asked", f"{type(said).__name__}: {text[:200]}")
        found = numbers(re.sub(r"/\s*10\b", "", said.split("</think>")[-1]))
        if not found or not 0 <= found[0] <= 10:
            return self.missed("the judge said no number from 0 to 10", repr(said[:60]))
        return float(found[0]) / 10
