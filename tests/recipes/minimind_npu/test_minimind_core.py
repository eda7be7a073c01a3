"""minimind_npu's evaluations of the road: CORE on bundles of DCLM's layout, chat_eval.py and its tasks, answers that stay."""

import json
from itertools import combinations

import pytest
import torch
from harness import ROOT, expect, finish, own_modules, start
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

RECIPE = ROOT / "minimind_npu"
NAMES = "model evaluation.core evaluation.in_context evaluation.chat_eval evaluation.tasks evaluation.journal evaluation.eval"
models, core, in_context, chat_eval, tasks, journals, evaluation = own_modules(
    RECIPE.name, *NAMES.split()
)
MC = [
    {"query": f"问题{i}：{i}加一是几？", "choices": [f"是{i + k}。" for k in (1, 3, 5)], "gold": 0} for i in range(6)
]  # fmt: skip
SCHEMA = [
    {"context_options": ["小明给了小红", "小红给了小明"], "continuation": f"{i}本书。", "gold": i % 2} for i in range(5)
]  # fmt: skip
LM = [{"context": f"天空是{c} ", "continuation": f"{c}色的。"} for c in "蓝红绿白"]
TASKS = {  # label: (kind, rows, examples, delimiter, baseline in per cent)
    "quiz": ("multiple_choice", MC, 2, "\n答：", 25),
    "who": ("schema", SCHEMA, 0, " ", 50),
    "words": ("language_modeling", LM, 1, "", 0),
}


@pytest.fixture(scope="module", autouse=True)
def this_copy():
    AutoConfig.register("minimind", models.MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(models.MiniMindConfig, models.MiniMindForCausalLM, exist_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the shipped tokenizer."""
    out = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(1)
    model = models.build("tiny", len(tokenizer), hidden_size=64, num_hidden_layers=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def bundle(out, changes=None):
    data = out / "eval_data" / "deep"
    data.mkdir(parents=True)
    lines = ["icl_tasks:"]
    table = ["Eval Task,Task Category,Random baseline"]
    for label, (kind, rows, shots, delimiter, baseline) in TASKS.items():
        lines += [
            f"- label: {label}",
            f"  dataset_uri: deep/{label}.jsonl",
            f"  num_fewshot: [{shots}]",
        ]
        lines += [f"  icl_task_type: {kind}", f"  continuation_delimiter: {json.dumps(delimiter)}"]
        table.append(f"{label},x,{baseline}")
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (data / f"{label}.jsonl").write_text(text + "\n", encoding="utf-8")
    (out / "core.yaml").write_text("\n".join(lines), encoding="utf-8")
    (out / "eval_meta_data.csv").write_text("\n".join(table), encoding="utf-8")
    return out


# ---- tasks in context -----------------------------------------------------------------------------------------


def run_core(folder, out, *flags):
    out.mkdir(exist_ok=True)
    args = core.parse_args(["--model", str(folder), "--output_dir", str(out), *map(str, flags)])
    return core.evaluate(args, core.MiniMindChatModel(str(folder)), out)


def reference(folder, task):
    """One question at a time, without packing, by the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right = []
    for number, row in enumerate(task.rows):
        texts = [
            [tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False).input_ids]
            for t in in_context.prompts_of(task, number)
        ]
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in texts]
        if task.kind == "language_modeling":
            start = len(texts[0])
            assert texts[1][:start] == texts[0]
            right.append(logits[1][start - 1 : -1].argmax(-1).tolist() == texts[1][start:])
            continue
        means = []
        for ids, scores in zip(texts, logits, strict=True):
            if task.kind == "schema":
                start = len(ids) - next(
                    i
                    for i in range(len(ids))
                    if len({tuple(t[len(t) - 1 - i :]) for t in texts}) > 1
                )
            else:
                start = next(i for i in range(len(ids)) if len({t[i] for t in texts}) > 1)
            means.append(
                sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids)))
                / (len(ids) - start)
            )
        right.append(means.index(max(means)) == row["gold"])
    return sum(right) / len(right)


