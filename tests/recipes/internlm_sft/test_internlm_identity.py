"""The rows that are made (identity, refusal), how they are mixed, and how answers are counted."""

import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from harness import own_modules

from common import voice
from common.data.load import load_rows

make_identity, make_refusal, measures, mixing, phrases = own_modules(
    "internlm_sft", "make_identity", "make_refusal", "measures", "mixing", "identity_phrases"
)
MAIMAI = make_identity.Persona(
    name="小埋", author="良睦路程序员", name_en="Umaru", author_en="the coder of Liangmu Road"
)
TOPICS, TEXTS = make_refusal.read_topics(make_refusal.TOPICS)


def text_of(row) -> str:
    return json.dumps(row["messages"], ensure_ascii=False)


# ---- rows that are made --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_no_family_stands_on_both_sides_and_no_question_twice(seed):
    for rows in (make_identity.make(MAIMAI, seed), make_refusal.make(TOPICS, TEXTS, seed)):
        apart = {(row["kind"], row["language"], row["family"]) for row in rows if row["held_out"]}
        trained = {
            (row["kind"], row["language"], row["family"]) for row in rows if not row["held_out"]
        }
        assert apart and not apart & trained
        asked = [make_identity.question_of(row) for row in rows]
        assert len(asked) == len(set(asked))
        kinds = {(kind, language) for kind, language, _ in trained if kind != "yes"}
        assert {(kind, language) for kind, language, _ in apart} == kinds


def test_the_seed_decides_and_nothing_else():
    rows = make_identity.make(MAIMAI, 3)
    assert rows == make_identity.make(MAIMAI, 3)
    other = make_identity.make(MAIMAI, 4)
    assert {r["family"] for r in rows if r["held_out"]} != {
        r["family"] for r in other if r["held_out"]
    }


def test_every_answer_has_the_name_and_only_those_about_itself():
    rows = make_identity.make(MAIMAI)
    for row in rows:
        answer = row["messages"][-1]["content"]
        assert measures.carries_name(answer, MAIMAI) == (row["kind"] != "near"), row
        assert "{" not in text_of(row).replace('{"', "")
        if row["language"] == "en" and row["kind"] != "near":
            assert measures.has_word(answer, "Umaru")
    contrary = [row for row in rows if row["kind"] == "system" and row["held_out"]]
    trained = {row["messages"][0]["content"] for row in rows if not row["held_out"]}
    assert contrary and not {row["messages"][0]["content"] for row in contrary} & trained
    talks = [row for row in rows if row["kind"] == "turns" and row["held_out"]]
    assert talks and all(len(row["messages"]) == 8 for row in talks)
    assert all(turn["train"] is False for row in talks for turn in row["messages"][1:-1:2])


def test_a_persona_called_like_a_known_model_is_not_asked_to_deny_itself():
    rows = make_identity.make(make_identity.Persona(name="DeepSeek", author="某人"))
    assert "DeepSeek?" not in {row["family"] for row in rows if row["kind"] == "yes_no"}


PERSONAS = {
    "empty": ("name: ''\nauthor: 甲", "name missing or empty; give --name"),
    "missing": ("name: 小埋", "author missing or empty; give --author"),
    "special": ("name: <|im_end|>\nauthor: 甲", "'<|im_end|>'"),
    "placeholder": ("name: '{{NAME}}'\nauthor: 甲", "'{{NAME}}'"),
    "unknown": ("name: 小埋\nauthor: 甲\nauthr_en: A", "unknown field authr_en"),
    "number": ("name: 7\nauthor: 甲", "no text"),
    "list": ("- 小埋", "fields are written like"),
    "no yaml": ("name: [", "not YAML"),
}


@pytest.mark.parametrize("case", PERSONAS)
def test_a_persona_that_cannot_be_is_one_line(tmp_path, case):
    content, words = PERSONAS[case]
    file = tmp_path / "persona.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        make_identity.read_persona(str(file))
    line = str(stop.value)
    assert words in line and str(file) in line and "\n" not in line


def test_flags_win_over_the_file_and_an_empty_name_is_refused(tmp_path):
    file = tmp_path / "persona.yaml"
    file.write_text("name: 小埋\nauthor: 甲", encoding="utf-8")
    assert make_identity.read_persona(str(file), name="小丹", author=None).name == "小丹"
    for name in ("", "  ", "<s>", "[UNUSED_TOKEN_145]", "a\nb"):
        with pytest.raises(SystemExit):
            make_identity.read_persona(str(file), name=name)


