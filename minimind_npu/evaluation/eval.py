"""Measure a trained model: bits per byte of held-out text, multiple choice, exact answers. All
batched.

    python minimind_npu/evaluation/eval.py                                                   # newest run on the built-in questions
    python minimind_npu/evaluation/eval.py --model_name_or_path output/minimind_npu/sft --held_out my.txt --choice ceval/val
    python minimind_npu/evaluation/eval.py --model_name_or_path my_model --choice q.csv --choice_by text --shots 5
    python minimind_npu/evaluation/eval.py --exact gsm8k_test.jsonl --max_new_tokens 256 --dtype bfloat16
    python minimind_npu/evaluation/eval.py --backend lm_eval --tasks ceval-valid,arc_easy    # lm-evaluation-harness on an export

--held_out: texts (a line of a .txt, or {"text"}). bits per byte = nats of all tokens and the end
token / (ln 2 * UTF-8 bytes); a document longer than --window is read in windows that overlap by
window - stride tokens, which count once. --choice: questions.py has the layouts. By letter: the
likeliest of A, B, C, D after the question with its choices; by text: the choice with the highest
log-likelihood per UTF-8 byte after the bare question. --exact: the greedy answer's last number, or
its text, against the given one. Chat models are asked in their chat template, others (--prompt
plain) go on with a text. Result: a table (eval.md too) and eval.json.
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

from evaluation import questions
import torch
from engine.generation import Engine, Speaker, newest
from model import MiniMindForCausalLM
from evaluation.questions import Choice, Exact
from torch import Tensor

from common import collators
from common.fast import attention, losses
from common.runs import report
from common.data.labels import encode_prompt
from common.data.load import load_rows, summary

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


# ---- scoring: packed rows, no padding -------------------------------------------------------------------------------


class Scorer:
    """Log-probabilities of token rows under a model; `tokens`: how many go into one forward
    pass."""

    def __init__(self, model, tokens: int = PACK):
        model.config._attn_implementation = attention.register()
        self.model, self.tokens = losses.use_chunked_loss(model.eval()), tokens

    def batches(self, rows: list[dict]):
        """Rows -> packed batches on the model's device, and the numbers of the rows in each."""
        rows = [row | {"row_id": i} for i, row in enumerate(rows)]
        collate = collators.PackedCollator()
        for chosen in collators.pack_bins([len(row["input_ids"]) for row in rows], self.tokens):
            batch = collate([[rows[i] for i in chosen]])
            ids = batch.pop("row_ids")
            yield (
                {k: v.to(self.model.device) if torch.is_tensor(v) else v for k, v in batch.items()},
                ids,
            )

    @torch.no_grad()
    def log_probs(self, rows: list[tuple[list[int], int]]) -> list[Tensor]:
        """[(ids, first)] -> log-probability of each of ids[first:] after what stands before it;
        first is at least 1."""
        made = [{"input_ids": ids, "labels": [-100] * first + ids[first:]} for ids, first in rows]
        found: list[Tensor] = [torch.zeros(0)] * len(rows)
        for batch, numbers in self.batches(made):
            values, owner, count = losses.answer_logprobs(self.model, **batch, use_cache=False)
            sizes = owner.bincount(minlength=count).tolist()
            for number, part in zip(numbers, values.float().cpu().split(sizes), strict=True):
                found[number] = part
        return found

    @torch.no_grad()
    def next_logits(self, prompts: list[list[int]], among: list[int]) -> Tensor:
        """Logits of the tokens `among` after each prompt, [prompts, len(among)]."""
        found = torch.zeros(len(prompts), len(among))
        for batch, numbers in self.batches([{"input_ids": p, "labels": p} for p in prompts]):
            batch.pop("labels")
            ends = batch["cu_seq_lens_q"][1:].long() - 1
            found[numbers] = (
                self.model(**batch, logits_to_keep=ends, use_cache=False)
                .logits[0, :, among]
                .float()
                .cpu()
            )
        return found


# ---- held-out text --------------------------------------------------------------------------------------------------


def windows(ids: list[int], size: int, stride: int) -> list[tuple[list[int], int]]:
    """A document -> [(tokens, first one that counts)]: every token but the first counts once, with
    at least size - stride tokens before it where the document has them."""
    out, counted = [], 1
    while counted < len(ids):
        end = min(len(ids), size if counted == 1 else counted + stride)
        start = max(0, end - size)
        out.append((ids[start:end], counted - start))
        counted = end
    return out


