"""Tools within one answer: in the terminal and on the page, with a model that says what it was told to, token by token."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, own_modules
from transformers import AutoTokenizer

from common.demo import chat_model

RECIPE = ROOT / "minimind_npu"
NAMES = "chat app engine.generation toolcall.own_tools toolcall.talk server.client server.asks"
terminal, app, generation, own_tools, talking, clients, asks = own_modules(
    RECIPE.name, *NAMES.split()
)
VISITOR = SimpleNamespace(session_hash="a")


def call(name, **arguments):
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


SUM = call("calculator", expression="37*70")
CODE = call("python", code="print(2590 + 1)")
ANSWERS = [f"我算一下🙂。\n{SUM}", CODE, "一共2591🎈。"]
GIVEN = ['{"result": 2590}', '{"output": "2591"}']


class Scripted(generation.MiniMindChatModel):
    """Gives these answers in their order, a token (a byte of 🙂) at a time; `asked`: its prompts."""

    def __init__(self, answers):
        self.tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
        self.name = "scripted"
        self.adapter = False
        self.chats = self.can_think = self.takes_system = self.takes_tools = True
        self.window = 2000
        self.lock = threading.Lock()
        self.answers = iter(answers)
        self.asked = []

    def described(self):
        return []

    def sampling_defaults(self):
        return {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1}

    def _generate(self, prompt, room, heard, **_):
        self.asked.append(self.tokenizer.decode(prompt))
        ids = self.tokenizer(next(self.answers), add_special_tokens=False)["input_ids"]
        for count in range(1, len(ids) + 1):
            time.sleep(0.002)
            if heard(torch.tensor([[*prompt, *ids[:count]]])).all():
                return


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_model, "REFRESH", 0.001)


def said(model, lines, **how):
    """-> what the terminal shows for these lines piece by piece, the chat."""
    pieces = []
    talk = terminal.Chat(model, registry=own_tools.registry_of(["python"]), **how)
    terminal.talk(talk, lines, lambda text="", end="\n", **_: pieces.append(f"{text}{end}"))
    return pieces, talk


def test_the_terminal_runs_what_is_called_and_the_model_goes_on():
    model = Scripted([*ANSWERS, "好。"])
    pieces, talk = said(model, ["37×70再加1？", "/undo", "/tools off", "你好"], uses_tools=True)
    text = "".join(pieces)
    shown = f"我算一下🙂。\n{SUM}\n  = {GIVEN[0]}\n{CODE}\n  = {GIVEN[1]}\n一共2591🎈。\n"
    assert shown in text and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 50
    first, second, third, last = model.asked
    assert '"name": "calculator"' in first and '"name": "python"' in first
    assert second == first + f"我算一下🙂。\n{SUM}<|im_end|>\n" + (
        f"<|im_start|>user\n<tool_response>\n{GIVEN[0]}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert third.startswith(second) and GIVEN[1] in third
    assert "(taken back: 37×70再加1？)" in text and "calculator" not in last
    assert [turn["role"] for turn in talk.history] == ["user", "assistant"]


@pytest.mark.parametrize("answers, given", [
    (["<tool_call>\n{\"name\": \n</tool_call>", "不行。"], ["not JSON"]),
    ([f"{SUM}\n{SUM[:-20]}"], []),
    ([SUM] * talking.MAX_TURNS, [GIVEN[0]] * (talking.MAX_TURNS - 1)),
    ([f"{SUM}\n{call('none')}", "好。"], [GIVEN[0], "no tool none"]),
])  # fmt: skip
def test_calls_that_cannot_be_made_are_answered_and_those_that_are_cut_are_not(answers, given):
    """A model that calls for ever is ended."""
    model = Scripted(answers)
    _, talk = said(model, ["算"], uses_tools=True)
    results = [turn["content"] for turn in talk.history if turn["role"] == "tool"]
    assert len(model.asked) == len(answers) and len(results) == len(given)
    assert all(words in result for words, result in zip(given, results, strict=True))


def test_nothing_is_run_once_the_answer_was_stopped():
    stop = threading.Event()
    parts = talking.with_tools(
        Scripted(ANSWERS), [{"role": "user", "content": "算"}], own_tools.registry_of([]), stop
    )
    for found, _ in parts:
        if found[-1].text.endswith("</tool_call>"):
            stop.set()
    assert [part.role for part in found] == ["assistant"]


def test_the_page_folds_calls_with_their_results_and_keeps_them_for_the_next_question():
    model = Scripted([*ANSWERS, "好。"])
    chat = app.ToolChat(
        own_tools.registry_of(["python"]), model, ["use_adapter", "thinking", "tools"]
    )
    titles = set()
    steps = list(chat.ask("37×70再加1？", [], VISITOR, "", True, False, True))
    for shown, _, _ in steps:
        titles |= {
            (one.metadata["title"], one.metadata["status"])
            for one in shown
            if one.metadata.get("title")
        }
        texts = [one.content for one in shown]
        assert not any("\ufffd" in text or "tool_call" in text for text in texts), texts
    assert ("调用工具…", "pending") in titles and ("calculator", "done") in titles
    shown, history, _ = steps[-1]
    contents = [one.content for one in shown]
    assert contents[1] == "我算一下🙂。" and contents[-2] == "一共2591🎈。"
    assert [one.metadata.get("title") for one in shown[2:4]] == ["calculator", "python"]
    assert "37\\*70" in contents[2] and "2590" in contents[2] and "2591" in contents[3]

    list(chat.ask("你好", history, VISITOR, "", True, False, False))
    assert "# Tools" not in model.asked[3] and GIVEN[1] in model.asked[3] and SUM in model.asked[3]
    assert chat.undo(history)[2] == "37×70再加1？"


def test_the_oldest_questions_go_with_all_their_calls():
    model = Scripted([])
    talk = [{"role": "user", "content": "一"}]
    made = talking.Part("assistant", SUM, talking.parse_calls(SUM))
    talk += [made.message, talking.Part("tool", GIVEN[0]).message]
    talk += [{"role": "assistant", "content": "对"}, {"role": "user", "content": "二"}]
    whole = model.prompt(talk, 0, False)
    model.window = len(whole) - 1
    assert (
        model.tokenizer.decode(model.prompt(talk, 0, False))
        == "<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n"
    )


def test_calls_of_a_server_come_whole_or_in_pieces_and_go_back_with_ids(monkeypatch):
    """As OpenAI's interface has them; ours takes what is sent."""
    pieces = [
        {"role": "assistant", "content": "算。"},
        {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "calculator", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"expression": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"37*70"}'}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "date", "arguments": '{"date": "2024-2-28"}'}}]},
    ]  # fmt: skip
    sent = []
    answers = iter([pieces, [{"content": "好。"}]])
    served = object.__new__(clients.ServedModel)
    served.name = "m"
    monkeypatch.setattr(
        served, "pieces", lambda asked: sent.append(asked) or next(answers), raising=False
    )
    _, talk = said(served, ["算"], uses_tools=True)
    assert talk.history[-1]["content"] == "好。" and talk.history[2]["content"] == GIVEN[0]
    for asked in sent:
        asks.ChatAsk.model_validate(asked).check()
    assert [tool["function"]["name"] for tool in sent[0]["tools"]][0] == "calculator"
    assert json.loads(sent[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {
        "expression": "37*70"
    }
