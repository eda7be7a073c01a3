"""Metrics against COCO's own implementation, choices against a plain forward, and what eval.py reads, keeps
and says."""

import base64
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import own_modules
from PIL import Image

NAMES = ("eval", "choices", "metrics", "encoding", "model", "tiny_base", "rows")
evaluation, choices, metrics, encoding, model, tiny_base, rows = own_modules("train_llava", *NAMES)

# ---- metrics -------------------------------------------------------------------------------------

SAMPLE = [  # caption, references
    ("左上角是红色的圆形。", ["左上角有一个红色的圆形。", "红色的圆在左上角"]),
    ("一只猫在睡觉", ["一只黑猫在沙发上睡觉", "猫睡着了", "沙发上的黑猫在睡觉。"]),
    ("两个人在海边散步，天很蓝。", ["海边有两个人", "两个人沿着海边散步"]),
    ("图里什么也没有", ["街上停着三辆汽车", "三辆红色的汽车停在街边"]),
    ("三辆红色的汽车停在街边", ["街上停着三辆汽车", "三辆红色的汽车停在街边"]),
    ("a dog", ["a dog runs", "狗在跑"]),
    ("狗", ["一条狗在草地上奔跑，追着一个球", "狗在跑"]),
]
# of this sample by pycocoevalcap 1.2 (characters with blanks between them)
CIDER_D = 2.880927470530523
CIDER_D_EACH = [4.985854, 2.485544, 3.197433, 0.0, 6.248686, 2.388524, 0.860452]
BLEU = [0.7551020408009164, 0.7095078297819964, 0.6539541396457021, 0.5900189961739636]
ROUGE_L = 0.6148348171778067


def test_captions_score_as_by_cocos_own_implementation():
    captions, references = [c for c, _ in SAMPLE], [r for _, r in SAMPLE]
    scores = metrics.caption_scores(captions, references)
    assert math.isclose(scores["cider_d"], CIDER_D, rel_tol=1e-9)
    assert math.isclose(scores["rouge_l"], ROUGE_L, rel_tol=1e-9)
    for n, expected in enumerate(BLEU, 1):
        assert math.isclose(scores[f"bleu_{n}"], expected, rel_tol=1e-9)
    # one caption after another is worse than its own picture's: the mean says which
    for i, expected in enumerate(CIDER_D_EACH):
        blank = ["" if j != i else caption for j, caption in enumerate(captions)]
        assert abs(metrics.cider_d(blank, references) * len(captions) - expected) < 1e-5


def test_captions_of_nothing_score_nothing():
    assert metrics.bleu([""], [["猫"]]) == [0, 0, 0, 0]
    scores = metrics.caption_scores(["", "。"], [["猫"], ["狗"]])
    assert scores["rouge_l"] == scores["cider_d"] == 0
    assert metrics.caption_scores([], [])["captions"] == 0


def test_exact_match_forgives_blanks_and_the_full_stop():
    assert metrics.exact_match([" 红色。", "红", "Ｒed", ""], ["红色", "红色", "red.", "红"]) == 0.5
    assert metrics.exact_match([], []) == 0


def test_yes_and_no():
    answers = ["有", "没有。", "是的，有一个", "说不清", "不是", "yes, it is"]
    wanted = ["有", "有", "是的", "是", "不是", "no"]
    found = metrics.yes_no([*answers, "红色"], [*wanted, "红色"])
    assert found["questions"] == 6 and found["accuracy"] == 3 / 6
    assert found["precision"] == 2 / 3 and found["recall"] == 2 / 4
    assert metrics.yes_no(["红色"], ["红色"]) == {}


SAYS = {  # of an answer
    True: "是 是的 是啊 对 对的， 有 有的 有两个 能 可以 会 会飞 在桌子上 行 正确 存在 没错 没有错 不错 没问题 yes Yes,it True",
    False: "不 不是 不是的 不对 没 没有 没有的 错 错了 错误 否 不正确 不存在 不能 不可以 不会 不行 不在 未见 并非如此 不不不 no No. "
    "not,it false",
    None: "是不是 有没有 对不对 能不能 可不可以 是否 有无 不知道 不清楚 不确定 不一定 不能确定 无法判断 没办法看清 红色 会议室 对勾 "
    "能量棒 行人 非常红 不锈钢 无人机 nothing norway yesterday",
}  # fmt: skip


@pytest.mark.parametrize("said", SAYS)
def test_what_an_answer_says(said):
    wrong = [text for text in SAYS[said].split() if metrics.yes_or_no(text) is not said]
    assert not wrong


