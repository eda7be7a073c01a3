"""Measure a trained model: bits per byte of held-out text, multiple choice, exact answers. All
batched.

    python minimind_npu/evaluation/eval.py               # the newest run on the built-in questions
    python minimind_npu/evaluation/eval.py --model output/minimind_npu/sft --held_out my.txt
    python minimind_npu/evaluation/eval.py --choice q.csv --choice_by text --shots 5
    python minimind_npu/evaluation/eval.py --exact gsm8k_test.jsonl --max_new_tokens 256
    python minimind_npu/evaluation/eval.py --backend lm_eval --tasks ceval-valid,arc_easy

--held_out: texts (a line of a .txt, or {"text"}). bits per byte = nats of all tokens and the end
token / (ln 2 * UTF-8 bytes); a document longer than --window is read in windows that overlap by
window - stride tokens, which count once. --choice: questions.py has the layouts. By letter: the
likeliest of A, B, C, D after the question with its choices; by text: the choice with the highest
log-likelihood per UTF-8 byte after the bare question. --exact: the greedy answer's last number, or
its text, against the given one. Chat models are asked in their chat template, others (--prompt
plain) go on with a text. lm_eval is lm-evaluation-harness, on an export of the model. Result: a
table (eval.md too) and eval.json, written after each part; exact answers stand in answers.jsonl as
they come.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)

import argparse
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from engine.generation import Engine, MiniMindChatModel, newest
from evaluation import questions
from evaluation.journal import keep_results
from evaluation.questions import Choice, Exact
from model import MiniMindForCausalLM
from torch import Tensor

from common import collators
from common.data.spelling import IGNORE
from common.convert import adapter
from common.data.labels import encode_prompt
from common.data.spelling import encode_text
from common.data.load import load_rows, summary
from common.data.progress import Progress
from common.fast import attention, losses
from common.runs import report
from common.runs.generate import answer_text

SAMPLES = HERE / "data" / "eval"
BUILT_IN = {
    "held_out": SAMPLES / "held_out.txt",
    "choice": SAMPLES / "ceval",
    "exact": SAMPLES / "gsm.jsonl",
}
PACK = 4096  # tokens of one forward pass
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHOWN = 20  # answers kept in eval.json
TOO_LONG = "longer than the model's window"


# ---- scoring: packed rows, no padding ------------------------------------------------------------


class Scorer:
    """Log-probabilities of token rows under a model; `tokens`: how many go into one forward
    pass."""

    def __init__(self, model, tokens: int = PACK):
        model.config._attn_implementation = attention.register()
        self.model = losses.use_chunked_loss(model.eval())
        self.tokens = tokens

    def batches(self, rows: list[dict]):
        """Rows -> packed batches on the model's device, and the numbers of the rows in each."""
        rows = [row | {"row_id": i} for i, row in enumerate(rows)]
        sizes = [len(row["input_ids"]) for row in rows]
        collate = collators.PackedCollator()
        with Progress("score", total=len(rows)) as progress:
            for chosen in collators.pack_bins(sizes, self.tokens):
                batch = collate([[rows[i] for i in chosen]])
                numbers = batch.pop("row_ids")
                yield self.on_device(batch), numbers
                progress.update(len(numbers))

    def on_device(self, batch: dict) -> dict:
        where = self.model.device
        return {k: v.to(where) if torch.is_tensor(v) else v for k, v in batch.items()}

    @torch.no_grad()
    def log_probs(self, rows: list[tuple[list[int], int]]) -> list[Tensor]:
        """[(ids, first)] -> log-probability of each of ids[first:] after what stands before it;
        first is at least 1."""
        made = []
        for ids, first in rows:
            made.append({"input_ids": ids, "labels": [IGNORE] * first + ids[first:]})
        found: list[Tensor] = [torch.zeros(0)] * len(rows)
        for batch, numbers in self.batches(made):
            values, owner, count = losses.answer_logprobs(self.model, **batch, use_cache=False)
            sizes = owner.bincount(minlength=count).tolist()
            for number, of_row in zip(numbers, values.float().cpu().split(sizes), strict=True):
                found[number] = of_row
        return found

    @torch.no_grad()
    def next_logits(self, prompts: list[list[int]], among: list[int]) -> Tensor:
        """Logits of the tokens `among` after each prompt, [prompts, len(among)]."""
        found = torch.zeros(len(prompts), len(among))
        for batch, numbers in self.batches([{"input_ids": p, "labels": p} for p in prompts]):
            batch.pop("labels")
            last = batch["cu_seq_lens_q"][1:].long() - 1
            out = self.model(**batch, logits_to_keep=last, use_cache=False)
            found[numbers] = out.logits[0, :, among].float().cpu()
        return found


