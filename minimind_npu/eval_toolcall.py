"""Measure how a trained model uses tools, or watch it use them.

    python minimind_npu/eval_toolcall.py                    # the newest run, built-in questions
    python minimind_npu/eval_toolcall.py --model output/minimind_npu/sft --data_path rows.jsonl
    python minimind_npu/eval_toolcall.py --mode interactive --tools my_tools.py

--mode auto asks for every answer of the rows ({"messages", "tools"}, and the other shapes that
training reads), after what stands before it in its row: whether a call comes where the row has one,
valid JSON, the right tool, its required arguments, the right arguments (or ones with which the tool
gives the same), no call where the row has none, and the right answer after a tool's result.
Whole conversations: rows with one question whose tools are all there are played from the question
on, with the model's own calls run. Result: a table (eval_toolcall.md too) and eval_toolcall.json;
every answer stands in answers.jsonl.

The tools are those of toolcall/tools.py (calculator, date, units, lookup). --tools FILE.py adds
yours: the file is run, and its `add_tools(registry)` called; see toolcall/registry.py. --tools
python adds one that runs code in toolcall/sandbox.py.
--mode interactive: questions from the terminal or a pipe; /clear forgets, /exit leaves.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)

import argparse
import json
import math
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from engine.generation import Engine, MiniMindChatModel, Sampling, newest
from evaluation.answers import same
from toolcall.calls import Call, parse_calls
from toolcall.own_tools import registry_of
from toolcall.play import Episode, play
from toolcall.registry import Registry, are_known, is_error

from common.data.files import atomic_file
from common.data.labels import encode_prompt
from common.data.load import load_rows, summary
from common.data.progress import Progress
from common.runs import report
from common.runs.generate import answer_text

BUILT_IN = HERE / "data" / "eval" / "toolcall.jsonl"
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TOO_LONG = "longer than the model's window"
FIGURES = {  # name -> what people read
    "detected": "call where one is needed",
    "valid_json": "valid JSON, of the calls made",
    "right_tool": "right tool",
    "complete": "required arguments there",
    "right_arguments": "right arguments",
    "no_call": "no call where none is needed",
    "after_result": "right answer after the result",
    "whole": "whole conversations right",
}


# ---- what is asked -------------------------------------------------------------------------------


@dataclass
class Case:
    """An answer of a row: what stands before it, and what it should be.

    calls: of the row, [] where it answers in words; after_result: tools have just answered.
    """

    source: str
    messages: list[dict]
    tools: list[dict]
    calls: list[Call]
    answer: str
    after_result: bool


def cases_of(row: dict, source: str) -> list[Case]:
    found = []
    for at, message in enumerate(row["messages"]):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        before = row["messages"][:at]
        calls = []
        for call in message.get("tool_calls", []):
            function = call["function"]
            calls.append(Call(function["name"], function["arguments"]))
        is_after = before[-1]["role"] == "tool"
        found.append(Case(source, before, row["tools"], calls, message["content"], is_after))
    return found


def read(paths: str, limit: int | None) -> list[tuple[dict, str]]:
    """[(row, "file:line")]; rows without tools are counted and left out. SystemExit where none is
    left."""
    rows, stats = load_rows(paths, "chat")
    cli.say(summary(stats))
    found = []
    without = []
    for text, source in zip(rows["row"], rows["source"], strict=True):
        row = json.loads(text)
        if row.get("tools"):
            found.append((row, source))
        else:
            without.append(source)
    if without:
        cli.say(f"  {len(without):,} left out: no tools in the row, e.g. {without[0]}")
    if not found:
        raise SystemExit(f"{paths}: no row has tools; data_prepare_toolcall.py reads other layouts")
    return found[:limit]


# ---- how an answer is judged ---------------------------------------------------------------------


def judged(case: Case, text: str, registry: Registry) -> dict[str, bool | list[bool]]:
    """Figure -> whether it holds for this answer (valid_json: for each call made); only the figures
    that the case is about."""
    made = parse_calls(text)
    found: dict = {"valid_json": [not call.problem for call in made]}
    if case.calls:
        pairs = matched(case.calls, made, registry)
        found["detected"] = bool(made)
        found["right_tool"] = names(made) == names(case.calls)
        fitting = [pair for pair in pairs if pair[1] is not None]
        all_there = len(fitting) == len(case.calls) == len(made)
        found["complete"] = all_there and all(is_complete(*pair, case.tools) for pair in fitting)
        found["right_arguments"] = all_there and all(
            is_right(wanted, given, registry) for wanted, given in fitting
        )
    elif case.after_result:
        found["after_result"] = not made and says(text, case.answer)
    else:
        found["no_call"] = not made
    return found


def names(calls: list[Call]) -> list[str]:
    return sorted(call.name for call in calls)


def matched(
    wanted: list[Call], made: list[Call], registry: Registry
) -> list[tuple[Call, Call | None]]:
    """Each wanted call with one of its name that was made, a right one if there is one; the order
    makes no difference."""
    left = [call for call in made if not call.problem]
    pairs: list[tuple[Call, Call | None]] = []
    for call in wanted:
        of_name = [one for one in left if one.name == call.name]
        right = [one for one in of_name if is_right(call, one, registry)]
        chosen = next(iter(right + of_name), None)
        if chosen is not None:
            left.remove(chosen)
        pairs.append((call, chosen))
    return pairs


def is_complete(wanted: Call, made: Call, tools: list[dict]) -> bool:
    """Whether all required arguments are there; where the tool does not say which, those of the
    row."""
    required = list(wanted.arguments)
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        if function.get("name") == wanted.name and isinstance(parameters, dict):
            required = parameters.get("required", required)
    return set(required) <= made.arguments.keys()


def is_right(wanted: Call, made: Call, registry: Registry) -> bool:
    """Equal arguments, or a tool of ours that gives the same for both: 3*4 and 4*3."""
    if plain(wanted.arguments) == plain(made.arguments):
        return True
    given = registry.answer(made)
    return not is_error(given) and registry.answer(wanted) == given


def plain(value):
    """A JSON value in a form in which spaces, widths and 3 or 3.0 make no difference."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).split())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return ("bool", value) if isinstance(value, bool) else value


