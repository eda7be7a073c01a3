"""The two models of the page: the trained one, and the reference it is compared with, which may be
the same one.

Which reference: a LoRA run has it inside, any other run is compared with the model it began with
(see began_with).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import modeling_baichuan  # noqa: F401  (tells the Auto classes about ALiBi and NormHead)
import torch

from common.convert import adapter
from common.data.labels import encode_chat
from common.data.spelling import IGNORE
from common.demo.chat_model import ChatModel, split_thought
from common.fast import losses

NO_REFERENCE = "none"


class ScoringChatModel(ChatModel):
    """A ChatModel that draws with a given seed, and tells how likely an answer is."""

    def __init__(self, model: str | Path):
        super().__init__(model)
        # log_prob then builds no logits of a whole conversation
        losses.use_chunked_loss(self.model)

    def _generate(self, prompt, room, heard, seed=0, **sampling):
        torch.manual_seed(seed)
        super()._generate(prompt, room, heard, **sampling)

    @torch.no_grad()
    def log_prob(self, ids: list[int], labels: list[int], use_adapter: bool = True) -> float:
        """Sum of the log-probabilities, in nats, of the labels [T] that are not IGNORE, after the
        ids [T] before."""
        row = torch.tensor([ids, labels], device=self.model.device)
        with self.turn(use_adapter):
            found = losses.sequence_logprobs(self.model, row[:1], row[1:], use_cache=False)
        return found.item()


@dataclass
class Side:
    """A column of the page: a model, and whether its adapter is on."""

    chat_model: ScoringChatModel
    use_adapter: bool = True

    def stream(self, *args, **options):
        return self.chat_model.stream(*args, use_adapter=self.use_adapter, **options)

    def log_prob(self, ids, labels) -> float:
        return self.chat_model.log_prob(ids, labels, self.use_adapter)


# ---- which reference ---------------------------------------------------------------------------


def load_reference(policy: ScoringChatModel, model: str | Path) -> ScoringChatModel:
    """`model`, asked with the policy's tokenizer and template; SystemExit when its vocabulary is
    another one."""
    reference = ScoringChatModel(model)
    theirs = reference.tokenizer.get_vocab().items()
    ours = policy.tokenizer.get_vocab().items()
    rows = reference.model.get_input_embeddings().num_embeddings
    if not theirs <= ours or rows < len(policy.tokenizer):
        told = f"its vocabulary is not the one of {policy.name}, so it cannot be its reference"
        raise SystemExit(f"{model}: {told}")
    reference.tokenizer = policy.tokenizer
    reference.can_think = policy.can_think
    reference.chats = True
    return reference


def find_reference(
    policy: ScoringChatModel, given: str | Path | None = None
) -> tuple[Side | None, str]:
    """(the reference, "") or (None, why there is none). SystemExit when `given` cannot be loaded or
    does not fit."""
    if given == NO_REFERENCE:
        return None, "打开时选了不要参考"
    if given:
        return Side(load_reference(policy, given)), ""
    if policy.adapter and not policy.settings.get("reference_model"):
        return Side(policy, use_adapter=False), ""
    name, reason = began_with(policy)
    if not name:
        return None, reason
    folder = on_this_machine(name)
    if not folder:
        return None, f"训练前的模型 {name} 不在这台机器上"
    try:
        return Side(load_reference(policy, folder)), ""
    except SystemExit as error:
        return None, f"训练前的模型用不了（{error}）"


def on_this_machine(model: str) -> str:
    """Its folder, "" when there is none: nothing large is downloaded unless --reference asks for
    it."""
    if Path(model).is_dir():
        return model
    try:
        found = huggingface_hub.try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name of a repository
        return ""
    return str(Path(found).parent) if isinstance(found, str) else ""


def began_with(policy: ScoringChatModel) -> tuple[str, str]:
    """(the reference model of the run that left `policy`, "") or ("", why it is unknown)."""
    named = policy.settings.get("reference_model")
    if named:
        return named, ""
    note = Path(policy.path) / adapter.BASE_FILE
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        base = known["base_model"]
        if Path(base).is_dir() and adapter.base_fingerprint(base) != known["fingerprint"]:
            return "", f"{base} 的权重已经不是训练开始时的了"
        return base, ""
    name = policy.settings.get("model_name_or_path", "")
    if name == "tiny":
        return "", "训练从内置的小模型开始，运行记录里没有它的位置"
    if not name:
        return "", "模型旁边没有 run.json，不知道训练从哪个模型开始"
    return name, ""


# ---- an answer that is weighed -----------------------------------------------------------------


def answer_message(text: str) -> dict:
    """A generated text as a row of the training data has it."""
    thought, content, _ = split_thought(text)
    message = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    return message


def scored_row(
    chat_model: ChatModel, messages: list[dict], text: str, complete: bool, window: int
) -> tuple[list[int], list[int]] | None:
    """(ids [T], labels [T]) with labels on the last answer alone, its end token too if it is
    complete.

    None when the conversation does not fit into `window` tokens or nothing would be scored.
    """
    template = {"enable_thinking": True} if chat_model.can_think else {}
    answer = answer_message(text)
    try:
        row = encode_chat(chat_model.tokenizer, [*messages, answer], window, **template)
    except ValueError:  # the template has no place for a thought: the text as it was written
        answer = {"role": "assistant", "content": text}
        row = encode_chat(chat_model.tokenizer, [*messages, answer], window, **template)
    if row is None or row["truncated"]:
        return None
    labels = row["labels"]
    labelled = [i for i, label in enumerate(labels) if label != IGNORE]
    end = labelled[-1]  # of several answers only the last one counts
    begin = max((i for i in range(end) if labels[i] == IGNORE), default=-1) + 1
    if complete:
        end += 1
    if begin >= end:
        return None
    return row["input_ids"][:end], [IGNORE] * begin + labels[begin:end]