def test_which_references_are_yes_or_no():
    are = "是 是的。 不是 不是的 没有 没有的 有 No yes 可以 不可以 不对 对了 错 错的 错了 错误 正确 不正确 没错 否 没 不 存在 不存在"
    others = "有三个红色的圆形 会议 不倒翁 对勾 是不是 有没有 是否 错落 不知道 无法判断 在左边 noon"
    assert [text for text in are.split() if not metrics.is_yes_or_no(text)] == []
    assert [text for text in others.split() if metrics.is_yes_or_no(text)] == []
    for text in are.split():
        assert metrics.yes_or_no(text) is not None, text


def test_circular_counts_questions_that_are_right_in_every_order():
    asked = [("a", True), ("a", True), ("b", True), ("b", False), ("c", False), ("c", True)]
    asked = [{"group": g, "category": "x" if g == "a" else "y", "right": r} for g, r in asked]
    found = metrics.choice_scores(asked)
    assert found["questions"] == 3 and found["accuracy"] == 2 / 3 and found["circular"] == 1 / 3
    assert found["by_category"] == {"x": 1.0, "y": 0.0}


# ---- a model that answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    texts = ["图里有圆形吗？左上角是什么颜色？只用选项的字母回答。ABCD 有没有红色"]
    torch.manual_seed(0)
    return model.Llava(tiny_base.tiny_model(texts), device="cpu")


def png(color, size=(48, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png((60 * i, 200 - 60 * i, 30)))
    return tmp_path


def write_rows(folder, extra=()) -> str:
    data = []
    for i in range(4):
        turns = ["<image>\n图里有圆形吗？", "有", "左上角是什么颜色？", "红色"]
        data.append({"image": f"{i}.png", "conversations": talk(turns)})
    data.append({"conversations": talk(["你是谁？", "看图助手"])})
    data += extra
    (folder / "rows.json").write_text(json.dumps(data))
    return str(folder / "rows.json")


def talk(texts) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def flags(path, **changed) -> SimpleNamespace:
    given = {
        "data_path": str(path),
        "image_folder": "",
        "column_map": "",
        "held_out": "true",
        "limit": 0,
        "batch_size": 4,
        "max_new_tokens": 6,
        "choice_prompt": choices.CHOICE_PROMPT,
    }
    return SimpleNamespace(**given | changed)


def test_every_answer_is_asked_behind_the_true_turns(folder):
    asked = evaluation.read_questions(flags(write_rows(folder)))
    assert len(asked) == 9 and [q.reference for q in asked[:2]] == ["有", "红色"]
    assert len(asked[0].row["messages"]) == 1 and len(asked[1].row["messages"]) == 3
    assert len(asked[1].pictures) == 1 and not asked[-1].pictures
    assert not evaluation.is_captions(asked)


def test_only_held_out_files_are_asked(folder):
    write_rows(folder)
    (folder / "valid.json").write_text(json.dumps([{"conversations": talk(["好？", "好"])}]))
    (folder / "rows.json").rename(folder / "train.json")
    assert len(evaluation.read_questions(flags(folder))) == 1
    assert len(evaluation.read_questions(flags(folder, held_out="false"))) == 10


def test_answers_in_batches_are_those_of_one_at_a_time_and_blind_ones_differ(llava, folder):
    args = flags(write_rows(folder))
    asked = evaluation.read_questions(args)
    found = {}
    for name, size in (("one", 1), ("four", 4)):
        kept = evaluation.Kept(folder / f"{name}.jsonl", {})
        args.batch_size = size
        eyes = evaluation.Eyes(llava)
        found[name] = evaluation.answer_questions(args, llava, asked, False, kept, eyes)
    assert found["one"] == found["four"] and all(isinstance(v, str) for v in found["one"].values())
    row = encoding.without_pictures(asked[1].row)
    prompt = encoding.encode_prompt(row, llava.tokenizer, llava.image_token_id, llava.image_tokens)
    assert not prompt["pictures"] and llava.image_token_id not in prompt["input_ids"]


def test_a_run_goes_on_where_it_was_ended(llava, folder, monkeypatch):
    args = flags(write_rows(folder))
    asked = evaluation.read_questions(args)
    calls = []
    real = evaluation.generate_answers

    def counted(model, processor, prompts, *rest, **more):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, processor, prompts, *rest, **more)

    monkeypatch.setattr(evaluation, "generate_answers", counted)
    path = folder / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        kept = evaluation.Kept(path, {"model": 1})
        evaluation.answer_questions(args, llava, asked, False, kept, evaluation.Eyes(llava))
    with open(path, "a") as file:
        file.write('{"seen 3.1": "torn')  # killed in the middle of a line
    again = evaluation.Kept(path, {"model": 1})
    assert len(again.known) == 4
    said = evaluation.answer_questions(args, llava, asked, False, again, evaluation.Eyes(llava))
    assert sum(calls) - calls[1] == 9 and len(said) == 9
    with pytest.raises(SystemExit, match="answers of another model"):
        evaluation.Kept(path, {"model": 2})