def says(text: str, wanted: str) -> bool:
    """Whether an answer in words is the row's: equal but for spaces and widths, or the same number
    where the row's is one."""
    said = text.split("</think>")[-1]
    return plain(said) == plain(wanted.split("</think>")[-1]) or same(said, wanted)


# ---- auto ----------------------------------------------------------------------------------------


def generated(chat_model: MiniMindChatModel, cases: list[Case], args) -> list[str | None]:
    """Greedy answers in order; None where one could not be asked for, which is told."""
    engine = Engine(chat_model.model, args.batch_size)
    prompts = {}
    left_out: dict[str, list[str]] = {}
    for number, case in enumerate(cases):
        try:
            ids = encode_prompt(chat_model.tokenizer, case.messages, case.tools)
        except ValueError as error:  # the chat template refuses
            left_out.setdefault(str(error), []).append(case.source)
            continue
        if len(ids) + args.max_new_tokens > engine.max_length:
            left_out.setdefault(TOO_LONG, []).append(case.source)
            continue
        prompts[number] = ids
    for reason, sources in left_out.items():
        cli.say(f"  {len(sources):,} answers not asked for: {reason}, e.g. {sources[0]}")
    new: dict[int, list[int]] = {number: [] for number in prompts}
    order = list(prompts)
    with Progress("answer", unit="tokens") as progress:
        stream = engine.stream(list(prompts.values()), args.max_new_tokens, ends=chat_model.ends)
        for index, token in stream:
            new[order[index]].append(token)
            progress.update(1)
    texts: list[str | None] = [None] * len(cases)
    for number, ids in new.items():
        texts[number] = answer_text(chat_model.tokenizer, ids)
    return texts


