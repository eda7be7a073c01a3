"""The preference pairs of baichuan2_dpo/: what their script writes, how they read, and what does not give them away."""

import importlib.util
import json
from collections import Counter
from functools import cache

import pytest
from conftest import ROOT

from common.data import shapes
from common.data.load import load_rows

RECIPE = ROOT / "baichuan2_dpo"


@cache
def make_data():
    spec = importlib.util.spec_from_file_location("make_preference_data", RECIPE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def sample():
    rows, stats = load_rows(str(RECIPE / "data"), "preference")
    return [json.loads(row) for row in rows["row"]], stats


def text(row: dict, name: str) -> str:
    (answer,) = row[name]
    return answer["content"]


def test_the_script_writes_these_files(tmp_path):
    make_data().main(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in (RECIPE / "data").iterdir()}
    assert sum(map(len, written.values())) < 250 * 1024


def test_every_reader_of_pairs_has_its_file_and_no_row_is_lost():
    rows, stats = sample()
    assert 700 <= len(rows) == stats["used"] == stats["read"] <= 900 and not stats["dropped"]
    expected = [
        "hh strings",
        "hh_rlhf_cn",
        "implicit prompt",
        "llama-factory pairs",
        "prompt pairs",
        "prompt pairs",
    ]
    assert sorted(stats["shapes"].values()) == [*expected, "reward"]
    assert "gb18030" in stats["encodings"].values()
    roles = Counter(tuple(message["role"] for message in row["prompt"]) for row in rows)
    assert roles.keys() == {("user",), ("system", "user"), ("user", "assistant", "user")}


def test_files_say_what_the_script_meant():
    """Each shape, read back, is the pair it was made from."""
    made = {}
    for task in make_data().TASKS:
        for row in make_data().pairs(task):
            made[json.dumps(row["prompt"], ensure_ascii=False)] = (row["chosen"], row["rejected"])
    read = {
        json.dumps(r["prompt"], ensure_ascii=False): (text(r, "chosen"), text(r, "rejected"))
        for r in sample()[0]
    }
    assert read == made


def test_no_question_is_judged_twice_and_no_answer_both_ways():
    rows, _ = sample()
    assert len({shapes.prompt_of(row) for row in rows}) == len(rows)
    liked = {text(row, "chosen") for row in rows}
    assert liked.isdisjoint(text(row, "rejected") for row in rows)


def share(better: Counter) -> float:
    """How often a rule is right: 1 counts as right, -1 as wrong, 0 as a coin."""
    return (better[1] + better[0] / 2) / better.total()


def test_neither_length_nor_one_character_tells_the_better_answer():
    pairs = [(text(row, "chosen"), text(row, "rejected")) for row in sample()[0]]
    longer = share(Counter((len(a) > len(b)) - (len(a) < len(b)) for a, b in pairs))
    assert 0.3 < longer < 0.7
    for character in set("".join(a + b for a, b in pairs)):
        assert 0.3 < share(Counter((character in a) - (character in b) for a, b in pairs)) < 0.7, (
            character
        )


def test_each_kind_of_worse_answer_is_there():
    rows = [row for task in make_data().TASKS for row in make_data().pairs(task)]
    facts = {question.right for task in make_data().TASKS for question in task()}
    wrong = [row for row in rows if not any(fact in row["rejected"] for fact in facts)]
    padded = [row for row in rows if len(row["rejected"]) > len(row["chosen"]) + 8]
    assert min(len(wrong), len(padded), len(rows) - len(wrong) - len(padded)) > len(rows) // 8
    assert all(any(fact in row["chosen"] for fact in facts) for row in rows)


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_answers_are_short(name):
    assert max(len(text(row, name)) for row in sample()[0]) <= (25 if name == "chosen" else 60)