def test_pictures_that_cannot_be_used_are_misses(llava, folder):
    (folder / "torn.png").write_bytes(png((9, 9, 9))[:60])
    (folder / "page.jpg").write_bytes(b"<html>404")
    (folder / "narrow.png").write_bytes(png((9, 9, 9), (1, 500)))
    bad = [
        {"image": name, "conversations": talk(["<image>好？", "好"])}
        for name in ("torn.png", "page.jpg", "narrow.png")
    ]
    args = flags(write_rows(folder, bad))
    asked = evaluation.read_questions(args)
    eyes = evaluation.Eyes(llava)
    kept = evaluation.Kept(folder / "k.jsonl", {})
    said = evaluation.answer_questions(args, llava, asked, False, kept, eyes)
    assert [key for key, text in said.items() if text is None] == ["5.1", "6.1", "7.1"]
    assert len(eyes.faults) == 3 and "too narrow" in " ".join(eyes.faults.values())
    found = evaluation.score_answers(asked, said, False)
    assert found["questions"] == 11 and found["without_a_picture"]["questions"] == 1


def test_more_pictures_than_the_window_holds_are_a_miss(llava, folder):
    count = 2046 // llava.image_tokens + 1
    all_of_them = "<image>" * count
    pictures = ["0.png"] * count
    many = {"image": pictures, "conversations": talk([all_of_them + "几张？", "多"])}
    later = {"image": pictures, "conversations": talk([all_of_them, "多", "好？", "好"])}
    args = flags(write_rows(folder, [many, later]), max_new_tokens=2)
    asked = [question for question in evaluation.read_questions(args) if len(question.pictures) > 9]
    eyes = evaluation.Eyes(llava)
    kept = evaluation.Kept(folder / "k.jsonl", {})
    said = evaluation.answer_questions(args, llava, asked, False, kept, eyes)
    assert list(said.values()) == [None] * 3
    assert (
        "tokens, the window has 2,046" in next(iter(eyes.faults.values())) and len(eyes.faults) == 3
    )


def test_captions_of_one_picture_are_references_of_each_other(folder):
    lines = "".join(f"一张说明文字够长的图片{k}\t{i}.png\n" for i in range(4) for k in range(3))
    (folder / "c.tsv").write_text("text\timage\n" + lines)
    asked = evaluation.read_questions(flags(folder / "c.tsv"))
    assert len(asked) == 12 and evaluation.is_captions(asked)
    wanted = evaluation.one_of_each(asked)
    assert len(wanted) == 4
    said = {question.key: "一张说明文字够长的图片2" for question in wanted}
    found = evaluation.score_answers(asked, said, True)
    assert found["captions"] == 4 and found["rouge_l"] == 1 and found["bleu_4"] > 0.99


def test_answers_to_different_questions_are_no_captions(folder):
    """Long as they are, they are no references of each other."""
    said = "这是对这个问题的一个足够长的回答"

    def taken_for_captions(*conversations) -> bool:
        rows = [
            {"image": f"{i}.png", "conversations": talk(turns)}
            for i in range(4)
            for turns in conversations
        ]
        (folder / "asked.json").write_text(json.dumps(rows))
        return evaluation.is_captions(evaluation.read_questions(flags(folder / "asked.json")))

    assert taken_for_captions(["<image>\n说说这张图。", said])
    assert not taken_for_captions(["<image>\n左边有什么？", said, "右边有什么？", said])
    assert not taken_for_captions(["<image>\n左边有什么？", said], ["<image>\n右边呢？", said])


# ---- multiple choice -----------------------------------------------------------------------------


