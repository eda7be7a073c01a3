"""minimind_npu reads answers and choices as a person does: forms of numbers, tags, keys, tables without a header."""

import json
import sys
from fractions import Fraction

import pytest
from harness import ROOT, own_modules
from transformers import AutoTokenizer

RECIPE = ROOT / "minimind_npu"
answers, questions, evaluation = own_modules(
    RECIPE.name, "evaluation.answers", "evaluation.questions", "evaluation.eval"
)

FORMS = {  # what a model writes: the last number that a person reads in it
    # thousands
    "1,234,567": 1234567, r"1{,}000": 1000, r"12\,345": 12345, r"1,\!000": 1000, "1\u202f234": 1234, "1’000": 1000,
    "12 000": 12000, "１，２００": 1200, "100,2000": 2000, "2, 500": 500,
    # signs, money, dashes
    "-$7": -7, "$-7": -7, r"-\$7": -7, "-¥1,200": -1200, "HK$9.50": Fraction(19, 2), "−7": -7, "–7": -7, "－７": -7,
    "得-7": -7, "差是：- 7": -7, "负7": -7, "零下7度": -7, "(-7)": -7, "3–7": 7, "10-7": 7, "GPT-7": 7, "——7": 7,
    "$7$": 7, "$10-$7": 7,
    # decimals and fractions
    ".5": Fraction(1, 2), "-.5": Fraction(-1, 2), "是.25。": Fraction(1, 4), "No.7": 7, "...7": 7, "7.": 7, "7.0": 7,
    "½": Fraction(1, 2), "1½": Fraction(3, 2), "-¾": Fraction(-3, 4), "2 1/4": Fraction(9, 4), "6/8": Fraction(3, 4),
    r"\frac{3}{4}": Fraction(3, 4), r"-\frac{1}{2}": Fraction(-1, 2), r"2\frac{1}{2}": Fraction(5, 2),
    r"\dfrac12": Fraction(1, 2), "7/0": 0,
    # units, marks, powers
    "7 m²": 7, "7㎡": 7, "7 cm^3": 7, r"7\text{ m}^2": 7, r"7\,\mathrm{km}^{2}": 7, "7 m2": 7, "H₂O 7": 7, "7①": 7,
    "①7个": 7, "⑦": 7, "10³": 1000, "1.2×10^3": 1200, r"1.2\times 10^{3}": 1200, "1.5e3": 1500, "7千米": 7,
    "7%": Fraction(7, 100), "百分之七": Fraction(7, 100), "1.5万元": 15000, "1亿2000万": 120000000, "7 million": 7 * 10**6,
    # other digits
    "１２": 12, "𝟏𝟐": 12, "十二个": 12, "两百五": 250, "三万零七": 30007, "二〇二四": 2024, "三点五": Fraction(7, 2),
    "三分之二": Fraction(2, 3), "负三": -3,
}  # fmt: skip


def test_numbers_are_read_as_a_person_reads_them():
    assert len(FORMS) >= 60
    wrong = {form: answers.numbers(form) for form, value in FORMS.items()}
    wrong = {form: found for form, found in wrong.items() if found[-1:] != [FORMS[form]]}
    assert not wrong
    assert answers.numbers("2.5, 1,000,000和-3/4，第10.") == [
        Fraction(5, 2),
        1000000,
        Fraction(-3, 4),
        10,
    ]


NONE = ["", "没有数", "一共不知道", "——", "$", "-", ".", "\\frac{}{}", "平方米²"]


@pytest.mark.parametrize("words", NONE)
def test_what_is_no_number_is_read_as_none(words):
    assert answers.numbers(words) == []


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("先算5加2等于7。\n#### 7", "7", True), ("一共是 1,234.", "1234", True), ("The answer is 18.", "18", True),
        ("一共13个，不是12", "13", False), ("50%", "50%", True), ("星期一。", "星期一", True), ("是星期一", "星期一", False),
        # tags, marks, boxes, thoughts
        ("<think>\n是 3\n</think>\n<answer>\n5。\n</answer>", "5", True), ("<answer>5", "5", True),
        ("<think>5</think>6", "5", False), ("<think>是 5", "5", False), ("<answer>5</answer>\n<answer>", "5", True),
        ("<answer>5</answer><answer>7", "5", True), ("5 <answer>", "5", True), ("2+3=5 <answer></answer>", "5", False),
        ("<Answer>5</Answer>", "5", True), ("#### 7\n因为3加4", "7", True), ("#### 18 ####", "18", True),
        ("18 ####", "18", True), ("#### 解答\n3加4得7", "7", True), (r"\boxed{18}，共 3 步", "18", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True), (r"\boxed{5", "5", True),
        # what stands around the wanted number
        ("12", "12 cm²", True), ("12 m", "12 apples", True), ("x = 5", "5", True), ("5", "x=5", True), ("$18", "18 元", True),
        ("3", "3x", False), ("3", "3π", False), ("5:30", "5:30", True), ("5:31", "5:30", False), ("3/4/2024", "3/4/2024", True),
        ("12", "十二", True), ("十二", "12", True), ("三角形", "三角形", True), ("3", "三角形", False),
        # a unit of number that one of both leaves out
        ("50", "50%", True), ("0.5", "50%", True), ("0.5%", "50%", False), ("5万", "5", True), ("50000", "5万", True),
        ("5亿", "5万", False), ("", "0", False),
    ],
)  # fmt: skip
def test_exact_answers(given, wanted, right):
    assert answers.same(given, wanted) is right


