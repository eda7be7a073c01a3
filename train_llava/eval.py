"""Measure a LLaVA on held-out rows, captions or multiple-choice questions, and blind beside it.

    python train_llava/eval.py                                  # the last run, the samples
    python train_llava/eval.py --model my_run --data_path rows.json --image_folder pictures
    python train_llava/eval.py --data_path coco_cn_captions.json --task captions
    python train_llava/eval.py --data_path MMBench_DEV_CN.tsv --circular true

--data_path: whatever train.py reads (its held-out files alone, where there are some), or a table of
    multiple-choice questions: question, A, B, ..., answer, image (base64 or a file), and hint,
    category, index as MMBench has them.
Answers: exact match, yes/no, ROUGE-L. Captions: ROUGE-L, BLEU, CIDEr-D on characters; one is
    generated for each picture, all that the rows say of it are its references. Choices: the
    option whose letter is most likely, nothing is generated; --circular true asks with the options
    in every order, and only a question that is right in all of them counts.
Blind: the same questions without their pictures. What a model answers right blindly, it has not
    seen.
What was answered is kept in --output and not asked again: the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
import metrics
import torch
from answers import generate_answers
from choices import CHOICE_PROMPT, Choice, is_choice_table, letters_said, read_choices
from encoding import count_pictures, encode_newest, row_of, without_pictures
from features import PictureSource
from model import Llava
from rows import CAPTION_ASKED, describe, load_rows_with_pictures
from sight import Normaliser, features_of

from common import cli
from common.convert import adapter
from common.data import files
from common.data.pictures import PictureError, Place
from common.data.progress import Progress

DEFAULT = HERE.parent / "output" / HERE.name
TASKS = ("answers", "captions", "choices")
KEPT_PICTURES = 256  # whose features stay at hand; questions on one picture follow each other
# flags without effect, and why
NOT_FOR_CHOICES = (
    ["held_out", "max_new_tokens"],
    "a choice table is asked whole, by the likelihood of its letters",
)
FOR_CHOICES_ALONE = (["circular", "choice_prompt"], "these are no multiple-choice questions")
PUBLISHED = [  # MMBench-CN, in percent
    ("LLaVA-1.5 7B", 58.3),
    ("LLaVA-1.5 7B, LoRA", 58.9),
    ("LLaVA-1.5 13B", 63.6),
]


# ---- what is asked -------------------------------------------------------------------------------


@dataclass
class Question:
    """One answer that is wanted. key: its own, the same in every run; group: captions of one
    picture have the same."""

    key: str
    row: dict
    pictures: list[Place]
    reference: str
    group: str


def read_questions(args) -> list[Question]:
    """Every answer of the rows, each asked behind the true turns before it."""
    rows, places, stats = load_rows_with_pictures(
        args.data_path, args.image_folder, args.column_map or None
    )
    print(describe(stats))
    if args.held_out == "true" and any(rows["held_out"]):
        rows = rows.select([i for i, held_out in enumerate(rows["held_out"]) if held_out])
        print(f"{len(rows):,} rows are held out by the names of their files; the others are left")
    found = []
    for number, row in enumerate(map(row_of, rows["row"])):
        shown = [places[i] for i in row["pictures"]]
        for end, message in enumerate(row["messages"]):
            if message["role"] != "assistant" or message.get("tool_calls"):
                continue
            asked = row["messages"][:end]
            pictures = shown[: count_pictures(asked)]
            own = row | {"messages": asked, "pictures": pictures}
            group = " ".join(map(str, pictures)) or f"row {number}"
            found.append(Question(f"{number}.{end}", own, pictures, message["content"], group))
    if args.limit:
        found = found[: args.limit]
    if not found:
        raise SystemExit(f"--data_path {args.data_path}: no answer to compare with")
    return found


def is_captions(questions: list[Question]) -> bool:
    """Whether the answers are captions: each the only answer of a row about one picture, as long as
    sentences are, to our own requests or to one for each picture, of few that recur."""
    if not all(len(one.pictures) == 1 and not _is_behind_an_answer(one) for one in questions):
        return False
    asked = {(question.group, _words_asked(question)) for question in questions}
    pictures = {question.group for question in questions}
    requests = {words for _, words in asked}
    recur = len(asked) == len(pictures) and 4 * len(requests) <= len(questions)
    if not recur and not requests <= set(CAPTION_ASKED):
        return False
    lengths = [len(question.reference) for question in questions]
    several = len(pictures) * 2 <= len(questions)
    return sum(lengths) / len(lengths) >= 12 and (several or min(lengths) >= 8)


def _is_behind_an_answer(question: Question) -> bool:
    return any(message["role"] == "assistant" for message in question.row["messages"])


def _words_asked(question: Question) -> str:
    return without_pictures(question.row)["messages"][-1]["content"]


def one_of_each(questions: list[Question]) -> list[Question]:
    """The first question about each picture: of captions one is generated, and the others' answers
    are its references too."""
    first: dict[str, Question] = {}
    for question in questions:
        if question.pictures:
            first.setdefault(question.group, question)
    return list(first.values())


# ---- what was answered before --------------------------------------------------------------------


class Kept:
    """Answers in a file, a line each as they come: a run that was ended goes on behind them."""

    def __init__(self, path: Path, facts: dict):
        """facts: what decides the answers; SystemExit where the file has others."""
        self.path = path
        self.facts = facts
        self.known: dict[str, object] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        if not lines:
            path.write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        if lines[0] != json.loads(json.dumps(facts)):
            raise SystemExit(
                f"{path}: answers of another model, of other data or settings; take another "
                "--output, or remove it"
            )
        self.known = {key: said for line in lines[1:] for key, said in line.items()}

    def _lines(self) -> list[dict]:
        """Whole lines; the last one may be torn, and goes."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, answers: dict[str, object]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            for key, said in answers.items():
                file.write(json.dumps({key: said}, ensure_ascii=False) + "\n")
        self.known |= answers