# ---- held-out text -------------------------------------------------------------------------------


def windows(ids: list[int], size: int, stride: int) -> list[tuple[list[int], int]]:
    """A document -> [(tokens, first one that counts)]: every token but the first counts once, with
    at least size - stride tokens before it where the document has them."""
    found = []
    counted = 1
    while counted < len(ids):
        end = min(len(ids), size if counted == 1 else counted + stride)
        start = max(0, end - size)
        found.append((ids[start:end], counted - start))
        counted = end
    return found


def held_out(scorer: Scorer, tokenizer, paths, size: int, stride: int, limit: int | None) -> dict:
    texts, stats = load_rows(paths, "text")
    cli.say(summary(stats))
    texts = [json.loads(row)["text"] for row in texts["row"]][:limit]
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begins = ends if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for text in texts:
        rows += windows([*encode_text(tokenizer, text, begins), *ends], size, stride)
    log_probs = scorer.log_probs(rows)
    nats = -sum(of_row.double().sum().item() for of_row in log_probs)
    count = sum(len(of_row) for of_row in log_probs)
    total = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": nats / math.log(2) / total,
        "perplexity": math.exp(min(nats / count, 700)),
        "loss": nats / count,
        "tokens": count,
        "bytes": total,
        "bytes_per_token": total / count,
        "documents": len(texts),
        "window": size,
        "stride": stride,
        "dropped": stats["dropped"],
    }


# ---- questions -----------------------------------------------------------------------------------


class Asker:
    """Questions -> token ids, as a chat or as a text to go on with, with examples before them.

    window: tokens of prompt and answer together; thinking: for templates that know it, None: as
        they have it.
    """

    def __init__(self, tokenizer, as_chat: bool, window: int, thinking: bool | None = None):
        self.tokenizer = tokenizer
        self.as_chat = as_chat
        self.window = window
        self.template = {}
        if thinking is not None and "enable_thinking" in str(tokenizer.chat_template):
            self.template = {"enable_thinking": thinking}

    def prompt(self, shown: list[tuple[str, str]], asked: str, room: int) -> list[int] | None:
        """Examples (question, answer) and a question -> ids; examples go, the first ones first,
        where they and `room` more tokens do not fit. None where the question alone does not."""
        for left_out in range(len(shown) + 1):
            ids = self._ids(shown[left_out:], asked)
            if len(ids) + room <= self.window:
                return ids
        return None

    def _ids(self, shown: list[tuple[str, str]], asked: str) -> list[int]:
        if self.as_chat:
            messages = []
            for question, answer in shown:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": asked})
            return encode_prompt(self.tokenizer, messages, **self.template)
        text = "".join(f"{question}{answer}\n\n" for question, answer in shown) + asked
        bos = self.tokenizer.bos_token_id
        return self.ids(text) if bos is None else [bos, *self.ids(text)]

    def ids(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text, [])


def listed(question: Choice) -> str:
    """A question with its choices, in its own language."""
    chinese = re.search("[\u4e00-\u9fff]", question.question + "".join(question.options))
    lines = [question.question]
    for letter, option in zip(questions.LETTERS, question.options, strict=False):
        lines.append(f"{letter}. {option}")
    lines.append("答案：" if chinese else "Answer:")
    return "\n".join(lines)


def as_text(question: Choice, asker: Asker) -> str:
    return question.question if asker.as_chat else question.question + "\n"


def as_exact(question: str, asker: Asker) -> str:
    return question if asker.as_chat else f"问：{question}\n答："