def test_reading_never_fails_and_long_numbers_are_exact():
    long = "7" * 20000
    assert answers.same(f"是 {long}", long) and not answers.same(long, long[:-1] + "8")
    assert not answers.same("九" * 9000, "7") and not answers.same("1e999", "7")
    odd = ["9^99", "9" * 5000 + "^99", "1/" + "9" * 9000, "0^-1", "½" * 50, "①" * 50, "\\boxed{" * 500, "<answer>" * 500,
           "\\frac" * 300, "万亿" * 500, "-$" * 500, "\ud800 5", "1,000" * 400, "٣٤", "५", "Ⅻ", "１／０"]  # fmt: skip
    for words in odd:
        assert answers.same(words, "123457") is False
        assert answers.same("123457", words) is False


def test_a_file_of_exact_answers_may_hold_numbers():
    row = {"question": "q", "answer": "x\n#### 1,018"}
    assert questions.exact(row, "s", "f:1").final == "1,018" and questions.same("1018.0", "1,018")
    assert questions.exact({"question": "q", "answer": 7}, "s", "f:1").final == "7"


# ---- choices --------------------------------------------------------------------------------------------------------


def chosen(folder, name, text):
    """(options, the right one) of each question of a file with this text; what was left out."""
    (folder / name).write_text(text, encoding="utf-8")
    found = questions.read([folder / name], questions.Choice)
    return [(q.options, q.options[q.right]) for q in found.questions], found.dropped


FOUR = ["3", "4", "7", "6"]
ROWS = [  # a row without its question, and the right choice or why it is left out
    ({"choices": {"text": ["蚂蚁", "鲸", "牛"], "label": [1, 2, 3]}, "answerKey": 2}, "鲸"),
    ({"choices": {"text": ["蚂蚁", "鲸", "牛"], "label": ["1", "2", "3"]}, "answerKey": 1}, "蚂蚁"),
    ({"choices": {"text": [1, 2, 3], "label": ["A", "B", "C"]}, "answerKey": "B"}, "2"),
    ({"choices": [{"text": "牛", "label": "A"}, {"text": "羊", "label": "B"}], "answerKey": "B"}, "羊"),
    ({"choices": [3, 4, 7, 6], "answer": 1}, "4"),
    ({"choices": [True, False], "answer": 0}, "true"),
    ({"choices": FOUR, "answer": "2"}, "7"),
    ({"choices": FOUR, "answer": 2.0}, "7"),
    ({"choices": FOUR, "answer": "6"}, "6"),
    ({"choices": FOUR, "answer": "Ｃ"}, "7"),
    ({"choices": FOUR, "answer": "（Ｃ）"}, "7"),
    ({"choices": FOUR, "answer": "C."}, "7"),
    ({"choices": FOUR, "answer": "C: 7"}, "7"),
    ({"choices": FOUR, "answer": "C: 4"}, "the answer may be several of the choices; give its letter"),
    ({"choices": FOUR, "answer": "3"}, "the answer may be several of the choices; give its letter"),
    ({"choices": FOUR, "answer": "A,C"}, "several answers"),
    ({"choices": FOUR, "answer": 9}, "the answer is none of the choices"),
    ({"choices": FOUR, "answer": None}, "no answer given"),
    ({"options": FOUR, "answer": "C", "answer_index": 2}, "7"),
    ({"options": FOUR, "answer": "C", "answer_index": 1}, "its answers differ"),
    ({"options": {"A": "肝", "B": "肺"}, "answer": "肺", "answer_idx": "B"}, "肺"),
    ({"options": ["A. 肝", "B. 肺"], "answer": "B"}, "肺"),
    ({"choices": FOUR, "answerKey": "C", "answer": "因为三加四得七"}, "7"),
    ({"choices": ["None", "NA"], "answer": "A"}, "None"),
    ({"choices": ["a", "\ud800"], "answer": "A"}, "broken characters"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "right"), ROWS)