def test_scores_are_those_of_one_question_at_a_time(folder, tmp_path):
    found = run_core(folder, tmp_path / "out", "--bundle", bundle(tmp_path / "bundle"))
    centred = []
    for task in in_context.read_bundle(tmp_path / "bundle", None):
        accuracy = reference(folder, task)
        baseline = TASKS[task.label][4] / 100
        row = found["tasks"][task.label]
        assert row["accuracy"] == pytest.approx(accuracy) and row["questions"] == len(task.rows)
        assert row["centred"] == pytest.approx((accuracy - baseline) / (1 - baseline))
        centred.append(row["centred"])
    assert found["core"] == pytest.approx(sum(centred) / 3) and found["core_tasks"] == 3
    assert "3 tasks (not the 22 of CORE)" in core.table(found)


def test_a_task_that_would_share_its_answers_with_another_is_refused(folder, tmp_path):
    rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in MC)
    made = bundle(tmp_path / "bundle")
    (made / "core.yaml").write_text((made / "core.yaml").read_text().replace("quiz", "arc_easy"))
    (made / "eval_data/deep/arc_easy.jsonl").write_text(rows)
    table = (made / "eval_meta_data.csv").read_text().replace("quiz", "arc_easy")
    (made / "eval_meta_data.csv").write_text(table)
    zh = f"arc_easy={RECIPE / 'data/eval/choice.jsonl'}"
    with pytest.raises(SystemExit, match="arc_easy stands there twice"):
        run_core(folder, tmp_path / "out", "--bundle", made, "--zh", zh)


def test_prompts_and_examples():
    task = in_context.InContext("quiz", "multiple_choice", MC, 2, "\n答：", 0.25)
    shown = in_context.examples_for(task, 3)
    assert MC[3] not in shown and len(shown) == 2 and shown == in_context.examples_for(task, 3)
    first, second, _ = in_context.prompts_of(task, 3)
    assert (
        first
        == "".join(f"{r['query']}\n答：{r['choices'][0]}\n\n" for r in shown)
        + f"{MC[3]['query']}\n答：是4。"
    )
    assert (
        second.endswith("是6。")
        and len({len(in_context.examples_for(task, i)) for i in range(6)}) == 1
    )
    words = in_context.InContext("words", "language_modeling", LM, 0, " ", 0.0)
    assert in_context.prompts_of(words, 1) == ["天空是红", "天空是红 红色的。"]


def test_long_examples_are_cut_at_their_beginning_and_what_does_not_fit_is_counted():
    encode = list  # a character is a token
    task = in_context.InContext("quiz", "multiple_choice", MC, 4, "：", 0.25)
    whole = in_context.rows_to_score(task, 0, encode, 10_000)
    cut = in_context.rows_to_score(task, 0, encode, 20)
    for (ids, first), (part, later) in zip(whole, cut, strict=True):
        assert part == ids[-20:] and ids[first:] == part[later:]
    assert [ids[first:] for ids, first in whole] == [list(f"{n}。") for n in (1, 3, 5)]
    assert in_context.rows_to_score(task, 0, encode, 2) is None


@pytest.mark.parametrize("file, text, words", [
    ("core.yaml", "tasks: []", "no icl_tasks"), ("core.yaml", "icl_tasks: [{label: a}]", "without 'icl_task_type'"),
    ("core.yaml", "icl_tasks: [{label: a, icl_task_type: b, dataset_uri: c, num_fewshot: [0]}]", "a: b: multiple_choice"),
    ("eval_meta_data.csv", "Eval Task,Random baseline\nquiz,", "eval_meta_data.csv:2"),
    ("eval_meta_data.csv", "Eval Task,Random baseline\nother,1", "no line for quiz"),
    ("eval_data/deep/quiz.jsonl", "{", "quiz.jsonl:1: no JSON"), ("eval_data/deep/quiz.jsonl", '{"query": ""}', "without choices, gold"),
    ("eval_data/deep/quiz.jsonl", '{"query": "", "choices": ["a"], "gold": 1}', "none of the options"),
    ("eval_data/deep/quiz.jsonl", "\n", "empty"),
])  # fmt: skip
def test_a_bundle_that_is_none_is_one_line(tmp_path, file, text, words):
    made = bundle(tmp_path / "b")
    (made / file).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=words) as stop:
        in_context.read_bundle(made, None)
    assert "\n" not in str(stop.value)


