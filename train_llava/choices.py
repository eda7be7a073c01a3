"""Multiple-choice questions about a picture, MMBench's table and others like it, answered by which
letter is most likely: one forward for a question, nothing is generated.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from encoding import as_template_wants, encode_prompt
from rows import checked_folder
from sight import Normaliser, see
from torch.nn import functional as F

from common.data import files, load, turns
from common.data.labels import encode_chat
from common.data.pictures import PictureError, Place, from_base64
from common.data.spelling import IGNORE
from common.fast.losses import without_adapter

LETTERS = "ABCDEFGH"
CHOICE_PROMPT = "只用选项的字母回答。"
ROUND = 1_000_000  # MMBench numbers the other orders of question N as N + ROUND, N + 2 * ROUND, ...


@dataclass
class Choice:
    """options: texts, in the order of LETTERS; answer: its letter, "" where it is not told."""

    key: str
    question: str
    options: list[str]
    answer: str
    pictures: list
    category: str = ""
    group: str = field(default="")

    def __repr__(self) -> str:
        """Without the bytes of pictures; what belongs to the key of an answer."""
        shown = [
            hashlib.sha256(p).hexdigest()[:16] if isinstance(p, bytes) else str(p)
            for p in self.pictures
        ]
        return f"{self.key} {self.question} {self.options} {self.answer} {shown}"


# ---- reading -------------------------------------------------------------------------------------


def is_choice_table(path: Path, column_map: str = "") -> bool:
    """Whether the first record of a file has a question and options A and B."""
    if not path.is_file() or files.suffix_of(path) not in files.SUFFIXES:
        return False
    renames = load.column_renames(column_map or None)
    for _, record in files.records(path, files.encoding_of(path)):
        if not isinstance(record, dict):
            return False
        return {"question", "A", "B"} <= load.renamed(record, renames).keys()
    return False


def read_choices(
    data_path: str, image_folder: str, circular: bool, limit: int, column_map: str = ""
) -> list[Choice]:
    """SystemExit with one line for what is no file, or holds none; rows that cannot be used are
    named."""
    path = Path(data_path)
    if not path.is_file():
        raise SystemExit(f"--data_path {data_path}: multiple-choice questions stand in one file")
    renames = load.column_renames(column_map or None)
    root = checked_folder(image_folder) or str(path.resolve().parent)
    records = []
    left_out: dict[str, list[str]] = {}
    for number, record in files.records(path, files.encoding_of(path)):
        if isinstance(record, dict):
            records.append((number, load.renamed(record, renames)))
        else:
            left_out.setdefault(getattr(record, "reason", "not an object"), []).append(str(number))
    columns = {name for _, record in records for name in record}
    absent = [theirs for theirs, ours in renames.items() if ours not in columns]
    if absent:
        raise SystemExit(f"{path}: column_map: no column {', '.join(absent)}")
    images = {_text(record, "index"): _text(record, "image") for _, record in records}
    found: dict[str, Choice] = {}
    for number, record in records:
        try:
            one = _choice(number, record, images, root)
            if one.key in found:
                raise ValueError("the index of a row before it")
            found[one.key] = one
        except ValueError as error:
            left_out.setdefault(str(error), []).append(str(number))
    for reason, where in left_out.items():
        print(f"{len(where):,} rows left out: {reason}, e.g. {path}:{where[0]}")
    if not found:
        raise SystemExit(f"{path}: no multiple-choice question (question, A, B, answer, image)")
    asked = list(found.values())
    if limit:
        asked = asked[:limit]
    if circular:
        asked = [turned for one in asked for turned in all_orders(one)]
    return asked


def _choice(number: int, record: dict, images: dict[str, str], root: str) -> Choice:
    options = [_text(record, letter) for letter in LETTERS]
    options = options[: next((i for i, text in enumerate(options) if not text), len(options))]
    if len(options) < 2:
        raise ValueError("fewer than two options")
    answer = _letter(_text(record, "answer").strip(), options)
    index = _text(record, "index") or str(number)
    hint = _text(record, "hint")
    question = f"{hint}\n{_text(record, 'question')}" if hint else _text(record, "question")
    image = _text(record, "image")
    if image.isdigit() and image in images:  # the picture of another row
        image = images[image]
    group = str(int(index) % ROUND) if index.isdigit() else index
    pictures = [_picture(image, root)] if image else []
    category = _text(record, "category")
    return Choice(index, question, options, answer, pictures, category, group)


def _letter(told: str, options: list[str]) -> str:
    """The option that an answer names: by its letter ("B", "(B)", "B. two") or by its words."""
    if not told:
        return ""
    named = re.match(r"\(?([A-H])(?=$|[).:、．：）])", told, re.IGNORECASE)
    letter = named[1].upper() if named else ""
    if not named and told in options:
        letter = LETTERS[options.index(told)]
    if letter not in [*LETTERS[: len(options)]]:
        raise ValueError("the answer is none of the options")
    return letter


def _text(record: dict, name: str) -> str:
    value = record.get(name)
    return "" if turns.is_absent(value) or str(value) == "nan" else str(value)


def _picture(value: str, root: str):
    """Bytes of base64, or the place of a file in the picture folder."""
    if len(value) > 1024 or not re.search(r"\.\w{3,4}$", value):
        try:
            return from_base64(value.encode())
        except (PictureError, UnicodeError):
            raise ValueError("a picture that is neither base64 nor a file") from None
    return Place(str(Path(root) / value), root=root)


def all_orders(one: Choice) -> list[Choice]:
    """The question with its options moved round, once for each option."""
    count = len(one.options)
    found = []
    for by in range(count):
        options = [one.options[(i + by) % count] for i in range(count)]
        answer = one.answer
        if answer:
            answer = LETTERS[(LETTERS.index(answer) - by) % count]
        key = f"{one.key}.{by}"
        found.append(
            Choice(key, one.question, options, answer, one.pictures, one.category, one.group)
        )
    return found


# ---- answering -----------------------------------------------------------------------------------


def row_for(one: Choice, blind: bool, choice_prompt: str) -> dict:
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, one.options, strict=False)]
    words = "\n".join([one.question, *options, choice_prompt])
    shown = [] if blind else one.pictures
    content = words
    if shown:
        content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": f"\n{words}"}]
    return {"messages": [{"role": "user", "content": content}], "pictures": shown}


def letter_ids(tokenizer, letter: str) -> list[int]:
    """The tokens with which an answer of this letter begins, by the chat template."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": letter}]
    found = encode_chat(tokenizer, as_template_wants(tokenizer, talk), 1 << 20)
    ids = [label for label in found["labels"] if label != IGNORE]
    # without the end token, and what may follow it
    ends = [i for i, token in enumerate(ids) if letter in tokenizer.decode(ids[: i + 1])]
    return ids[: ends[0] + 1]