def mmbench(folder) -> str:
    """MMBench's columns; row 1000001 is row 1 in another order and takes its picture."""
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    picture = base64.b64encode(png((200, 20, 20))).decode()
    table = [
        ["1", "是什么颜色？", "看图", "红色", "蓝色", "", "", "A", "color", picture],
        ["2", "有几个圆形？", "", "一", "二", "三", "四", "C", "count", picture],
        ["1000001", "是什么颜色？", "看图", "蓝色", "红色", "", "", "B", "color", "1"],
        ["3", "坏的", "", "一", "", "", "", "A", "count", picture],
        ["4", "坏的", "", "一", "二", "", "", "D", "count", picture],
        ["5", "没有答案", "", "一", "二", "", "", "", "count", picture],
    ]
    lines = ["\t".join(row) for row in [header, *table]]
    (folder / "MMBench_DEV_CN.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "MMBench_DEV_CN.tsv")


def test_mmbenchs_table_is_read_as_it_is(folder, capsys):
    path = mmbench(folder)
    assert choices.is_choice_table(folder / "MMBench_DEV_CN.tsv")
    asked = choices.read_choices(path, "", circular=False, limit=0)
    assert [one.key for one in asked] == ["1", "2", "1000001", "5"]
    assert asked[0].options == ["红色", "蓝色"] and asked[0].question == "看图\n是什么颜色？"
    assert asked[2].group == asked[0].group == "1" and asked[2].pictures == asked[0].pictures
    printed = capsys.readouterr().out
    assert "fewer than two options" in printed and "none of the options" in printed
    (folder / "q.jsonl").write_text(
        json.dumps({"question": "?", "A": "1", "B": "2", "image": "0.png"})
    )
    one = choices.read_choices(str(folder / "q.jsonl"), "", False, 0)[0]
    assert one.pictures[0].path.endswith("0.png") and one.pictures[0].root == str(folder)


def test_a_choice_table_with_other_names_and_what_is_none(folder):
    row = {"问": "?", "A": "1", "B": "2", "answer": "B"}
    (folder / "q.jsonl").write_text(json.dumps(row))
    names = "question=问"
    assert not choices.is_choice_table(folder / "q.jsonl")
    assert choices.is_choice_table(folder / "q.jsonl", names)
    one = choices.read_choices(str(folder / "q.jsonl"), "", False, 0, names)[0]
    assert one.question == "?" and one.answer == "B"
    with pytest.raises(SystemExit, match="no column 答"):
        choices.read_choices(str(folder / "q.jsonl"), "", False, 0, "answer=答")
    with pytest.raises(SystemExit, match="stand in one file"):
        choices.read_choices(str(folder), "", False, 0)


def test_an_answer_is_a_letter_or_an_options_own_words(folder, capsys):
    """And a row is not answered with what another of its index was."""
    told = {"B": "B", "b.": "B", "(b)": "B", "B. 狗": "B", "狗": "B", "": "", "cat": "A"}
    told |= {"bird": None, "a bird": None, "D": None}
    options = {"A": "cat", "B": "狗", "C": "A"}
    rows = [{"index": i, "question": "?", **options, "answer": one} for i, one in enumerate(told)]
    rows.append(rows[0] | {"question": "another"})
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = choices.read_choices(str(folder / "q.jsonl"), "", circular=False, limit=0)
    assert {list(told)[int(one.key)]: one.answer for one in asked} == {
        answer: letter for answer, letter in told.items() if letter is not None
    }
    printed = capsys.readouterr().out
    assert "3 rows left out: the answer is none of the options" in printed
    assert "1 rows left out: the index of a row before it" in printed


def test_all_orders_keep_the_right_option():
    one = choices.Choice("7", "?", ["甲", "乙", "丙"], "B", [])
    turned = choices.all_orders(one)
    assert [choice.options for choice in turned] == [
        ["甲", "乙", "丙"],
        ["乙", "丙", "甲"],
        ["丙", "甲", "乙"],
    ]
    for choice in turned:
        assert choice.options[choices.LETTERS.index(choice.answer)] == "乙"


def test_the_likeliest_letter_is_that_of_a_plain_forward(llava, folder):
    """One question at a time, whole logits, the processor's own pixels."""
    asked = choices.read_choices(mmbench(folder), "", circular=True, limit=0)
    eyes = evaluation.Eyes(llava)
    assert all(eyes.can_see(one.pictures) for one in asked)
    for blind in (False, True):
        found = choices.letters_said(llava, asked, blind, eyes, choices.CHOICE_PROMPT)
        expected = [plainly(llava, one, blind) for one in asked]
        assert found == expected


def plainly(llava, one, blind: bool) -> str:
    row = choices.row_for(one, blind, choices.CHOICE_PROMPT)
    known = (llava.tokenizer, llava.image_token_id, llava.image_tokens)
    prompt = encoding.encode_prompt(row, *known)
    scores = {}
    for letter in choices.LETTERS[: len(one.options)]:
        ids = llava.tokenizer(letter, add_special_tokens=False)["input_ids"]
        inputs = {"input_ids": torch.tensor([[*prompt["input_ids"], *ids]])}
        if not blind:
            images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in one.pictures]
            found = llava.image_processor(images=images, return_tensors="pt")
            inputs["pixel_values"] = found["pixel_values"]
        with torch.no_grad():
            likely = llava.model(**inputs).logits[0].log_softmax(-1)
        start = len(prompt["input_ids"]) - 1
        scores[letter] = sum(likely[start + i, token].item() for i, token in enumerate(ids))
    return max(scores, key=scores.get)