# ---- tasks ----------------------------------------------------------------------------------------------------

FUNCTION = {"task_id": "t/0", "prompt": "def add(a, b):\n", "entry_point": "add",
            "test": "def check(f):\n    assert f(2, 3) == 5\n"}  # fmt: skip


def test_both_layouts_of_c3_are_read(tmp_path):
    rows = [
        {"question": "谁来了？", "choice": ["小红", "小明"], "answer": "小明"},
        {"question": "?", "choice": ["x", "y"], "answer": "z"},
    ]
    (tmp_path / "dev.json").write_text(
        json.dumps([[["男：小明来了。", "女：好。"], rows, "1"]]), encoding="utf-8"
    )
    lines = [
        json.dumps({"context": ["男：小明来了。", "女：好。"], **rows[0]}),
        json.dumps({"context": 3, **rows[0]}),
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, reason in (
        ("dev.json", "the answer is none of the choices"),
        ("lines.jsonl", "no context"),
    ):
        task = tasks.read(f"c3={tmp_path / name}", None)
        (one,) = task.questions
        assert one.question == "男：小明来了。\n女：好。\n谁来了？" and (
            one.options,
            one.right,
        ) == (["小红", "小明"], 1)
        assert task.dropped == {reason: 1}


@pytest.mark.parametrize("answer, right", [
    ("    return a + b", True), ("    return a - b", False), ("```python\ndef add(a, b):\n    return a + b\n```", True),
    ("好的：\n```\n    return b + a\n```\n说明", True), ("    while True:\n        pass", False),
])  # fmt: skip
def test_a_function_counts_where_its_tests_pass(tmp_path, answer, right, monkeypatch):
    (tmp_path / "he.jsonl").write_text(json.dumps(FUNCTION), encoding="utf-8")
    (question,) = tasks.read(f"humaneval={tmp_path / 'he.jsonl'}", None).questions
    stock = chat_eval.sandbox.run
    monkeypatch.setattr(chat_eval.sandbox, "run", lambda code: stock(code, seconds=1))
    assert chat_eval.judged(question, answer, None) is right


@pytest.mark.parametrize("word, words", [
    ("belebele=x", "arc_easy, .*NAME=FILE"), ("mmlu", "mmlu=FILE"), ("spelling=x", "made here"), ("c3=no/such", "no such file"),
])  # fmt: skip
def test_a_task_that_is_none_is_one_line(word, words):
    with pytest.raises(SystemExit, match=words):
        tasks.read(word, None)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    right = {0: [True, False, False, False], 1: [False] * 4, 2: [True, True, False, True]}
    records = [
        {"question": q, "sample": s, "right": r}
        for q, found in right.items()
        for s, r in enumerate(found)
    ]
    found = chat_eval.passes(records, 4)
    for k in (1, 2, 4):
        draws = [any(c) for one in right.values() for c in combinations(one, k)]
        assert found[str(k)] == pytest.approx(sum(draws) / len(draws))
    assert list(found) == ["1", "2", "4"]


# ---- chat_eval ------------------------------------------------------------------------------------------------

CHEAP = ["--num_rows", 5, "--max_new_tokens", 6, "--num_samples", 2, "--temperature", 1.0]


def run_chat(folder, out, *flags):
    out.mkdir(exist_ok=True)
    args = chat_eval.parse_args(
        ["--model", str(folder), "--output_dir", str(out), *map(str, [*CHEAP, *flags])]
    )
    return chat_eval.evaluate(args, chat_eval.MiniMindChatModel(str(folder)), out)


def test_an_evaluation_that_was_ended_goes_on_with_the_same_answers(
    folder, tmp_path, monkeypatch, capsys
):
    whole = run_chat(folder, tmp_path / "whole")
    assert set(whole["tasks"]) == {"ceval", "arc_easy", "gsm8k", "spelling"}
    assert whole["tasks"]["ceval"]["questions"] == 20 and whole["tasks"]["ceval"]["chance"] == 0.25
    centred = [row["centred"] for row in whole["tasks"].values()]
    assert whole["chatcore"] == pytest.approx(sum(centred) / 4)

    cut = tmp_path / "cut"
    cut.mkdir()
    lines = (tmp_path / "whole/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 20 + 5 + 2 * 5 + 2 * 5
    kept = 1 + 20 + 5 + 7
    (cut / "answers.jsonl").write_text(
        "\n".join([*lines[:kept], lines[kept][:20]]), encoding="utf-8"
    )
    begun = []
    submit = chat_eval.Engine.submit
    monkeypatch.setattr(chat_eval.Engine, "submit", lambda *a: (begun.append(1), submit(*a))[1])
    again = run_chat(folder, cut)
    assert len(begun) == 3 + 10 and again == whole
    assert {*(cut / "answers.jsonl").read_text(encoding="utf-8").splitlines()} == set(lines)

    run_chat(folder, cut, "--tasks", "spelling")
    assert "begun anew" in capsys.readouterr().out
    assert len((cut / "answers.jsonl").read_text().splitlines()) == 11


@pytest.mark.slow
def test_processes_share_the_questions_and_end_as_one(folder, tmp_path):
    """Three of them had been ended before; one of the files is of another model."""
    whole = run_chat(folder, tmp_path / "whole")
    out = tmp_path / "two"
    out.mkdir()
    lines = (tmp_path / "whole/answers.jsonl").read_text(encoding="utf-8").splitlines()
    left = {
        "": lines[:4],
        ".1": [lines[0], lines[9]],
        ".2": [lines[0], *lines[20:30], lines[40][:9]],
    }
    left[".3"] = ['{"settings": {}}', lines[11].replace("right", "left")]
    for number, kept in left.items():
        (out / f"answers{number}.jsonl").write_text("\n".join(kept), encoding="utf-8")
    script = ["python", ROOT / "common/launch.py", 2, RECIPE / "evaluation/chat_eval.py"]
    command = [*script, "--model", folder, "--output_dir", out, *CHEAP]
    done = expect(finish(start(command)))
    assert "14 answers are there already" in done.stdout
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert {name: found[name] for name in whole if name != "model"} == {
        name: whole[name] for name in whole if name != "model"
    }
    assert [path.name for path in out.glob("answers*")] == ["answers.jsonl"]
    assert set((out / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == set(lines)


def test_answers_are_counted_whatever_they_say(folder, tmp_path, monkeypatch):
    """A model that knows one answer: shares, pass@k; names count by themselves."""
    monkeypatch.setattr(chat_eval, "answer_text", lambda tokenizer, ids: "红1\n#### 1")
    questions = tasks.spelling()[:5]
    share = sum(one.final == "1" for one in questions) / 5
    names = [{"question": "?", "contains": words} for words in (["红1"], ["红1", "蓝"], [])]
    (tmp_path / "names.jsonl").write_text("\n".join(map(json.dumps, names)), encoding="utf-8")
    also = ("--also", f"identity={tmp_path / 'names.jsonl'}")
    results = run_chat(folder, tmp_path, "--tasks", "spelling", *also)
    name = results["tasks"]["identity"]
    assert (name["accuracy"], name["dropped"]) == (0.5, {"no list contains": 1})
    found = results["tasks"]["spelling"]
    assert found["accuracy"] == share == results["chatcore"]
    assert found["pass_at"] == {"1": pytest.approx(share), "2": pytest.approx(share)}


@pytest.mark.parametrize("flags, words", [
    (["--num_samples", 4], "all of them are the same"), (["--num_rows", 0], "makes no sense"),
    (["--tasks", "spelling", "spelling"], "stands there twice"), (["--temperature", -1], "makes no sense"),
])  # fmt: skip
def test_flags_that_make_no_sense_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        chat_eval.parse_args([str(flag) for flag in flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_journal_drops_a_torn_line_and_keeps_the_rest(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    journal = journals.Journal(file, {"x": 1})
    for number in range(3):
        journal.add({"task": "t", "question": number, "sample": 0, "right": True})
    journal.close()
    file.write_text(file.read_text()[:-9])
    journal = journals.Journal(file, {"x": 1})
    assert [journal.has("t", number) for number in range(3)] == [True, True, False]
    journal.close()
    assert len(file.read_text().splitlines()) == 3
    journals.Journal(file, {"x": 2}).close()
    assert "begun anew" in capsys.readouterr().out and len(file.read_text().splitlines()) == 1
