"""A preference row -> two token rows that differ only in their answers.

Both are encoded by the tokenizer's chat template (common/data/labels.py); only the answer, with its
end token, has labels. Where the longer one does not fit, the oldest rounds of the prompt go first,
then the beginning of what is left of the prompt (a quarter of the window is kept for it), then the
tail of an answer before its end token. Both answers keep the same prompt, else their log-probs
would not be comparable.
"""

from common.data.labels import encode_chat, encode_prompt
from common.data.spelling import IGNORE

SIDES = ("chosen", "rejected")
UNLIMITED = 1 << 30  # tokens; nothing is cut before both answers are known


def encode(row: dict, tokenizer, max_length: int, system: str = "") -> dict:
    """A canonical preference row -> {"chosen_input_ids", "chosen_labels", "rejected_...",
    "truncated"}.

    Raises ValueError when the template refuses the row or writes the prompt in another way once an
    answer follows, and when the answers differ only in what is cut off.
    """
    messages = with_system(row["prompt"], system)
    truncated = False
    while True:
        prompt, answers = tokens(tokenizer, messages, row)
        longest = max(map(len, answers))
        shorter = without_oldest(messages)
        if len(prompt) + longest <= max_length or not shorter:
            break
        messages = shorter
        truncated = True
    room = max_length - longest
    if len(prompt) > room:
        kept = min(len(prompt), max(room, max_length // 4))
        prompt = begin_clean(tokenizer, prompt[len(prompt) - kept :])
        answers = [shorten(tokenizer, answer, max_length - kept) for answer in answers]
        truncated = True
    if answers[0] == answers[1]:
        raise ValueError(f"chosen and rejected are the same within {max_length} tokens")
    found = {"truncated": truncated}
    for side, answer in zip(SIDES, answers, strict=True):
        found[f"{side}_input_ids"] = prompt + [token for token, _ in answer]
        found[f"{side}_labels"] = [IGNORE] * len(prompt) + [label for _, label in answer]
    return found


def tokens(
    tokenizer, messages: list[dict], row: dict
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """-> prompt [P], and for both answers their (token, label) pairs; what stands between turns has
    label -100."""
    tools = row.get("tools")
    prompt = encode_prompt(tokenizer, messages, tools)
    answers = []
    for side in SIDES:
        chat = encode_chat(tokenizer, messages + row[side], UNLIMITED, tools)
        if chat is None:
            raise ValueError(f"the chat template leaves nothing of the {side} answer")
        if chat["input_ids"][: len(prompt)] != prompt:
            raise ValueError(
                "the chat template writes the prompt in another way when an answer follows"
            )
        answer = list(zip(chat["input_ids"], chat["labels"], strict=True))[len(prompt) :]
        while answer and answer[-1][1] == IGNORE:  # what a template writes after the end token
            answer.pop()
        answers.append(answer)
    return prompt, answers


def with_system(messages: list[dict], system: str) -> list[dict]:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def without_oldest(messages: list[dict]) -> list[dict] | None:
    """Without the oldest round, the system's turn kept; None when there is only one round."""
    head = 1 if messages[0]["role"] == "system" else 0
    for i in range(head + 1, len(messages)):
        if messages[i]["role"] == "user":
            return messages[:head] + messages[i:]
    return None


def shorten(tokenizer, answer: list[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """The answer's beginning and its end token, without half a character between them."""
    if len(answer) <= room:
        return answer
    kept = answer[: room - 1]
    while kept and tokenizer.decode([token for token, _ in kept[-8:]]).endswith("\ufffd"):
        kept.pop()
    return kept + answer[-1:]


def begin_clean(tokenizer, ids: list[int]) -> list[int]:
    """Without the last bytes of a character that was cut."""
    for start in range(4):
        if not tokenizer.decode(ids[start : start + 8]).startswith("\ufffd"):
            return ids[start:]
    return ids
