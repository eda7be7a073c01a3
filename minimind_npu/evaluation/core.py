"""CORE of DCLM (Li et al. 2024): 22 tasks in context, centred, and a Chinese counterpart; for base
models.

    python minimind_npu/evaluation/core.py --bundle eval_bundle --model output/road/pretrain
    python minimind_npu/evaluation/core.py --zh ceval=ceval/val cmmlu=cmmlu/test c3=c3/dev

--bundle: the folder with core.yaml, eval_data/ and eval_meta_data.csv, as DCLM's evaluation has it.
Each question stands behind examples of its task, chosen by its number:
    multiple_choice     the option whose tokens are likeliest on average
    schema              the context after which the continuation is
    language_modeling   whether every token of the continuation is the likeliest one
--zh: choices in the layouts of tasks.py, asked the same way; CORE-zh is their mean, ours alone.
centred: (accuracy - baseline) / (1 - baseline); CORE is the mean over the tasks. Prompts, examples
and their order are those of nanochat's core_eval. Answers are kept as they come (core.jsonl); the
last line is JSON. Several devices: python common/launch.py 8 minimind_npu/evaluation/core.py ...
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this folder
from common import cli, device  # noqa: I001  (device before torch and transformers)

import argparse
import hashlib
import json
import time

import torch
import weights
from engine.generation import MiniMindChatModel, newest
from evaluation.eval import Scorer
from evaluation.in_context import InContext, read_bundle, read_zh, rows_to_score
from evaluation.journal import Journal, join_others, keep_results

from common.data.spelling import IGNORE, encode_text

BUILT_IN = [f"ceval={HERE / 'data/eval/ceval'}", f"arc_easy={HERE / 'data/eval/choice.jsonl'}"]
WHOLE = 22  # tasks of CORE
AT_ONCE = 32  # questions between two writes


# ---- scores --------------------------------------------------------------------------------------


def answer(scorer: Scorer, task: InContext, asked: list[list[tuple]]) -> list[int]:
    """For each question the option chosen; of language_modeling 1 where all is right, else 0."""
    flat = [row for rows in asked for row in rows]
    if task.kind == "language_modeling":
        return [int(right) for right in all_likeliest(scorer, flat)]
    means = iter([of_row.mean().item() for of_row in scorer.log_probs(flat)])
    picks = []
    for rows in asked:
        values = [next(means) for _ in rows]
        picks.append(values.index(max(values)))
    return picks


@torch.no_grad()
def all_likeliest(scorer: Scorer, rows: list[tuple[list[int], int]]) -> list[bool]:
    """[(ids, first)] -> whether each of ids[first:] is the likeliest token at its place."""
    made = []
    for ids, first in rows:
        made.append({"input_ids": ids, "labels": [IGNORE] * first + ids[first:]})
    found = [False] * len(rows)
    for batch, numbers in scorer.batches(made):
        labels = batch.pop("labels")[0]
        places = (labels != IGNORE).nonzero()[:, 0]
        out = scorer.model(**batch, logits_to_keep=places - 1, use_cache=False)
        right = out.logits[0].argmax(-1) == labels[places]
        owner = torch.bucketize(places, batch["cu_seq_lens_q"][1:].long(), right=True)
        for i, number in enumerate(numbers):
            found[number] = bool(right[owner == i].all())
    return found


def ask(task: InContext, scorer: Scorer, encode, window: int, journal: Journal) -> int:
    """Ask what has no answer yet; -> questions that do not fit into the window."""
    waiting = []
    left_out = 0
    for number in range(len(task.rows)):
        if journal.has(task.label, number):
            continue
        rows = rows_to_score(task, number, encode, window)
        if rows is None:
            left_out += 1
        elif journal.is_mine(number):
            waiting.append((number, rows))
    for start in range(0, len(waiting), AT_ONCE):
        part = waiting[start : start + AT_ONCE]
        picks = answer(scorer, task, [rows for _, rows in part])
        for (number, _), pick in zip(part, picks, strict=True):
            right = pick == task.rows[number].get("gold", 1)
            name = {"task": task.label, "question": number, "sample": 0}
            journal.add(name | {"right": right, "answer": pick})
    return left_out


def score(task: InContext, journal: Journal, left_out: int) -> dict:
    right = [one["right"] for one in journal.of(task.label)]
    if not right:
        raise SystemExit(f"{task.label}: no question fits into the model's window")
    accuracy = sum(right) / len(right)
    return {
        "accuracy": accuracy,
        "baseline": task.baseline,
        "centred": (accuracy - task.baseline) / (1 - task.baseline),
        "questions": len(right),
        "shots": task.shots,
        "left_out": left_out,
    }


# ---- the run -------------------------------------------------------------------------------------


def evaluate(args, chat_model: MiniMindChatModel, out: Path) -> dict:
    """All scores, on rank 0."""
    groups = {"core": [], "core_zh": []}
    if args.bundle:
        groups["core"] = read_bundle(Path(args.bundle), args.num_rows)
    groups["core_zh"] = [read_zh(word, args.num_rows, args.shots) for word in args.zh]
    tokenizer = chat_model.tokenizer
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(text: str) -> list[int]:
        return encode_text(tokenizer, text, begin)

    everything = [*groups["core"], *groups["core_zh"]]
    refuse_twins([task.label for task in everything])
    told = {task.label: digest(task) for task in everything}
    settings = {"model": weights.fingerprint(chat_model.path), "tasks": told}
    journal = Journal(out / "core.jsonl", settings)
    scorer = Scorer(chat_model.model)
    results = {"model": chat_model.name, "tasks": {}}
    left_out = {}
    for task in everything:
        cli.say(f"{task.label}: {len(task.rows):,} questions, {task.shots} examples each")
        left_out[task.label] = ask(task, scorer, encode, chat_model.window, journal)
    journal.close()
    if not cli.is_main():
        return {}
    for name, group in groups.items():
        centred = []
        for task in group:
            found = score(task, journal, left_out[task.label])
            results["tasks"][task.label] = found | {"of": name}
            centred.append(found["centred"])
        if centred:
            results[name] = sum(centred) / len(centred)
            results[f"{name}_tasks"] = len(centred)
    return results


def refuse_twins(labels: list[str]) -> None:
    """Answers are kept by the name of their task."""
    for label in labels:
        if labels.count(label) > 1:
            raise SystemExit(f"--bundle and --zh: {label} stands there twice")


def digest(task: InContext) -> str:
    told = json.dumps([task.kind, task.shots, task.delimiter, task.rows], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def table(results: dict) -> str:
    lines = [
        "| task | accuracy | baseline | centred | examples | questions |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["tasks"].items():
        cells = [name, f"{row['accuracy']:.1%}", f"{row['baseline']:.1%}", f"{row['centred']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {row['shots']} | {row['questions']:,} |")
    for name, title in (("core", "CORE"), ("core_zh", "CORE-zh")):
        if name in results:
            count = results[f"{name}_tasks"]
            whole = "" if name == "core_zh" or count == WHOLE else f" (not the {WHOLE} of CORE)"
            lines.append(f"| {title}: {count} tasks{whole} | | | {results[name]:.4f} | | |")
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--model_name_or_path",
        "--model",
        help="run, model or adapter folder; unset: the newest run",
    )
    add("--bundle", help="folder of DCLM's evaluation, with core.yaml")
    add("--zh", nargs="*", help="choices, NAME=FILE; without --bundle the built-in ones")
    add("--shots", type=int, default=5, help="examples before each question of --zh")
    add("--num_rows", type=int, help="at most so many questions of a task")
    add(
        "--output_dir",
        default=str(HERE.parent / "output" / HERE.name / "core"),
        help="for core.jsonl, core.json and core.md",
    )
    args = parser.parse_args(argv)
    if args.zh is None:
        args.zh = [] if args.bundle else BUILT_IN
    if args.num_rows is not None and args.num_rows < 2:
        raise cli.usage_error(f"--num_rows {args.num_rows}: 2 or more, a question and an example")
    if args.shots < 0:
        raise cli.usage_error(f"--shots {args.shots} makes no sense")
    if not args.zh and not args.bundle:
        raise cli.usage_error("--bundle or --zh: nothing is asked")
    return args


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    join_others()
    began = time.perf_counter()
    chat_model = MiniMindChatModel(args.model_name_or_path or newest())
    results = evaluate(args, chat_model, out)
    if not cli.is_main():
        return
    results["seconds"] = round(time.perf_counter() - began, 1)
    results["command"] = f"python {' '.join(sys.argv)}"
    keep_results(out, "core", results, table(results))
    cli.say(table(results))
    print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
