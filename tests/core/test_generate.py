"""What held-out rows are asked with, where answers stop, what they are compared with."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from common import tiny
from common.runs import generate
from common.runs.metrics import with_plain_calls

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
    """Like that of a base model: its texts end otherwise than the turns of its template."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = {"eos_token": names[0], "chat_template": TEMPLATE}
    return tiny.make_tokenizer(
        ["天气 city 北京 weather name arguments"] * 9, 400, names, **settings
    )


def model_with(ends):
    return SimpleNamespace(generation_config=GenerationConfig(eos_token_id=ends))


@pytest.mark.parametrize("ends, known", [(None, [0, 2]), (0, [0, 2]), ([0, 7], [0, 2, 7])])
def test_answers_stop_at_the_end_of_a_turn_and_at_the_end_of_a_text(tokenizer, ends, known):
    model = model_with(ends)
    assert generate.end_token_ids(model, tokenizer) == known
    generate.remember_ends(model, tokenizer)
    assert model.generation_config.eos_token_id == known


def asked(name, arguments, **more):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call], **more}
    return json.dumps({"messages": [{"role": "user", "content": "查"}, answer]})


def scores(monkeypatch, tokenizer, rows, answers):
    monkeypatch.setattr(generate, "generate_answers", lambda *_: answers)
    return generate.answer_eval_rows(None, tokenizer, rows, lambda *_: [1], 9)


def test_tool_calls_are_compared_as_calls(monkeypatch, tokenizer):
    rows = [asked("weather", {"city": "北京", "days": 2})] * 5
    answers = [
        '<tool_call>{"name": "weather", "arguments": {"city": "北京", "days": 2}}</tool_call>',
        '<tool_call>\\n{"arguments":{"days":2,"city":"\\u5317京"},"name":"weather"}\\n</tool_call>',
        '想</think><tool_call>{"name": "weather", "arguments": "{\\"days\\": 2, \\"city\\": \\"北京\\"}"}'
        "</tool_call>",
        '<tool_call>{"name": "weather", "arguments": {"city": "上海", "days": 2}}</tool_call>',
        "",
    ]
    answers[1] = answers[1].replace("\\n", "\n")
    metrics, samples = scores(monkeypatch, tokenizer, rows, answers)
    assert metrics["exact_match"] == 3 / 5
    assert (
        '"name": "weather"' in samples[0]["reference"] and "im_end" not in samples[0]["reference"]
    )


def test_a_reference_has_no_thought_wherever_the_row_keeps_it(monkeypatch, tokenizer):
    inside = {"role": "assistant", "content": "<think>想</think>\n好"}
    beside = {"role": "assistant", "content": "好", "reasoning_content": "想"}
    question = {"role": "user", "content": "问"}
    rows = [json.dumps({"messages": [question, answer]}) for answer in (inside, beside)]
    rows.append(asked("f", {"a": 1}, reasoning_content="想"))
    call = '{"name": "f", "arguments": {"a": 1}}'
    answers = ["好", "<think>那</think>好", f"<think>那</think><tool_call>{call}</tool_call>"]
    assert scores(monkeypatch, tokenizer, rows, answers)[0]["exact_match"] == 1


def test_what_is_no_call_stays_as_it_is():
    for text in ("", "{", '{"name": 1, "arguments": {}}', '{"a": {"b": 1}} {x}', "[1, 2]"):
        assert with_plain_calls(text) == text
    two = '{"name":"a","arguments":{}}\n {"arguments":{},"name":"a"}'
    one = '{"arguments": {}, "name": "a"}'
    assert with_plain_calls(two) == one + one


def test_documents_are_continued_as_they_are_trained(monkeypatch, tokenizer):
    prompts = []
    monkeypatch.setattr(
        generate, "generate_answers", lambda _, __, ids, ___: prompts.extend(ids) or ["。"]
    )
    row = [json.dumps({"text": "天气 <|im_end|> " * 9})]
    _, (sample,) = generate.continue_eval_rows(None, tokenizer, row, 8)
    assert not set(prompts[0]) & {0, 1, 2} and sample["prompt"].startswith("天气 <|im_end|>")
    generate.continue_eval_rows(None, tokenizer, row, 8, start=[1])
    assert prompts[1] == [1, *prompts[0]]
    begins = tiny.make_tokenizer(
        ["天气"] * 9, 300, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>"
    )
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    generate.continue_eval_rows(None, begins, row, 8)
    assert prompts[2][0] == 0


# ---- ZeRO-3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit, given, asks", [(True, 0, True), (False, 0, False), (False, 1, True)])
def test_under_zero_3_weights_are_gathered_once_or_nothing_is_asked(
    monkeypatch, capsys, fit, given, asks
):
    """Else each new token gathers them: 44 minutes before the first step of a 32B model."""
    entered = []
    monkeypatch.setattr(generate, "engine", lambda args: "zero-3")
    monkeypatch.setattr(generate, "weights_fit", lambda model: fit)
    monkeypatch.setattr(
        generate, "with_whole_weights", lambda engine: entered.append(1) or nullcontext()
    )
    monkeypatch.setattr(generate.cli, "given_by_user", lambda name: bool(given))
    run = SimpleNamespace(args=None, model=torch.nn.Linear(2, 2), deepspeed=None)
    asking = generate.Asking(run)
    for _ in range(2):
        assert asking.ask(lambda: ({"a": 1}, [2])) == (({"a": 1}, [2]) if asks else ({}, []))
    assert len(entered) == 2 * fit
    said = capsys.readouterr().out
    assert said.count("no question is asked") == (not asks)
    assert asks or "--eval_generate 8 asks all the same" in said