def with_examples(
    found: questions.Read, shots: int, elsewhere: questions.Read | None
) -> list[tuple[list, list]]:
    """[(examples, questions to ask)] of each subject: `shots` of another set, or the subject's own
    first ones."""
    groups = []
    for subject, own in found.subjects.items():
        if elsewhere is None:
            groups.append((own[:shots], own[shots:]))
        else:
            others = elsewhere.subjects.get(subject, elsewhere.questions)
            groups.append((others[:shots], own))
    return groups


def read_examples(args, kind: type) -> questions.Read | None:
    """The questions of --shots_from, where examples are wanted."""
    if not (args.shots and args.shots_from):
        return None
    return questions.read(args.shots_from, kind)


def tell_dropped(found: questions.Read) -> None:
    for reason, count in found.dropped.items():
        cli.say(f"  {count:,} left out, e.g. {found.examples[reason]}")


def accuracy(right: list[bool]) -> dict:
    """{"accuracy", "standard_error" (of a share), "questions"}."""
    count = len(right)
    share = sum(right) / count
    error = math.sqrt(share * (1 - share) / count)
    return {"accuracy": share, "standard_error": error, "questions": count}


# ---- multiple choice -----------------------------------------------------------------------------


def multiple_choice(scorer: Scorer, asker: Asker, args, by: str) -> dict:
    """by: "letter" or "text"."""
    found = questions.read(args.choice, Choice, args.num_rows)
    elsewhere = read_examples(args, Choice)
    choose = choose_letters if by == "letter" else choose_texts
    answered = choose(scorer, asker, found, with_examples(found, args.shots, elsewhere))
    tell_dropped(found)
    if not answered:
        raise SystemExit("--choice: no question is left to ask; fewer --shots, or a longer window")
    by_subject: dict[str, list] = {}
    for question, pick in answered:
        by_subject.setdefault(question.subject, []).append((question, pick))
    subjects = {name: score(pairs) for name, pairs in by_subject.items()}
    more = {"shots": args.shots, "subjects": subjects, "dropped": found.dropped}
    return score(answered) | more


def choose_letters(
    scorer: Scorer, asker: Asker, found: questions.Read, groups: list[tuple[list, list]]
) -> list[tuple[Choice, int]]:
    """The likeliest letter after every question that fits into the window; the others are counted
    as left out."""
    asked = []
    prompts = []
    for examples, group in groups:
        shown = [(listed(example), questions.LETTERS[example.right]) for example in examples]
        for question in group:
            ids = asker.prompt(shown, listed(question), room=1)
            if ids is None:
                found.drop(question.source, TOO_LONG)
                continue
            asked.append(question)
            prompts.append(ids)
    picks = picked_letters(scorer, asker, asked, prompts)
    return list(zip(asked, picks, strict=True))


def choose_texts(
    scorer: Scorer, asker: Asker, found: questions.Read, groups: list[tuple[list, list]]
) -> list[tuple[Choice, int]]:
    """The same by the text of the choices."""
    asked = []
    rows = []
    for examples, group in groups:
        shown = [(as_text(one, asker), one.options[one.right]) for one in examples]
        for question in group:
            options = [asker.ids(option) for option in question.options]
            longest = max(len(option) for option in options)
            ids = asker.prompt(shown, as_text(question, asker), room=longest)
            if ids is None:
                found.drop(question.source, TOO_LONG)
                continue
            asked.append(question)
            rows.append((ids, options))
    picks = picked_texts(scorer, asked, rows)
    return list(zip(asked, picks, strict=True))


def picked_letters(
    scorer: Scorer, asker: Asker, asked: list[Choice], prompts: list[list[int]]
) -> list[int]:
    count = max((len(question.options) for question in asked), default=0)
    letters = [asker.ids(letter) for letter in questions.LETTERS[:count]]
    if any(len(ids) != 1 for ids in letters):
        raise SystemExit("a letter is no single token of this tokenizer: --choice_by text")
    logits = scorer.next_logits(prompts, [ids[0] for ids in letters])
    picks = []
    for question, row in zip(asked, logits, strict=True):
        picks.append(int(row[: len(question.options)].argmax()))
    return picks