def sha_of_model(path: str) -> str:
    """Of what a model answers with, short: its weights, the small files beside them, the base of an
    adapter. Of a hub id those that are here now."""
    folder = adapter.local_folder(path)
    digest = hashlib.sha256(adapter.base_fingerprint(str(folder)).encode())
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        digest.update(file.name.encode() + file.read_bytes())
    if (folder / adapter.CONFIG_FILE).is_file():
        digest.update(adapter.base_fingerprint(adapter.check_base(folder)).encode())
    return digest.hexdigest()[:16]


def place_for_answers(path: str) -> Path:
    """Beside the model; for a hub id where no folder can be taken for the model of that name."""
    if Path(path).is_dir():
        return Path(path) / "eval"
    return HERE.parent / "output" / f"{HERE.name}_eval" / path.replace("/", "--")


# ---- seeing --------------------------------------------------------------------------------------


class Eyes:
    """Places -> features, each picture seen once while questions about it follow each other."""

    def __init__(self, llava: Llava):
        self.llava = llava
        self.normaliser = Normaliser(llava.image_processor)
        self.known: OrderedDict = OrderedDict()
        self.faults: dict[str, str] = {}  # picture -> what is wrong with it

    def can_see(self, pictures: list) -> bool:
        """Whether all of them can be used; what cannot is remembered."""
        return all(self._features(picture) is not None for picture in pictures)

    def __call__(self, pictures: list) -> tuple[torch.Tensor, dict]:
        return torch.stack([self._features(picture) for picture in pictures]), {}

    @torch.no_grad()
    def _features(self, picture) -> torch.Tensor | None:
        key = picture if isinstance(picture, Place | bytes) else str(picture)
        if key in self.known:
            self.known.move_to_end(key)
            return self.known[key]
        try:
            pixels = PictureSource([picture], self.llava.image_processor).open(0)
        except PictureError as error:
            name = str(picture) if isinstance(picture, Place) else "a picture in the table"
            self.faults[f"{name} #{hash(key)}"] = f"{name}: {error}"
            return None
        model = self.llava.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        shown = pixels[None].to(self.llava.device)
        self.known[key] = features_of(model, shown, self.normaliser)[0]
        while len(self.known) > KEPT_PICTURES:
            self.known.popitem(last=False)
        return self.known[key]


# ---- answering -----------------------------------------------------------------------------------


def batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def prompt_of(llava: Llava, question: Question, args, blind: bool, eyes: Eyes) -> dict | None:
    """The prompt, without the oldest turns where the window asks for that; None where a picture
    cannot be used or the question alone is too long."""
    if not eyes.can_see(question.pictures):
        return None
    row = without_pictures(question.row) if blind else question.row
    known = (llava.tokenizer, llava.image_token_id, llava.image_tokens)
    window = llava.model.config.get_text_config().max_position_embeddings
    try:
        return encode_newest(row, *known, window - args.max_new_tokens)[0]
    except ValueError as error:
        eyes.faults[question.key] = f"question {question.key}: {error}"
        return None