def playable(row: dict, registry: Registry) -> bool:
    """One question, tools that are all there as the row describes them, an answer at the end."""
    asked = [message["role"] for message in row["messages"]].count("user")
    ends_in_words = not row["messages"][-1].get("tool_calls")
    return asked == 1 and ends_in_words and are_known(row["tools"], registry.schemas)


def played(
    chat_model: MiniMindChatModel, rows: list[dict], registry: Registry, args
) -> list[Episode]:
    """From the question of each row on."""
    conversations = []
    for row in rows:
        before = [message for message in row["messages"] if message["role"] in ("system", "user")]
        conversations.append({"messages": before, "tools": row["tools"]})
    engine = Engine(chat_model.model, args.batch_size)
    how = Sampling(args.max_new_tokens, ends=chat_model.ends)
    return play(engine, chat_model.tokenizer, conversations, registry, args.max_turns, how)


def share(right: Iterable[bool]) -> dict:
    """{"share", "standard_error", "of"}; share None of nothing."""
    right = list(right)
    count = len(right)
    if not count:
        return {"share": None, "standard_error": None, "of": 0}
    value = sum(right) / count
    return {"share": value, "standard_error": math.sqrt(value * (1 - value) / count), "of": count}


def evaluate(chat_model: MiniMindChatModel, registry: Registry, args, lines) -> dict:
    """All figures; lines: a file that gets a line for each answer."""
    rows = read(args.data_path, args.num_rows)
    began = time.perf_counter()
    cases = [case for row, source in rows for case in cases_of(row, source)]
    texts = generated(chat_model, cases, args)
    outcomes: dict[str, list[bool]] = {name: [] for name in FIGURES}
    for case, text in zip(cases, texts, strict=True):
        if text is None:
            continue
        found = judged(case, text, registry)
        for name, value in found.items():
            outcomes[name] += value if isinstance(value, list) else [value]
        wanted = [{"name": call.name, "arguments": call.arguments} for call in case.calls]
        line = {"source": case.source, "question": case.messages[-1]["content"], "answer": text}
        write(lines, line | {"expected": wanted or case.answer} | found)

    whole = [(row, source) for row, source in rows if playable(row, registry)]
    episodes = played(chat_model, [row for row, _ in whole], registry, args)
    refused: dict[str, list[str]] = {}
    for (row, source), episode in zip(whole, episodes, strict=True):
        if episode.problem:
            refused.setdefault(episode.problem, []).append(source)
            continue
        right = episode.finished == "stop" and says(episode.answer, row["messages"][-1]["content"])
        outcomes["whole"].append(right)
        write(lines, {"source": source, "played": episode.messages, "whole": right})
    for problem, sources in refused.items():
        cli.say(f"  {len(sources):,} conversations not played: {problem}, e.g. {sources[0]}")
    figures = {name: share(values) for name, values in outcomes.items()}
    return {
        "figures": figures,
        "rows": len(rows),
        "answers": len(cases),
        "not_asked": texts.count(None),
        "not_played": len(rows) - len(whole) + sum(map(len, refused.values())),
        "seconds": time.perf_counter() - began,
    }


def write(lines, facts: dict) -> None:
    lines.write(json.dumps(facts, ensure_ascii=False) + "\n")


def table(found: dict) -> str:
    lines = ["| tools | share | of |", "|---|---:|---:|"]
    for name, said in FIGURES.items():
        figure = found["figures"][name]
        shown = "-"
        if figure["of"]:
            shown = f"{figure['share']:.1%} ± {figure['standard_error']:.1%}"
        lines.append(f"| {said} | {shown} | {figure['of']:,} |")
    if found["not_asked"]:
        lines.append(f"\n{found['not_asked']:,} answers could not be asked for")
    if found["not_played"]:
        lines.append(
            f"\n{found['not_played']:,} rows not played: several questions, tools that are not "
            "here (--tools), or turns that the chat template refuses"
        )
    return "\n".join(lines)