def held_out(scorer: Scorer, tokenizer, paths, size: int, stride: int, limit: int | None) -> dict:
    texts, stats = load_rows(paths, "text")
    cli.say(summary(stats))
    texts = [json.loads(row)["text"] for row in texts["row"]][:limit]
    rows, count = [], 0
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    begins = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else ends
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows += windows([*begins, *ids, *ends], size, stride)
    parts = scorer.log_probs(rows)
    nats, count = -sum(part.double().sum().item() for part in parts), sum(map(len, parts))
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


# ---- questions ------------------------------------------------------------------------------------------------------


class Asker:
    """Questions -> token ids, as a chat or as a text to go on with, with examples before them.

    window: tokens; room: how many are kept for the answer.
    """

    def __init__(self, tokenizer, as_chat: bool, window: int, thinking: bool | None = None):
        self.tokenizer, self.as_chat, self.window = tokenizer, as_chat, window
        knows = "enable_thinking" in str(tokenizer.chat_template)
        self.template = {} if thinking is None or not knows else {"enable_thinking": thinking}

    def prompt(self, shown: list[tuple[str, str]], asked: str, room: int) -> list[int] | None:
        """Examples (question, answer) and a question -> ids; examples go, the first ones first,
        where they do not fit. None where the question alone does not."""
        for left_out in range(len(shown) + 1):
            ids = self._ids(shown[left_out:], asked)
            if len(ids) + room <= self.window:
                return ids
        return None

    def _ids(self, shown: list[tuple[str, str]], asked: str) -> list[int]:
        if self.as_chat:
            turns = [
                turn for pair in shown for turn in zip(("user", "assistant"), pair, strict=True)
            ]
            messages = [{"role": role, "content": text} for role, text in [*turns, ("user", asked)]]
            return encode_prompt(self.tokenizer, messages, **self.template)
        text = "".join(f"{question}{answer}\n\n" for question, answer in shown) + asked
        begins = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        return begins + self.ids(text)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def listed(question: Choice) -> str:
    """A question with its choices, in its own language."""
    chinese = re.search("[\u4e00-\u9fff]", question.question + "".join(question.options))
    lines = [
        f"{letter}. {option}"
        for letter, option in zip(questions.LETTERS, question.options, strict=False)
    ]
    return "\n".join([question.question, *lines, "答案：" if chinese else "Answer:"])


def with_examples(
    found: questions.Read, shots: int, elsewhere: questions.Read | None
) -> list[tuple[list, list]]:
    """[(examples, questions to ask)] of each subject: `shots` of another set, or the subject's own
    first ones."""
    if elsewhere is None:
        return [(asked[:shots], asked[shots:]) for asked in found.subjects.values()]
    others = elsewhere.subjects
    everything = elsewhere.questions
    return [
        (others.get(subject, everything)[:shots], asked)
        for subject, asked in found.subjects.items()
    ]


def choose(
    scorer: Scorer, asker: Asker, found: questions.Read, shots: int, elsewhere, by_letter: bool
) -> list[tuple[Choice, int]]:
    """The model's choice of every question that fits into the window; the others are counted as
    left out."""
    rows, asked = [], []
    for examples, group in with_examples(found, shots, elsewhere):
        if by_letter:
            shown = [(listed(example), questions.LETTERS[example.right]) for example in examples]
        else:
            shown = [
                (as_text(example, asker), example.options[example.right]) for example in examples
            ]
        for question in group:
            options = [] if by_letter else [asker.ids(option) for option in question.options]
            room = 1 if by_letter else max(map(len, options))
            ids = asker.prompt(
                shown, listed(question) if by_letter else as_text(question, asker), room
            )
            if ids is None:
                found.drop(question.source, "longer than the model's window")
                continue
            asked.append(question)
            rows.append((ids, options))
    pick = picked_letters if by_letter else picked_texts
    return list(zip(asked, pick(scorer, asker, asked, rows), strict=True))


def as_text(question: Choice, asker: Asker) -> str:
    return question.question if asker.as_chat else question.question + "\n"


def picked_letters(scorer: Scorer, asker: Asker, asked: list[Choice], rows: list) -> list[int]:
    count = max((len(question.options) for question in asked), default=0)
    letters = [asker.ids(letter) for letter in questions.LETTERS[:count]]
    if any(len(ids) != 1 for ids in letters):
        raise SystemExit("a letter is no single token of this tokenizer: --choice_by text")
    logits = scorer.next_logits([ids for ids, _ in rows], [ids[0] for ids in letters])
    return [int(row[: len(q.options)].argmax()) for q, row in zip(asked, logits, strict=True)]