def picked_texts(scorer: Scorer, asked: list[Choice], rows: list) -> list[int]:
    """rows: (ids of the prompt, ids of each choice)."""
    flat = [(ids + option, len(ids)) for ids, options in rows for option in options]
    sums = iter([of_row.sum().item() for of_row in scorer.log_probs(flat)])
    picks = []
    for question in asked:
        values = [next(sums) / len(option.encode()) for option in question.options]
        picks.append(values.index(max(values)))
    return picks


def score(pairs: list[tuple[Choice, int]]) -> dict:
    """Questions with the model's choices -> accuracy beside that of guessing."""
    chance = sum(1 / len(question.options) for question, _ in pairs) / len(pairs)
    return accuracy([pick == question.right for question, pick in pairs]) | {"chance": chance}


# ---- exact answers -------------------------------------------------------------------------------


def exact_match(model, asker: Asker, args, ends: frozenset[int], file: Path | None = None) -> dict:
    """file: gets a line for each answer as soon as it is there."""
    found = questions.read(args.exact, Exact, args.num_rows)
    asked = []
    prompts = []
    for examples, group in with_examples(found, args.shots, read_examples(args, Exact)):
        shown = [(as_exact(one.question, asker), one.solution) for one in examples]
        for question in group:
            ids = asker.prompt(shown, as_exact(question.question, asker), args.max_new_tokens)
            if ids is None:
                found.drop(question.source, TOO_LONG)
                continue
            asked.append(question)
            prompts.append(ids)
    tell_dropped(found)
    if not asked:
        raise SystemExit("--exact: no question is left to ask; fewer --shots or --max_new_tokens")

    began = time.perf_counter()
    new: list[list[int]] = [[] for _ in prompts]
    samples: list[dict] = [{} for _ in prompts]
    with open(file or os.devnull, "w", encoding="utf-8") as lines:
        for index, ids in answers(model, prompts, args, ends):
            new[index] = ids
            samples[index] = judged(asked[index], ids, asker)
            lines.write(json.dumps(samples[index], ensure_ascii=False) + "\n")
            lines.flush()
    seconds = time.perf_counter() - began
    tokens = sum(len(ids) for ids in new)
    return accuracy([sample["right"] for sample in samples]) | {
        "ended": sum(ids[-1] in ends for ids in new) / len(new),
        "shots": args.shots,
        "dropped": found.dropped,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "answers": samples[:SHOWN],
    }


def judged(question: Exact, ids: list[int], asker: Asker) -> dict:
    text = answer_text(asker.tokenizer, ids)
    # a plain continuation ends where it begins the next question
    said = text if asker.as_chat else text.split("\n问：")[0]
    facts = {"question": question.question, "expected": question.final, "answer": text}
    try:
        return facts | {"right": questions.same(said, question.final)}
    except Exception as error:  # what a model may say is boundless; the other answers count
        cli.say(
            f"  {question.source}: not judged, counts as wrong ({type(error).__name__} {error})"
        )
        return facts | {"right": False}


