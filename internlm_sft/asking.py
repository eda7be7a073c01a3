"""The questions of measures.py, put to a model in training: before, after, and along the way."""

from __future__ import annotations

from collections.abc import Sequence

import measures
import torch
from identity_trainer import kl_to_base

from common import cli
from common.data.counts import label_index
from common.data.labels import encode_prompt
from common.runs.generate import generate_answers

KL_ROWS = 32  # general rows on which the distance to the base is measured
ALONG = 12  # questions of a kind and language that early stopping asks


def askable(tokenizer, asked: list[dict]) -> list[dict]:
    """The questions that the chat template writes; a line where it refuses some, e.g. those under
    system turns."""
    found = []
    reason = ""
    for row in asked:
        try:
            encode_prompt(tokenizer, row["messages"][:-1])
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
        else:
            found.append(row)
    if reason:
        left_out = len(asked) - len(found)
        cli.say(f"warning: {left_out} of {len(asked)} questions are not asked: {reason}")
    return found


class Asked:
    """Ask a model about itself and about everything else.

    Calling it gives what RecipeTrainer takes as `measure`: (metrics, samples). All ranks call it.
    """

    def __init__(
        self,
        model,
        tokenizer,
        asked: list[dict],
        who: tuple,
        max_new_tokens: int,
        general: Sequence[dict] = (),
    ):
        """asked: as measures.questions gives them; those that the chat template refuses are left
        out. who: the persona and the texts of the refusal; general: token rows for the KL to the
        base."""
        self.model = model
        self.tokenizer = tokenizer
        self.asked = askable(tokenizer, asked)
        self.who = who
        self.max_new_tokens = max_new_tokens
        self.general = [general[i] for i in range(min(KL_ROWS, len(general)))]

    def __call__(self) -> tuple[dict, list[dict]]:
        if not self.asked:
            return {}, []
        answers = self.answers(self.asked)
        metrics = measures.score(self.asked, answers, *self.who)
        if hasattr(self.model, "disable_adapter"):
            metrics |= self.against_base(answers)
        return metrics, measures.samples(self.asked, answers)

    def without_base(self) -> dict[str, float]:
        """The metrics of the answers alone."""
        return measures.score(self.asked, self.answers(self.asked), *self.who)

    def answers(self, asked: list[dict]) -> list[str]:
        ids = [encode_prompt(self.tokenizer, messages) for messages in measures.prompts(asked)]
        return generate_answers(self.model, self.tokenizer, ids, self.max_new_tokens)

    def identity(self) -> dict[str, float]:
        """The share of exact names by language, on a few of the questions."""
        few = []
        for language in ("zh", "en", "mixed"):
            own = [
                row
                for row in self.asked
                if row["kind"] == "identity" and row["language"] == language
            ]
            few += measures.spread(own, ALONG)
        found = measures.score(few, self.answers(few), *self.who) if few else {}
        return {name: share for name, share in found.items() if name.startswith("identity")}

    def against_base(self, answers: list[str]) -> dict[str, float]:
        """near_unchanged: near questions answered word for word as with the adapter off.
        general_kl: KL(base || model) per label token of held-out general rows."""
        near = [i for i, row in enumerate(self.asked) if row["kind"] == "near"]
        found = {}
        if near:
            with self.model.disable_adapter():
                base = self.answers([self.asked[i] for i in near])
            same = [answers[i] == one for i, one in zip(near, base, strict=True)]
            found["near_unchanged"] = sum(same) / len(same)
        if self.general:
            found["general_kl"] = self.kl()
        return found

    @torch.no_grad()
    def kl(self) -> float:
        """Each rank takes all rows: there are few, and ZeRO-3 needs equal forwards."""
        was_training = self.model.training
        self.model.eval()
        device = self.model.device
        total = 0.0
        count = 0
        for row in self.general:
            index = label_index(torch.tensor([row["labels"]])).to(device)
            ids = torch.tensor([row["input_ids"]], device=device)
            total += float(kl_to_base(self.model, {"input_ids": ids}, index))
            count += len(index)
        self.model.train(was_training)
        return total / max(1, count)