def picked_texts(scorer: Scorer, asker: Asker, asked: list[Choice], rows: list) -> list[int]:
    flat = [(ids + option, len(ids)) for ids, options in rows for option in options]
    sums = iter([part.sum().item() for part in scorer.log_probs(flat)])
    values = [
        [next(sums) / len(option.encode()) for option in question.options] for question in asked
    ]
    return [row.index(max(row)) for row in values]


def accuracy(right: list[bool]) -> dict:
    """{"accuracy", "standard_error" (of a share), "questions"}."""
    share, n = sum(right) / len(right), len(right)
    return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / n), "questions": n}


def score(pairs: list[tuple[Choice, int]]) -> dict:
    """Questions with the model's choices -> accuracy beside that of guessing."""
    chance = sum(1 / len(question.options) for question, _ in pairs) / len(pairs)
    return accuracy([pick == question.right for question, pick in pairs]) | {"chance": chance}


def multiple_choice(scorer: Scorer, asker: Asker, args, by: str) -> dict:
    found = questions.read(args.choice, Choice, args.num_rows)
    elsewhere = questions.read(args.shots_from, Choice) if args.shots and args.shots_from else None
    answered = choose(scorer, asker, found, args.shots, elsewhere, by == "letter")
    tell_dropped(found)
    if not answered:
        raise SystemExit("--choice: no question is left to ask; fewer --shots, or a longer window")
    subjects: dict[str, list] = {}
    for question, pick in answered:
        subjects.setdefault(question.subject, []).append((question, pick))
    each = {name: score(pairs) for name, pairs in subjects.items()}
    return score(answered) | {"shots": args.shots, "subjects": each, "dropped": found.dropped}


def exact_match(model, asker: Asker, args, ends: frozenset[int]) -> dict:
    found = questions.read(args.exact, Exact, args.num_rows)
    elsewhere = questions.read(args.shots_from, Exact) if args.shots and args.shots_from else None
    asked, prompts = [], []
    for examples, group in with_examples(found, args.shots, elsewhere):
        shown = [(as_exact(e.question, asker), e.solution) for e in examples]
        for question in group:
            ids = asker.prompt(shown, as_exact(question.question, asker), args.max_new_tokens)
            if ids is None:
                found.drop(question.source, "longer than the model's window")
                continue
            asked.append(question)
            prompts.append(ids)
    tell_dropped(found)
    if not asked:
        raise SystemExit("--exact: no question is left to ask; fewer --shots or --max_new_tokens")
    began = time.perf_counter()
    new = Engine(model, args.batch_size).generate(prompts, args.max_new_tokens, ends=ends)
    seconds, count = time.perf_counter() - began, sum(map(len, new))
    texts = asker.tokenizer.batch_decode(new, skip_special_tokens=True)
    right = [
        questions.same(cut(text, asker), q.final) for q, text in zip(asked, texts, strict=True)
    ]
    samples = [
        {"question": q.question, "expected": q.final, "answer": text, "right": ok}
        for q, text, ok in zip(asked, texts, right, strict=True)
    ]
    return accuracy(right) | {
        "ended": sum(ids[-1] in ends for ids in new) / len(new),
        "shots": args.shots,
        "dropped": found.dropped,
        "tokens": count,
        "tokens_per_second": count / seconds,
        "answers": samples[:SHOWN],
    }


def as_exact(question: str, asker: Asker) -> str:
    return question if asker.as_chat else f"问：{question}\n答："


def cut(text: str, asker: Asker) -> str:
    """A plain continuation ends where it begins the next question."""
    return text if asker.as_chat else text.split("\n问：")[0]


def tell_dropped(found: questions.Read) -> None:
    for reason, count in found.dropped.items():
        cli.say(f"  {count:,} left out, e.g. {found.examples[reason]}")


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------