def answers(
    model, prompts: list[list[int]], args, ends: frozenset[int]
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its new token ids, the end token among them) as they are complete;
    greedy."""
    growing: dict[int, list[int]] = {}
    engine = Engine(model, args.batch_size)
    with Progress("answer", unit="tokens") as progress:
        for index, token in engine.stream(prompts, args.max_new_tokens, ends=ends):
            growing.setdefault(index, []).append(token)
            progress.update(1)
            if token in ends or len(growing[index]) == args.max_new_tokens:
                yield index, growing.pop(index)
        yield from growing.items()  # the window ended them


# ---- lm-evaluation-harness -----------------------------------------------------------------------


def harness(chat_model: MiniMindChatModel, args) -> dict:
    """-> {task: {metric: value}}."""
    found = {}
    results = asked_by_harness(chat_model, args, args.tasks.split(","))["results"]
    for task, values in results.items():
        found[task] = {k: v for k, v in values.items() if isinstance(v, (int, float))}
    return found


def asked_by_harness(chat_model: MiniMindChatModel, args, tasks: list, **more) -> dict:
    """lm-evaluation-harness on the model as transformers knows it (export.py), with the token that
    its documents begin with before each prompt, as everywhere here.

    more: further arguments of lm_eval.simple_evaluate, whose result this is.
    """
    try:
        import lm_eval
    except ImportError:
        raise SystemExit(
            "--backend lm_eval: lm-evaluation-harness is not installed; pip install lm-eval"
        ) from None
    import export

    model = chat_model.model
    place = chat_model.path
    if chat_model.adapter:
        model = adapter.merge_into(model)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, MiniMindForCausalLM):
            place = str(Path(folder) / "exported")
            export.write_native(model, chat_model.tokenizer, place)
        facts = {"pretrained": place, "dtype": str(model.dtype).removeprefix("torch.")}
        if chat_model.tokenizer.bos_token_id is not None:
            facts["add_bos_token"] = True
        return lm_eval.simple_evaluate(
            model="hf",
            model_args=facts,
            tasks=tasks,
            num_fewshot=args.shots or None,
            batch_size=args.batch_size,
            limit=args.num_rows,
            device=str(model.device),
            **more,
        )


# ---- command line --------------------------------------------------------------------------------


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--model_name_or_path",
        "--model",
        help="run, model or adapter folder; unset: the newest run",
    )
    add("--held_out", nargs="+", help="files or folders of texts")
    add("--choice", nargs="+", help="files or folders of multiple-choice questions")
    add("--exact", nargs="+", help="files or folders of questions with exact answers")
    add("--choice_by", nargs="+", choices=("letter", "text"), default=["letter", "text"])
    add("--shots", type=int, default=0, help="examples before each question, of its subject")
    add(
        "--shots_from",
        nargs="+",
        help="files of examples; unset: a subject's first questions, which are not scored",
    )
    add(
        "--prompt",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="auto: chat, but plain after pretrain",
    )
    add(
        "--thinking",
        choices=("template", "on", "off"),
        default="template",
        help="before an exact answer",
    )
    add("--window", type=int, default=512, help="tokens of held-out text read at once")
    add("--stride", type=int, help="tokens counted of each further window; unset: half of it")
    add("--max_new_tokens", type=int, default=256, help="length limit of an exact answer")
    add("--batch_size", type=int, default=8, help="answers generated at once")
    add("--num_rows", type=int, help="at most so many texts, and questions of a file")
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: half on accelerators, float32 on a CPU",
    )
    add(
        "--backend",
        choices=("own", "lm_eval"),
        default="own",
        help="lm_eval: lm-evaluation-harness, --tasks",
    )
    add("--tasks", default="", help="of lm-evaluation-harness: ceval-valid,cmmlu,arc_easy")
    add(
        "--output_dir",
        default=str(HERE.parent / "output" / HERE.name / "eval"),
        help="for eval.json",
    )
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    if not any((args.held_out, args.choice, args.exact)) and args.backend == "own":
        vars(args).update({name: [str(path)] for name, path in BUILT_IN.items()})
    args.stride = args.stride or max(1, args.window // 2)
    problem = contradiction(args)
    if problem:
        raise cli.usage_error(problem)
    return args


def contradiction(args) -> str | None:
    for name in ("window", "stride", "max_new_tokens", "batch_size", "num_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name} {value} makes no sense"
    if args.shots < 0:
        return f"--shots {args.shots} makes no sense"
    if args.window < 2 or args.stride > args.window - 1:
        return f"--stride {args.stride} has to be below --window {args.window}"
    if args.backend == "lm_eval" and not args.tasks:
        return "--backend lm_eval needs --tasks, for example --tasks ceval-valid,arc_easy"
    if args.tasks and args.backend != "lm_eval":
        return "--tasks belongs to --backend lm_eval"
    return None


def evaluate(args, keep: Callable[[dict], None] = lambda results: None, out=None) -> dict:
    """All that was asked for, by name; SystemExit with one line for what the user has to repair.

    keep: gets what is known so far after each part; out: the folder for answers.jsonl, None for
        none.
    """
    chat_model = MiniMindChatModel(args.model_name_or_path or newest())
    model = chat_model.model
    if DTYPES[args.dtype] is not None:
        model.to(DTYPES[args.dtype])
    began = time.perf_counter()
    facts = {
        "model": chat_model.name,
        "device": device.name(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    cli.say(
        f"{chat_model.name}: {model.num_parameters():,} parameters, {facts['dtype']} on "
        f"{facts['device']}"
    )
    facts |= {"recipe": HERE.name, "versions": report.versions()}
    facts["command"] = f"python {' '.join(sys.argv)}"
    if args.backend == "lm_eval":
        parts = iter([("lm_eval", harness(chat_model, args))])
    else:
        parts = own(chat_model, args, out)
    for name, result in parts:
        facts |= {name: result, "seconds": time.perf_counter() - began}
        keep(facts)
    return facts


def own(chat_model: MiniMindChatModel, args, out: Path | None) -> Iterator[tuple[str, dict]]:
    """(name, result) of each part."""
    tokenizer = chat_model.tokenizer
    window = chat_model.window
    as_chat = chat_model.chats if args.prompt == "auto" else args.prompt == "chat"
    if as_chat and tokenizer.chat_template is None:
        raise SystemExit("--prompt chat: this model's tokenizer has no chat template")
    scorer = Scorer(chat_model.model)
    if args.held_out:
        size = min(args.window, window)
        stride = min(args.stride, size - 1)
        found = held_out(scorer, tokenizer, args.held_out, size, stride, args.num_rows)
        yield "held_out", found
    if args.choice:
        asker = Asker(tokenizer, as_chat, window)  # nothing is thought before a letter
        yield "choice", {by: multiple_choice(scorer, asker, args, by) for by in args.choice_by}
    if args.exact:
        thinking = {"template": None, "on": True, "off": False}[args.thinking]
        asker = Asker(tokenizer, as_chat, window, thinking)
        file = out / "answers.jsonl" if out else None
        yield "exact", exact_match(chat_model.model, asker, args, chat_model.ends, file)


# ---- what people see -----------------------------------------------------------------------------


def table(results: dict) -> str:
    lines = []
    if "held_out" in results:
        lines += held_out_table(results["held_out"])
    for by, found in results.get("choice", {}).items():
        lines += choice_table(by, found)
    if "exact" in results:
        lines += exact_table(results["exact"])
    for task, values in results.get("lm_eval", {}).items():
        lines.append(f"{task}: " + ", ".join(f"{name} {v:.4g}" for name, v in values.items()))
    return "\n".join(lines).rstrip()


def held_out_table(found: dict) -> list[str]:
    cells = (
        f"{found['documents']:,} texts",
        f"{found['bits_per_byte']:.4f}",
        f"{found['perplexity']:,.2f}",
        f"{found['tokens']:,}",
        f"{found['bytes']:,}",
    )
    return [
        "| held out | bits per byte | perplexity | tokens | bytes |",
        "|---|---:|---:|---:|---:|",
        f"| {' | '.join(cells)} |",
        "",
    ]


def choice_table(by: str, found: dict) -> list[str]:
    rows = dict(found["subjects"])
    if len(rows) > 1:
        rows["all"] = found
    lines = [f"| choice by {by} | accuracy | chance | questions |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {share(row)} | {row['chance']:.1%} | {row['questions']:,} |")
    return [*lines, ""]


def exact_table(found: dict) -> list[str]:
    cells = (
        f"{found['shots']} shots",
        share(found),
        f"{found['ended']:.1%}",
        f"{found['questions']:,}",
    )
    return [
        "| exact answers | right | ended by themselves | questions |",
        "|---|---:|---:|---:|",
        f"| {' | '.join(cells)} |",
        "",
    ]


def share(row: dict) -> str:
    return f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}"


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    def keep(results: dict) -> None:
        keep_results(out, "eval", results, table(results))

    results = evaluate(args, keep, out)
    cli.say(f"{table(results)}\n{results['seconds']:,.1f} s -> {out / 'eval.json'}")


if __name__ == "__main__":
    cli.run(main)
