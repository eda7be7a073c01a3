"""A conversation that is cleared while its answer is still coming."""

from types import SimpleNamespace

import pytest

from common.demo import page

ANSWER = ["<think>想", "<think>想</think>答", "<think>想</think>答完。"]
VISITOR = SimpleNamespace(session_hash="a")


def spoken(turns, stop, use_adapter):
    """Like ChatModel.stream: goes on until it is stopped, and its last step is whole."""
    for count, text in enumerate(ANSWER[:-1], 1):
        if not stop.is_set():
            yield text, count
    yield ANSWER[-1], len(ANSWER)


@pytest.fixture
def chat():
    return page.Chat(SimpleNamespace(stream=spoken), ("use_adapter",))


def test_an_answer_grows_and_gets_its_facts(chat):
    seen = [
        (shown, dict(history[-1])) for shown, history, _ in chat.ask("问", [], VISITOR, "", False)
    ]
    answers = [answer for _, answer in seen]
    assert [answer["content"] for answer in answers] == ["", "", "答", "答完。", "答完。"]
    assert [answer["thought_done"] for answer in answers] == [True, False, True, True, True]
    assert answers[-1]["reasoning_content"] == "想" and not answers[-2]["note"]
    assert answers[-1]["note"].startswith("3 词元 · ") and answers[-1]["note"].endswith(
        "词元/秒 · 微调前"
    )
    assert [message.content for message in seen[-1][0]] == [
        "问",
        "想",
        "答完。",
        "",
    ] and not chat.running


@pytest.mark.parametrize("when", ["asked", "growing", "ended"])
def test_what_was_cleared_does_not_come_back(chat, when):
    run = chat.ask("问", [], VISITOR, "", True)
    for _, history, _ in run:
        answer = history[-1]
        if when == "asked" or (answer["note"] if when == "ended" else answer["content"]):
            break
    *emptied, box = chat.clear(VISITOR)
    assert emptied == [[], []] and "submit_btn" not in box, "another question could begin"
    later = list(run)
    assert later and all(step[:2] == ([], []) for step in later)
    assert chat.clear(VISITOR)[2]["submit_btn"] and not chat.running


def test_an_answer_that_fails_frees_the_page(chat):
    chat.chat_model.stream = lambda *_, **__: 1 / 0
    with pytest.raises(page.gr.Error, match="ZeroDivisionError"):
        list(chat.ask("问", [], VISITOR, "", True))
    assert not chat.running