def answer_questions(args, llava: Llava, questions: list[Question], blind: bool, kept: Kept, eyes):
    """Generated answers, {key: text}; None for a question that cannot be asked."""
    word = "blind" if blind else "seen"
    left = [question for question in questions if f"{word} {question.key}" not in kept.known]
    with Progress(f"answer, {word}", total=len(left), unit="answers") as progress:
        for some in batches(left, args.batch_size):
            asked = {
                question.key: prompt_of(llava, question, args, blind, eyes) for question in some
            }
            can = [question for question in some if asked[question.key] is not None]
            prompts = [asked[question.key] for question in can]
            said = []
            if prompts:
                said = generate_answers(
                    llava.model,
                    llava.processor,
                    prompts,
                    args.max_new_tokens,
                    args.batch_size,
                    pictures=eyes,
                )
            found = dict.fromkeys(f"{word} {question.key}" for question in some)
            found |= {f"{word} {q.key}": text for q, text in zip(can, said, strict=True)}
            kept.add(found)
            progress.update(len(some))
    return {question.key: kept.known[f"{word} {question.key}"] for question in questions}


def score_answers(questions: list[Question], said: dict, captions: bool) -> dict:
    """A question that could not be asked is a miss; those without a picture stand apart."""
    pictured = [question for question in questions if question.pictures]
    if captions:
        return _score_captions(pictured, said)
    given = [said[question.key] or "" for question in pictured]
    wanted = [question.reference for question in pictured]
    scores = {
        "questions": len(pictured),
        "exact_match": metrics.exact_match(given, wanted),
        "rouge_l": metrics.rouge_l(given, [[one] for one in wanted]),
    }
    about = metrics.yes_no(given, wanted)
    if about:
        scores["yes_no"] = about
    others = [question for question in questions if not question.pictures]
    if others:
        given = [said[question.key] or "" for question in others]
        right = metrics.exact_match(given, [question.reference for question in others])
        scores["without_a_picture"] = {"questions": len(others), "exact_match": right}
    return scores