def auto(chat_model: MiniMindChatModel, registry: Registry, args) -> None:
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "answers.jsonl", "w", encoding="utf-8") as lines:
        found = evaluate(chat_model, registry, args, lines)
    facts = {
        "model": chat_model.name,
        "device": device.name(),
        "dtype": str(chat_model.model.dtype).removeprefix("torch."),
        "recipe": HERE.name,
        "versions": report.versions(),
        "command": f"python {' '.join(sys.argv)}",
    }
    texts = {
        "eval_toolcall.json": json.dumps(facts | found, indent=1, ensure_ascii=False),
        "eval_toolcall.md": table(found) + "\n",
    }
    for name, text in texts.items():
        with atomic_file(out / name) as part:
            part.write_text(text, encoding="utf-8")
    cli.say(f"{table(found)}\n{found['seconds']:,.1f} s -> {out / 'eval_toolcall.json'}")


# ---- interactive ---------------------------------------------------------------------------------


def on_terminal() -> bool:
    return sys.stdin.isatty()


def typed_lines() -> Iterable[str]:
    if not on_terminal():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


def interactive(chat_model: MiniMindChatModel, registry: Registry, args) -> None:
    engine = Engine(chat_model.model, slots=1)
    how = Sampling(args.max_new_tokens, ends=chat_model.ends)
    print(
        f"{chat_model.name} on {device.name()}   tools: {', '.join(registry.tools)}   /clear /exit"
    )
    messages: list[dict] = []
    for line in typed_lines():
        line = line.strip()
        if line and not on_terminal():
            print(f"> {line}")
        if line == "/exit":
            return
        if line == "/clear":
            messages = []
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            talk = {"messages": asked, "tools": registry.schemas}
            (episode,) = play(engine, chat_model.tokenizer, [talk], registry, args.max_turns, how)
            show(episode, len(asked))
            if episode.finished == "stop":
                messages = episode.messages


def show(episode: Episode, start: int) -> None:
    for message in episode.messages[start:]:
        if message["content"]:
            print(f"  = {message['content']}" if message["role"] == "tool" else message["content"])
        for call in message.get("tool_calls", []):
            function = call["function"]
            print(f"  {function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}")
    endings = {
        "length": "(cut off: --max_new_tokens)",
        "turns": "(still calls tools: --max_turns)",
        "window": "(no room left in the window: /clear)",
    }
    if episode.problem:
        print(f"(stopped: {episode.problem})")
    if episode.finished in endings:
        print(endings[episode.finished])


# ---- command line --------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    which = "run, model or adapter folder; unset: the newest run"
    add("--model_name_or_path", "--model", help=which)
    add("--mode", choices=("auto", "interactive"), default="auto")
    add("--data_path", default=str(BUILT_IN), help="files or folders of rows with tools")
    own = "Python files of yours that add tools, def add_tools(registry); python: code in a sandbox"
    add("--tools", nargs="+", default=[], help=own)
    add("--max_turns", type=int, default=4, help="answers to one question, calls among them")
    add("--max_new_tokens", type=int, default=256, help="length limit of one answer")
    add("--batch_size", type=int, default=8, help="answers generated at once")
    add("--num_rows", type=int, help="at most so many rows")
    dtypes = "auto: half on accelerators, float32 on a CPU"
    add("--dtype", choices=DTYPES, default="auto", help=dtypes)
    output = str(HERE.parent / "output" / HERE.name / "eval_toolcall")
    add("--output_dir", default=output, help="for eval_toolcall.json")
    args = parser.parse_args(argv)
    for name in ("max_turns", "max_new_tokens", "batch_size", "num_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise cli.usage_error(f"--{name} {value} makes no sense")
    return args


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    registry = registry_of(args.tools)
    chat_model = MiniMindChatModel(args.model_name_or_path or newest())
    if not chat_model.chats:
        raise SystemExit(f"{chat_model.name}: this model does not chat; train sft after pretrain")
    if DTYPES[args.dtype] is not None:
        chat_model.model.to(DTYPES[args.dtype])
    how = {"auto": auto, "interactive": interactive}[args.mode]
    how(chat_model, registry, args)


if __name__ == "__main__":
    cli.run(main)
