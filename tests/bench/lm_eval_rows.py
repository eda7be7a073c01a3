"""minimind_npu: the same rows asked by lm-evaluation-harness and by the recipe's own evaluation, choice by choice.

    pip install lm-eval==0.4.13
    python tests/bench/lm_eval_rows.py --model output/minimind_npu/pretrain
    python tests/bench/lm_eval_rows.py --model output/road/sft --num_rows 200

Three ways to ask the choices of a file (data/eval/choice.jsonl), as tasks of the harness and as ours: by the letter and
by the text (eval.py), in context as CORE asks (core.py). A choice's log-likelihood has to be ours, but for what all
choices of a question have in common (the newline before them, which the harness counts with the choice; their first
words, which CORE does not count). One JSON line each; exit 1 where one differs by more than --tolerance.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "minimind_npu"
sys.path[:0] = [str(ROOT), str(RECIPE)]
from common import cli, device  # noqa: I001  (device before torch and transformers)

from engine.generation import MiniMindChatModel, newest
from evaluation import core, eval as evaluation, in_context, questions
from evaluation.questions import Choice

LETTERS = questions.LETTERS


def rows_of(found: list[Choice], way: str) -> list[dict]:
    """{"prompt", "choices", "gold"} of each question; a prompt does not end in white space."""
    rows = []
    for one in found:
        if way == "letter":
            prompt, choices = evaluation.listed(one), list(LETTERS[: len(one.options)])
        elif way == "text":
            prompt, choices = one.question, [f"\n{option}" for option in one.options]
        else:
            prompt, choices = one.question + in_context.DELIMITER_ZH, one.options
        rows.append({"prompt": prompt, "choices": choices, "gold": one.right})
    return rows


def asked_by_harness(
    chat_model, args, found: list[Choice], way: str, folder: Path
) -> tuple[float, list]:
    """-> (accuracy, log-likelihoods [question][choice])."""
    file = folder / f"{way}.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(found, way)]
    file.write_text("\n".join(lines), encoding="utf-8")
    task = {
        "task": f"danpu_{way}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    results = evaluation.asked_by_harness(chat_model, args, [task], log_samples=True)
    samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    sums = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return results["results"][task["task"]]["acc,none"], sums


def asked_by_us(chat_model, found: list[Choice], way: str) -> list[list[float]]:
    """Log-likelihoods [question][choice]; of letters their logits."""
    scorer = evaluation.Scorer(chat_model.model)
    asker = evaluation.Asker(chat_model.tokenizer, False, chat_model.window)
    if way == "letter":
        ids = [asker.ids(letter)[0] for letter in LETTERS]
        prompts = [asker.prompt([], evaluation.listed(one), room=1) for one in found]
        logits = scorer.next_logits(prompts, ids)
        return [row[: len(one.options)].tolist() for one, row in zip(found, logits, strict=True)]
    rows = []
    if way == "text":
        for one in found:
            start = asker.prompt([], evaluation.as_text(one, asker), room=1)
            rows += [(start + asker.ids(option), len(start)) for option in one.options]
    else:
        listed = [
            {"query": one.question, "choices": one.options, "gold": one.right} for one in found
        ]
        task = in_context.InContext(
            "danpu", "multiple_choice", listed, 0, in_context.DELIMITER_ZH, 0.0
        )
        begin = [chat_model.tokenizer.bos_token_id]
        for number in range(len(listed)):
            rows += in_context.rows_to_score(
                task,
                number,
                lambda text: core.encode_text(chat_model.tokenizer, text, begin),
                chat_model.window,
            )
    sums = iter([values.sum().item() for values in scorer.log_probs(rows)])
    return [[next(sums) for _ in one.options] for one in found]


def compared(harness: list[list[float]], ours: list[list[float]]) -> tuple[float, int]:
    """-> (largest difference of a choice, what all choices of its question share taken off; questions whose likeliest
    choice differs)."""
    largest = 0.0
    others = 0
    for theirs, mine in zip(harness, ours, strict=True):
        gaps = [a - b for a, b in zip(theirs, mine, strict=True)]
        middle = sum(gaps) / len(gaps)
        largest = max(largest, *(abs(gap - middle) for gap in gaps))
        others += theirs.index(max(theirs)) != mine.index(max(mine))
    return largest, others


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="run or model folder of the recipe; unset: the newest run")
    add("--choice", default=str(RECIPE / "data/eval/choice.jsonl"))
    add("--num_rows", type=int, default=60)
    add("--tolerance", type=float, default=1e-3, help="of a log-likelihood in float32")
    args = parser.parse_args()
    args.shots = 0
    args.batch_size = 8
    cli.quiet_libraries()
    device.training_defaults(set())
    chat_model = MiniMindChatModel(args.model or newest())
    found = questions.read([args.choice], Choice, args.num_rows).questions
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ("letter", "text", "in context"):
            accuracy, theirs = asked_by_harness(
                chat_model, args, found, way.replace(" ", "_"), Path(folder)
            )
            mine = asked_by_us(chat_model, found, way)
            largest, others = compared(theirs, mine)
            right = sum(
                row.index(max(row)) == one.right for row, one in zip(mine, found, strict=True)
            )
            line = {
                "asked by": way,
                "questions": len(found),
                "choices": sum(map(len, mine)),
                "harness": accuracy,
            }
            line |= {
                "ours": right / len(found),
                "largest_difference": largest,
                "other_choices": others,
            }
            print(json.dumps(line), flush=True)
            if largest > args.tolerance or others:
                broken.append(way)
    if broken:
        sys.exit(f"the harness and we differ by {', '.join(broken)}")


if __name__ == "__main__":
    main()