def test_keys_and_options_of_any_kind(row, right):
    try:
        found = questions.choice({"question": "哪个？"} | row, "s", "f:1")
    except questions.BadRow as bad:
        assert bad.reason == right
    else:
        assert found.options[found.right] == right


def test_tables_without_a_header_are_read(tmp_path):
    mmlu = '一加二？,3,4,5,6,A\n"哪个，最大？",1,1,9,3,Ｃ\n缺一个,1,2\n不知道,1,2,3,4,x\n'
    found, dropped = chosen(tmp_path, "sums_test.csv", mmlu)
    assert found == [(["3", "4", "5", "6"], "3"), (["1", "1", "9", "3"], "9")]
    assert dropped == {"wrong number of cells": 1, "the answer is none of the choices": 1}
    ceval = "0,一加二？,3,4,5,6,A\n1,二加二？,3,4,5,6,B\n"
    assert chosen(tmp_path, "a.csv", ceval)[0] == [(FOUR_SUMS, "3"), (FOUR_SUMS, "4")]
    headed = "id,question,Ａ,Ｂ,Ｃ,Ｄ,answer\n0,一加二？,3,4,None,null,C\n"
    assert chosen(tmp_path, "b.csv", headed)[0] == [(["3", "4", "None", "null"], "None")]
    found = questions.read([tmp_path / "sums_test.csv"], questions.Choice)
    assert found.examples["wrong number of cells"].startswith(f"{tmp_path / 'sums_test.csv'}:3: ")
    assert found.questions[0].subject == "sums"


FOUR_SUMS = ["3", "4", "5", "6"]


# ---- results as they come -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["model", "reader"])
def test_what_was_answered_stays_when_something_breaks(broken, tmp_path, monkeypatch):
    rows = [{"question": f"{i}", "answer": f"{i}"} for i in range(3)]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    class Engine:
        def __init__(self, *_):
            pass

        def stream(self, prompts, *_, **__):
            for index in (1, 0, 2):
                if index == 2 and broken == "model":
                    raise MemoryError
                said = tokenizer(str(index), add_special_tokens=False)["input_ids"]
                yield from ((index, token) for token in [*said, tokenizer.eos_token_id])

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "minimind_npu/tokenizer")
    monkeypatch.setattr(evaluation, "Engine", Engine)
    if broken == "reader":
        monkeypatch.setattr(questions, "same", lambda said, final: [True][int(final)])
    args = evaluation.parse_args(["--exact", str(path)])
    asker = evaluation.Asker(tokenizer, False, 999)
    ask = lambda: evaluation.exact_match(
        None, asker, args, frozenset([tokenizer.eos_token_id]), tmp_path / "answers.jsonl"
    )
    if broken == "model":
        with pytest.raises(MemoryError):
            ask()
    else:
        assert ask()["accuracy"] == pytest.approx(1 / 3)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == ["1", "0", "2"][: 2 if broken == "model" else 3]
    assert [line["right"] for line in lines] == (
        [True, True] if broken == "model" else [False, True, False]
    )


def test_a_part_that_fails_leaves_the_parts_before_it(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("{}")

    def own(chat_model, args, out):
        yield "held_out", {"loss": 1.0}
        questions.read([tmp_path / "empty.jsonl"], questions.Exact)

    monkeypatch.setattr(evaluation, "own", own)
    monkeypatch.setattr(evaluation, "held_out_table", lambda found: [f"loss {found['loss']}"])
    monkeypatch.setattr(evaluation, "MiniMindChatModel", lambda _: Loaded())
    monkeypatch.setattr(
        sys, "argv", ["eval.py", "--model", "x", "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match="no usable question"):
        evaluation.main()
    kept = json.loads((tmp_path / "out/eval.json").read_text(encoding="utf-8"))
    assert kept["held_out"] == {"loss": 1.0} and kept["model"] == "loaded"
    assert (tmp_path / "out/eval.md").read_text(encoding="utf-8") == "loss 1.0\n"


class Loaded:
    name = "loaded"
    model = type("Model", (), {"dtype": "torch.float32", "num_parameters": lambda self: 1})()
