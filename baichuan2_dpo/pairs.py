"""A preference row -> two token rows that differ only in their answers.

Both are encoded by the tokenizer's chat template (common/data/labels.py); only the answer, with its
end token, has labels. Where the longer one does not fit, the oldest rounds of the prompt go first,
then the beginning of what is left of the prompt (a quarter of the window is kept for it), then the
tail of an answer before its end token. Both answers keep the same prompt, else their log-probs
would not be comparable.
"""

from common.data.labels import encode_chat, encode_prompt

IGNORE = -100
ALL = 1 << 30  # tokens; nothing is cut before both answers are known


def encode(row: dict, tokenizer, max_length: int, system: str = "") -> dict:
    """A canonical preference row -> {"chosen_input_ids", "chosen_labels", "rejected_...",
    "truncated"}.

    Raises ValueError when the template refuses the row or writes the prompt in another way once an
    answer follows, and when the answers differ only in what is cut off.
    """
    prompt, tools = with_system(row["prompt"], system), row.get("tools")
    asked, answers = tokens(tokenizer, prompt, row, tools)
    truncated = False
    while len(asked) + max(map(len, answers)) > max_length and (shorter := without_oldest(prompt)):
        prompt, truncated = shorter, True
        asked, answers = tokens(tokenizer, prompt, row, tools)
    room = max_length - max(map(len, answers))
    if len(asked) > room:
        kept = min(len(asked), max(room, max_length // 4))
        asked, truncated = begin_clean(tokenizer, asked[len(asked) - kept :]), True
        answers = [shorten(tokenizer, answer, max_length - kept) for answer in answers]
    if answers[0] == answers[1]:
        raise ValueError(f"chosen and rejected are the same within {max_length} tokens")
    found = {"truncated": truncated}
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        found[f"{side}_input_ids"] = asked + [token for token, _ in answer]
        found[f"{side}_labels"] = [IGNORE] * len(asked) + [label for _, label in answer]
    return found


def tokens(
    tokenizer, prompt: list[dict], row: dict, tools
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """-> prompt [P], and for both answers their (token, label) pairs; what stands between turns has
    label -100."""
    asked, answers = encode_prompt(tokenizer, prompt, tools), []
    for side in ("chosen", "rejected"):
        whole = encode_chat(tokenizer, prompt + row[side], ALL, tools)
        if whole is None:
            raise ValueError(f"the chat template leaves nothing of the {side} answer")
        if whole["input_ids"][: len(asked)] != asked:
            raise ValueError(
                "the chat template writes the prompt in another way when an answer follows"
            )
        answer = list(zip(whole["input_ids"], whole["labels"], strict=True))[len(asked) :]
        while answer and answer[-1][1] == IGNORE:  # what a template writes after the end token
            answer.pop()
        answers.append(answer)
    return asked, answers


def with_system(messages: list[dict], system: str) -> list[dict]:
    has = not system or messages[0]["role"] == "system"
    return messages if has else [{"role": "system", "content": system}, *messages]


def without_oldest(messages: list[dict]) -> list[dict] | None:
    """Without the oldest round, the system's turn kept; None when there is only one round."""
    head = 1 if messages[0]["role"] == "system" else 0
    later = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
    return messages[:head] + messages[later[0] :] if later else None


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