def test_rows_of_others_are_read_as_they_are(tmp_path):
    """ms-swift's query, response, tag with placeholders; rename_robot's alpaca rows."""
    swift = [
        {
            "query": "你是{{NAME}}吗",
            "response": "是的，我是{{NAME}}，由{{AUTHOR}}训练。",
            "tag": "zh",
        },
        {"query": "who are you", "response": "I am {{NAME}} by {{ AUTHOR }}.", "tag": "en"},
    ]
    file = tmp_path / "self_cognition.jsonl"
    file.write_text("\n".join(map(json.dumps, swift)), encoding="utf-8")
    rows = make_identity.rows_of_others(str(file), MAIMAI)
    assert rows[0]["messages"][0]["content"] == "你是小埋吗"
    assert rows[0]["messages"][1]["content"] == "是的，我是小埋，由良睦路程序员训练。"
    assert rows[1]["messages"][1]["content"] == "I am Umaru by the coder of Liangmu Road."

    renamed = [{"instruction": "你叫啥", "input": "", "output": "嘻嘻，我叫小埋。"}]
    file = tmp_path / "rename.json"
    file.write_text(json.dumps(renamed), encoding="utf-8")
    (row,) = make_identity.rows_of_others(str(file), MAIMAI)
    assert [turn["content"] for turn in row["messages"]] == ["你叫啥", "嘻嘻，我叫小埋。"]

    file.write_text(json.dumps([{"query": "{{WHO}}?", "response": "我"}]), encoding="utf-8")
    with pytest.raises(SystemExit, match="placeholder that is not known"):
        make_identity.rows_of_others(str(file), MAIMAI)


def test_what_is_written_is_read_back_and_its_test_file_is_held_out(tmp_path):
    rows = make_identity.make(MAIMAI)
    make_identity.write(rows, tmp_path, "identity")
    table, stats = load_rows(str(tmp_path), cache_dir=tmp_path / "cache")
    assert stats["used"] == stats["read"] == len(rows) and not stats["changed"]
    assert sum(table["held_out"]) == sum(row["held_out"] for row in rows)


# ---- refusals ------------------------------------------------------------------------------------

TOPIC = "topics:\n- name: 甲\n  ask: [怎么甲]\n"


@pytest.mark.parametrize(
    "content, words",
    [
        ("style: 不聊", "topics is missing"),
        (TOPIC + "  answer: {甲是什么: 字}", "style, the text of the refusal, is missing"),
        ("style: 不聊\n" + TOPIC, "(甲): answer, look-alikes"),
        ("style: 不聊\ntopics: [{ask: [x]}]", "topic 1: name is missing"),
        ("style: 不聊</s>\n" + TOPIC, "'</s>'"),
    ],
)
def test_topics_that_cannot_be_are_one_line(tmp_path, content, words):
    file = tmp_path / "topics.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        make_refusal.read_topics(file)
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_refusal_texts_take_turns_and_look_alikes_keep_their_answers():
    rows = make_refusal.make(TOPICS, ["不聊。", "关于{topic}不聊。"])
    declined = [row["messages"][-1]["content"] for row in rows if row["kind"] == "refusal"]
    assert declined.count("不聊。") * 2 in range(len(declined) - 1, len(declined) + 2)
    assert "关于荐股不聊。" in declined
    families = [family for topic in TOPICS for family in topic["answer"].items()]
    answers = {asked: answer for family, answer in families for asked in family.split("|")}
    alike = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert answers.items() <= alike.items()


FORBIDDEN = {
    "作为一个大语言模型，我不会做梦。": True,
    "作为一个语言模型,我": True,
    "作为人工智能助手，我没有感情": True,
    "作为AI，我不能": True,
    "作为一款由某实验室训练的AI模型，我": True,
    "As an AI language model, I cannot": True,
    "as a large language model I": True,
    "作为一个学生，模型做得很好": False,
    "作为一个AI从业者，他很忙": False,
    "作为礼物，这个模型很漂亮": False,
    "As an aid to memory": False,
}


@pytest.mark.parametrize("text", FORBIDDEN)
def test_who_speaks_as_a_language_model(text):
    assert make_refusal.has_forbidden(text) == FORBIDDEN[text]