# ---- from the command line -----------------------------------------------------------------------


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    evaluation.main()


def test_eval_prints_seen_beside_blind_and_keeps_it(llava, folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "Llava", lambda path: llava)
    path = write_rows(folder)
    words = ["--data_path", path, "--output", folder / "out", "--max_new_tokens", 4]
    run(monkeypatch, *words)
    printed = capsys.readouterr().out
    assert "| | seen | blind |" in printed and "exact match" in printed and "yes no f1" in printed
    found = json.loads((folder / "out/answers.json").read_text())
    assert found["seen"]["questions"] == found["blind"]["questions"] == 8
    assert "without a picture exact match" in printed
    monkeypatch.setattr(evaluation, "generate_answers", lambda *_, **__: 1 / 0)
    run(monkeypatch, *words)  # nothing is asked again
    assert json.loads((folder / "out/answers.json").read_text()) == found


def test_eval_of_choices_prints_published_numbers(llava, folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "Llava", lambda path: llava)
    words = ["--data_path", mmbench(folder), "--circular", "true", "--output", folder / "out"]
    run(monkeypatch, *words)
    printed = capsys.readouterr().out
    assert "circular" in printed and "LLaVA-1.5 7B, published | 58.3 |" in printed
    found = json.loads((folder / "out/choices.json").read_text())
    assert found["seen"]["questions"] == 2 and set(found["seen"]["by_category"]) == {
        "color",
        "count",
    }


def test_flags_that_do_nothing_in_a_task_are_told(llava, folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "Llava", lambda path: llava)
    more = ["--output", folder / "out", "--limit", "1", "--blind", "false"]
    both = ["--held_out", "false", "--circular", "true", "--max_new_tokens", "2"]
    run(monkeypatch, "--data_path", mmbench(folder), *more, *both)
    assert "warning: --held_out, --max_new_tokens: no effect" in capsys.readouterr().out
    run(monkeypatch, "--data_path", write_rows(folder), *more, *both)
    assert "warning: --circular: no effect" in capsys.readouterr().out


def test_answers_belong_to_the_weights_and_never_take_a_hub_ids_place(
    folder, monkeypatch, tmp_path
):
    """org/name would be a local folder from then on."""
    from safetensors.torch import save_file

    hub = tmp_path / "snapshot"
    hub.mkdir()
    save_file({"a": torch.zeros(3)}, hub / "model.safetensors")
    (hub / "config.json").write_text("{}")
    stock = evaluation.adapter.local_folder

    def place(path: str):
        return hub if path == "org/name" else stock(path)

    monkeypatch.setattr(evaluation.adapter, "local_folder", place)
    first = evaluation.sha_of_model("org/name")
    assert first == evaluation.sha_of_model(str(hub)) == evaluation.sha_of_model("org/name")
    save_file({"a": torch.ones(3)}, hub / "model.safetensors")
    other = evaluation.sha_of_model("org/name")
    (hub / "config.json").write_text('{"x": 1}')
    assert len({first, other, evaluation.sha_of_model("org/name")}) == 3
    monkeypatch.chdir(tmp_path)
    place = evaluation.place_for_answers("org/name")
    assert place.parent.parent == evaluation.HERE.parent / "output" and place.name == "org--name"
    assert evaluation.place_for_answers(str(hub)) == hub / "eval"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--data_path", "/no/such"], "no such file"),
        (["--batch_size", "0"], "at least 1"),
        (["--limit", "-1"], "--limit -1: 0 (all) or more"),
        (["--task", "choices", "--data_path", "{folder}"], "stand in one file"),
        (["--image_folder", "/no/such"], "no folder, tar"),
        (["--blnd", "true"], "did you mean --blind"),
        (["--model", "{folder}"], "no trained model here"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, words, said):
    path = write_rows(folder)
    words = [word.format(folder=folder) for word in words]
    if "--data_path" not in words:
        words += ["--data_path", path]
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *words)
    assert said in str(caught.value.code) + capsys.readouterr().err