def harness(speaker: Speaker, args) -> dict:
    """lm-evaluation-harness on the model as transformers knows it (export.py). -> {task: {metric:
    value}}."""
    try:
        import lm_eval
    except ImportError:
        raise SystemExit(
            "--backend lm_eval: lm-evaluation-harness is not installed; pip install lm-eval"
        ) from None
    import export

    with tempfile.TemporaryDirectory() as folder:
        model, place = speaker.model, speaker.path
        if speaker.adapter:
            model = model.merge_and_unload()
        if isinstance(model, MiniMindForCausalLM):
            place = str(Path(folder) / "exported")
            export.write_native(model, speaker.tokenizer, place)
        where = {"pretrained": place, "dtype": str(model.dtype).removeprefix("torch.")}
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=where,
            tasks=args.tasks.split(","),
            num_fewshot=args.shots or None,
            batch_size=args.batch_size,
            limit=args.num_rows,
            device=str(model.device),
        )["results"]
    return {
        task: {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for task, values in found.items()
    }


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
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
    args = parser.parse_args(argv)
    if not any((args.held_out, args.choice, args.exact)) and args.backend == "own":
        vars(args).update({name: [str(path)] for name, path in BUILT_IN.items()})
    args.stride = args.stride or max(1, args.window // 2)
    if problem := contradiction(args):
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


def evaluate(args) -> dict:
    """All that was asked for, by name; SystemExit with one line for what the user has to repair."""
    speaker = Speaker(args.model_name_or_path or newest())
    if DTYPES[args.dtype] is not None:
        speaker.model.to(DTYPES[args.dtype])
    model, began = speaker.model, time.perf_counter()
    facts = {
        "model": speaker.name,
        "device": device.name(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    cli.say(
        f"{speaker.name}: {model.num_parameters():,} parameters, {facts['dtype']} on {facts['device']}"
    )
    if args.backend == "lm_eval":
        results: dict = {"lm_eval": harness(speaker, args)}
    else:
        results = own(speaker, args)
    facts |= {
        "recipe": HERE.name,
        "seconds": time.perf_counter() - began,
        "versions": report.versions(),
    }
    return facts | results | {"command": f"python {' '.join(sys.argv)}"}


def own(speaker: Speaker, args) -> dict:
    as_chat = speaker.chats if args.prompt == "auto" else args.prompt == "chat"
    if as_chat and speaker.tokenizer.chat_template is None:
        raise SystemExit("--prompt chat: this model's tokenizer has no chat template")
    results, scorer = {}, Scorer(speaker.model)
    asker = Asker(
        speaker.tokenizer, as_chat, speaker.window, {"on": True, "off": False}.get(args.thinking)
    )
    if args.held_out:
        size = min(args.window, speaker.window)
        results["held_out"] = held_out(
            scorer,
            speaker.tokenizer,
            args.held_out,
            size,
            min(args.stride, size - 1),
            args.num_rows,
        )
    if args.choice:
        plain = Asker(
            speaker.tokenizer, as_chat, speaker.window
        )  # nothing is thought before a letter
        results["choice"] = {by: multiple_choice(scorer, plain, args, by) for by in args.choice_by}
    if args.exact:
        results["exact"] = exact_match(speaker.model, asker, args, speaker.ends)
    return results


def table(results: dict) -> str:
    lines = []
    if found := results.get("held_out"):
        lines += [
            "| held out | bits per byte | perplexity | tokens | bytes |",
            "|---|---:|---:|---:|---:|",
        ]
        cells = f"{found['bits_per_byte']:.4f} | {found['perplexity']:,.2f} | {found['tokens']:,} | {found['bytes']:,}"
        lines += [f"| {found['documents']:,} texts | {cells} |", ""]
    for by, found in results.get("choice", {}).items():
        lines += [f"| choice by {by} | accuracy | chance | questions |", "|---|---:|---:|---:|"]
        named = (
            {**found["subjects"], "all": found} if len(found["subjects"]) > 1 else found["subjects"]
        )
        lines += [
            f"| {name} | {share(row)} | {row['chance']:.1%} | {row['questions']:,} |"
            for name, row in named.items()
        ]
        lines += [""]
    if found := results.get("exact"):
        lines += [
            "| exact answers | right | ended by themselves | questions |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {found['shots']} shots | {share(found)} | {found['ended']:.1%} | {found['questions']:,} |",
            "",
        ]
    for task, values in results.get("lm_eval", {}).items():
        lines += [f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())]
    return "\n".join(lines).rstrip()


def share(row: dict) -> str:
    return f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}"


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    results = evaluate(args)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "eval.json": json.dumps(results, indent=1, ensure_ascii=False),
        "eval.md": table(results) + "\n",
    }
    for name, text in texts.items():
        part = out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)
    cli.say(f"{table(results)}\n{results['seconds']:,.1f} s -> {out / 'eval.json'}")


if __name__ == "__main__":
    cli.run(main)