@torch.no_grad()
def letters_said(llava, asked: list[Choice], blind: bool, eyes, choice_prompt: str) -> list[str]:
    """The most likely letter of each question, among those of its options. The head runs at the
    letters' own positions only; letters of one token share a forward."""
    tokenizer = llava.tokenizer
    known = (tokenizer, llava.image_token_id, llava.image_tokens)
    sequences: dict[tuple, list] = {}
    wanted = []  # question, letter, which sequence, the letter's tokens, where they stand
    for number, one in enumerate(asked):
        prompt = encode_prompt(row_for(one, blind, choice_prompt), *known)
        for letter in LETTERS[: len(one.options)]:
            ids = letter_ids(tokenizer, letter)
            key = (number, *ids[:-1])
            sequences.setdefault(key, [prompt["input_ids"] + ids[:-1], prompt["pictures"]])
            wanted.append((number, letter, key, ids, len(prompt["input_ids"])))
    hidden = _hidden(llava, list(sequences.values()), eyes)
    rows = {key: i for i, key in enumerate(sequences)}
    scores: list[dict[str, float]] = [{} for _ in asked]
    head = without_adapter(llava.model).get_output_embeddings()
    for number, letter, key, ids, length in wanted:
        before = hidden[rows[key], length - 1 : length - 1 + len(ids)]
        likely = F.log_softmax(head(before).float(), dim=-1)
        scores[number][letter] = likely[range(len(ids)), ids].sum().item()
    return [max(of, key=of.get) for of in scores]


def _hidden(llava, sequences: list[list], eyes) -> torch.Tensor:
    """[(ids, pictures)] -> last hidden states [B, T, D], padded on the right."""
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (own, _) in enumerate(sequences):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    shown = [picture for _, pictures in sequences for picture in pictures]
    seen = {}
    if shown:
        features, _ = eyes(shown)
        outputs = see(llava.model, features, Normaliser(llava.image_processor))
        seen["mm_encoder_outputs"] = outputs
    inner = without_adapter(llava.model).model
    found = inner(
        input_ids=ids.to(llava.device),
        attention_mask=mask.to(llava.device),
        use_cache=False,
        **seen,
    )
    return found.last_hidden_state