def _score_captions(questions: list[Question], said: dict) -> dict:
    """One caption of each picture against all that the rows have of it."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    captions = [said[group[0].key] or "" for group in groups.values()]
    references = [[question.reference for question in group] for group in groups.values()]
    return metrics.caption_scores(captions, references)


def answer_choices(args, llava: Llava, asked: list[Choice], blind: bool, kept: Kept, eyes):
    """The letter that is most likely for each, {key: letter}."""
    word = "blind" if blind else "seen"
    left = [one for one in asked if f"{word} {one.key}" not in kept.known]
    with Progress(f"choose, {word}", total=len(left), unit="questions") as progress:
        for some in batches(left, args.batch_size):
            can = [one for one in some if eyes.can_see(one.pictures)]
            found = dict.fromkeys(f"{word} {one.key}" for one in some)
            letters = letters_said(llava, can, blind, eyes, args.choice_prompt) if can else []
            found |= {f"{word} {one.key}": say for one, say in zip(can, letters, strict=True)}
            kept.add(found)
            progress.update(len(some))
    return {one.key: kept.known[f"{word} {one.key}"] for one in asked}


def score_choices(asked: list[Choice], said: dict) -> dict:
    rated = [
        {"group": one.group, "category": one.category, "right": said[one.key] == one.answer}
        for one in asked
        if one.answer
    ]
    return metrics.choice_scores(rated)


# ---- what is said --------------------------------------------------------------------------------


def flat(scores: dict) -> dict[str, float]:
    """Figures in a row: {"yes_no": {"f1": x}} -> {"yes_no f1": x}."""
    out = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            out |= {f"{name} {key}": one for key, one in value.items()}
        else:
            out[name] = value
    return out


def table(found: dict[str, dict], published: list = ()) -> str:
    """Markdown: a line for each figure, a column for each way of asking."""
    columns = {name: flat(scores) for name, scores in found.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for figure in next(iter(columns.values())):
        cells = [_cell(figure, column.get(figure)) for column in columns.values()]
        lines.append(f"| {figure.replace('_', ' ')} | {' | '.join(cells)} |")
    for name, value in published:
        lines.append(f"| {name}, published | {value:.1f} |" + " |" * (len(columns) - 1))
    return "\n".join(lines)


def _cell(figure: str, value) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if figure.startswith("cider") else f"{100 * value:.1f} %"


def parse():
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("--model", default=os.environ.get("MODEL", str(DEFAULT)), help="run or model folder")
    flag("--data_path", default=str(HERE / "data" / "questions"), help="what is asked; see above")
    flag("--image_folder", default="", help="where relative names of pictures begin")
    flag("--column_map", default="", help="rename columns: 'answer=答案,image=图片'")
    flag("--held_out", default="true", choices=["true", "false"])
    flag("--task", default="auto", choices=["auto", *TASKS])
    flag("--blind", default="true", choices=["true", "false"], help="also without the pictures")
    flag("--circular", default="false", choices=["true", "false"])
    flag("--choice_prompt", default=CHOICE_PROMPT, help="what stands behind the options")
    flag("--max_new_tokens", type=int, default=64)
    flag("--batch_size", type=int, default=16)
    flag("--limit", type=int, default=0, help="so many questions at most; 0: all")
    flag("--output", default="", help="folder of answers; default: MODEL/eval")
    args = parser.parse_args()
    first = args.data_path.split()[0] if args.data_path.split() else ""
    if not Path(args.data_path).exists() and not Path(re.sub(r":[\d.]+$", "", first)).exists():
        raise SystemExit(f"--data_path {args.data_path}: no such file or folder")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise cli.usage_error(f"--{name} {getattr(args, name)}: at least 1")
    if args.limit < 0:
        raise cli.usage_error(f"--limit {args.limit}: 0 (all) or more")
    say_unused(args, parser)
    return args


def say_unused(args, parser) -> None:
    """A line for flags that are given and do nothing in this task."""
    unused, why = NOT_FOR_CHOICES if task_of(args) == "choices" else FOR_CHOICES_ALONE
    given = [f"--{name}" for name in unused if getattr(args, name) != parser.get_default(name)]
    if given:
        cli.say(f"warning: {', '.join(given)}: no effect; {why}")


def task_of(args) -> str:
    """ "answers" where only the rows can tell (see is_captions)."""
    if args.task != "auto":
        return args.task
    return "choices" if is_choice_table(Path(args.data_path), args.column_map) else "answers"


def main() -> None:
    cli.quiet_libraries()
    args = parse()
    task = task_of(args)
    if task == "choices":
        asked = read_choices(
            args.data_path,
            args.image_folder,
            args.circular == "true",
            args.limit,
            args.column_map,
        )
    else:
        asked = read_questions(args)
        if args.task == "auto" and is_captions(asked):
            task = "captions"
    llava = Llava(args.model)
    output = Path(args.output) if args.output else place_for_answers(llava.path)
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "choice_prompt")}
    asked_sha = hashlib.sha256("\n".join(map(repr, asked)).encode()).hexdigest()[:16]
    facts = {"model": sha_of_model(llava.path), "asked": asked_sha, "task": task} | settings
    kept = Kept(output / f"{task}.jsonl", facts)
    eyes = Eyes(llava)
    ways = {"seen": False} | ({"blind": True} if args.blind == "true" else {})
    found = {}
    for name, blind in ways.items():
        if task == "choices":
            said = answer_choices(args, llava, asked, blind, kept, eyes)
            found[name] = score_choices(asked, said)
        else:
            wanted = one_of_each(asked) if task == "captions" else asked
            said = answer_questions(args, llava, wanted, blind, kept, eyes)
            found[name] = score_answers(asked, said, task == "captions")
    is_mmbench = task == "choices" and re.search(r"mmbench.*(cn|zh)", args.data_path, re.I)
    print(f"\n{table(found, PUBLISHED if is_mmbench else [])}")
    lost = [key for key, said in kept.known.items() if said is None and key.startswith("seen")]
    if lost:
        example = next(iter(eyes.faults.values()), "asked in an earlier run")
        print(f"{len(lost):,} questions could not be asked and count as misses, e.g. {example}")
    written = {"model": args.model, "data": args.data_path, "task": task, **found}
    written["unusable"] = len(lost)
    with files.atomic_file(output / f"{task}.json") as part:
        part.write_text(json.dumps(written, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"answers and figures: {output}")


if __name__ == "__main__":
    cli.run(main)