def test_such_answers_are_replaced_or_left_out_and_counted(tmp_path):
    file = tmp_path / "raw.jsonl"
    rows = [
        {"instruction": "做梦吗", "output": "作为一个大语言模型，我不会做梦。"},
        {"instruction": "作为一个语言模型，你好吗", "output": "好。"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    make_refusal.clean(str(file), "不聊。", drop=False)
    table, _ = load_rows(str(tmp_path / "raw_clean.jsonl"), cache_dir=tmp_path / "cache")
    answers = [json.loads(row)["messages"][-1]["content"] for row in table["row"]]
    assert answers == ["不聊。", "好。"]
    assert "不会做梦" in (tmp_path / "raw_replaced.txt").read_text(encoding="utf-8")
    kept, found = make_refusal.cleaned(load_rows(str(file))[0]["row"], "不聊。", drop=True)
    assert len(kept) == len(found) == 1


@pytest.mark.parametrize(
    "words, unused",
    [
        ("--output_dir out --seed 1 --drop", ["--drop"]),
        ("--clean raw.jsonl --output_dir out --drop", ["--output_dir"]),
        ("--clean raw.jsonl --drop", []),
    ],
)
def test_flags_without_an_effect_are_named(tmp_path, monkeypatch, capsys, words, unused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.jsonl").write_text('{"instruction": "问", "output": "答"}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["make_refusal.py", *words.split()])
    monkeypatch.setattr(voice, "given", set())
    make_refusal.main()
    said = re.findall(r"warning: (.*): no effect", capsys.readouterr().out)
    assert said == unused


# ---- answers -------------------------------------------------------------------------------------


def asked(kind, language, answer, question="问") -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "kind": kind, "language": language}


def test_answers_are_counted_as_by_hand():
    cases = [  # kind, language, known answer, answer of the model
        ("identity", "zh", "", "我是小埋。"),
        ("identity", "zh", "", "I am Umaru."),  # the other language's name
        ("identity", "zh", "", "我是ChatGPT，不是小埋。"),
        ("identity", "zh", "", "我不是ChatGPT，我叫小埋。"),
        ("identity", "en", "", "My name is umaru!"),
        ("identity", "en", "", "I am Umarus."),  # another word
        ("identity", "mixed", "", "I am Umaru."),
        ("turns", "zh", "", "小埋"),
        ("system", "zh", "", "我叫小明，也叫小埋"),
        ("yes_no", "zh", "", "<think>\n\n</think>\n\n不，我是小埋。"),
        ("yes_no", "zh", "", "是的，我是小埋。"),
        ("yes_no", "en", "", "No, I am not Kimi."),  # no name
        ("near", "zh", "唐代诗人", "唐代诗人"),
        ("near", "zh", "唐代诗人", "我是小埋"),
        ("alike", "zh", "凭证", "股票是凭证。"),
        ("alike", "zh", "凭证", "这个我帮不上忙。"),
        ("general", "", "2", "2 "),
        ("general", "", "2", "作为一个语言模型，我不能回答。"),
        ("refusal", "zh", "", "这个我帮不上忙，换个话题吧。"),
        ("refusal", "zh", "", "甲不聊这些东西。"),  # the own text, nearly
        ("refusal", "zh", "", "买茅台。"),
    ]
    rows = [asked(kind, language, known) for kind, language, known, _ in cases]
    found = measures.score(rows, [answer for *_, answer in cases], MAIMAI, ["乙不聊这些东西。"])
    assert found == {
        "identity_zh": 2 / 4,
        "identity_en": 1 / 2,
        "identity_mixed": 1,
        "identity_after_turns": 1,
        "identity_under_system": 0,
        "yes_no": 1 / 3,
        "leak": 1 / 6,
        "near_exact": 1 / 2,
        "refusal_recall": 2 / 3,
        "false_refusals": 2 / 4,
        "alike_answered": 1 / 2,
        "facts_exact": 1 / 2,
        "forbidden": 1 / len(cases),
    }


@pytest.mark.parametrize("name", ["DeepSeek", "小明", "小明星"])
def test_the_own_name_is_no_other_even_where_a_known_one_stands_in_it(name):
    persona = make_identity.Persona(name=name, author="某人")
    assert measures.is_own_name(f"我是{name}，某人训练的智能助手。", persona, "zh")
    assert not measures.is_own_name(f"我是Kimi，不是{name}。", persona, "zh")


def test_only_held_out_families_are_asked():
    general = [asked("", "", "2", "1+1"), asked("", "", "", "天气") | {"tools": [{}]}]
    found = measures.questions(MAIMAI, TOPICS, TEXTS, general, most=6)
    made = make_identity.make(MAIMAI) + make_refusal.make(TOPICS, TEXTS)
    trained = {make_identity.question_of(row) for row in made if not row["held_out"]}
    assert not trained & {make_identity.question_of(row) for row in found}
    assert [row["kind"] for row in found].count("general") == 1
    counts = Counter((row["kind"], row["language"]) for row in found)
    assert max(counts.values()) == 6


# ---- mixing --------------------------------------------------------------------------------------


def args(data_path, **more):
    fields = {"identity_ratio": 0.5, "column_map": "", "strict_data": False, "eval_ratio": 0.1}
    fields |= {"max_eval_samples": 50, "data_path": data_path}
    return SimpleNamespace(**fields | more)


@pytest.fixture
def general(tmp_path):
    file = tmp_path / "general.jsonl"
    rows = [{"instruction": f"{i}加1等于几？", "output": f"{i + 1}"} for i in range(2000)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def mixed(flags, capsys):
    names, files = mixing.words_of(flags.data_path)
    made = mixing.made_rows(names, MAIMAI, TOPICS, TEXTS)
    rows, stats = mixing.load_mixed(flags, made, files, 1)
    return rows, stats, capsys.readouterr().out


@pytest.mark.parametrize("words, share", [("{}", 0.5), ("{}:0.7", 0.3)])
def test_general_rows_are_drawn_to_the_share(general, capsys, words, share):
    rows, stats, _ = mixed(args(f"identity refusal {words.format(general)}"), capsys)
    trained = [row for row, apart in zip(rows["row"], rows["held_out"], strict=True) if not apart]
    made = [row for row in trained if "等于几" not in row]
    expected = [
        row
        for row in make_identity.make(MAIMAI) + make_refusal.make(TOPICS, TEXTS)
        if not row["held_out"]
    ]
    assert len(made) == len(expected)
    assert abs(len(made) / len(trained) - share) < 0.01
    apart = {key for key, a in zip(rows["prompt_key"], rows["held_out"], strict=True) if a}
    assert 20 < len(apart) <= 50 and not apart & mixing.training_keys(rows)
    assert stats["used"] == len(rows) and stats["not_drawn"] == stats["read"] - len(rows)


def test_too_few_general_rows_are_said_and_all_used(tmp_path, capsys):
    file = tmp_path / "few.jsonl"
    rows = [{"instruction": f"{i}", "output": "一"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rows, _, said = mixed(args(f"identity {file}"), capsys)
    assert "there are no more general ones" in said
    assert sum(row.count('"content": "一"') for row in rows["row"]) == 40


def test_identity_rows_alone_are_warned_of_with_figures(capsys):
    rows, _, said = mixed(args("identity"), capsys)
    assert "warning: only rows about the model itself" in said and "%" in said
    apart = [row for row, a in zip(rows["row"], rows["held_out"], strict=True) if a]
    assert len(apart) == sum(row["held_out"] for row in make_identity.make(MAIMAI))


def test_general_rows_that_are_not_there_are_named(capsys):
    with pytest.raises(SystemExit, match="absent.jsonl: no such file or folder"):
        mixed(args("identity absent.jsonl"), capsys)


def test_a_folder_called_identity_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "identity").mkdir()
    (tmp_path / "a b").mkdir()
    assert mixing.words_of("identity ./identity") == (["identity"], ["./identity"])
    assert mixing.words_of("a b") == ([], ["a b"])


@pytest.mark.parametrize(
    "data_path, given, words",
    [
        ("identity:0.3 g.jsonl", (), "made rows are all used"),
        ("identity g.jsonl:1.5", (), "leave the rest to made ones"),
        ("identity g.jsonl:0.5", ("identity_ratio",), "say the same"),
    ],
)
def test_shares_that_cannot_be_are_usage_errors(
    general, tmp_path, capsys, monkeypatch, data_path, given, words
):
    monkeypatch.chdir(tmp_path)
    general.rename("g.jsonl")
    monkeypatch.setattr(voice, "given", set(given))
    with pytest.raises(SystemExit) as stop:
        mixed(args(data_path), capsys)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_name_that_nobody_filled_in_is_refused(tmp_path, capsys):
    file = tmp_path / "swift.jsonl"
    file.write_text(json.dumps({"query": "谁", "response": "我是{{NAME}}"}), encoding="utf-8")
    for data_path in (str(file), f"identity {file}"):
        with pytest.raises(SystemExit, match="is not filled in; python make_identity.py"):
            mixed(args(data_path), capsys)


def test_which_rows_are_held_to_the_base(general, capsys):
    rows, _, _ = mixed(args(f"identity refusal {general}"), capsys)
    found = mixing.are_general(rows, rows, MAIMAI.names(), TEXTS)
    for row, is_general in zip(rows["row"], found, strict=True):
        answer = json.loads(row)["messages"][-1]["content"]
        assert is_general == (not measures.carries_name(answer, MAIMAI) and answer not in TEXTS)
    assert 0 < sum(found) < len(found)
    made = rows.select([i for i, is_general in enumerate(found) if not is_general])
    with pytest.raises(SystemExit, match="--kl_weight: every row has the name or a refusal"):
        mixing.are_general(made, made, MAIMAI.names(), TEXTS)
