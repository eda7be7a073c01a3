"""Labels from chat templates: exact turns, exact tokens, truncation, injected special tokens, preview."""

import json
from copy import deepcopy
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common.data.labels import (
    NAMES_LEFT_OUT,
    THOUGHTS_LEFT_OUT,
    encode_chat,
    encode_prompt,
    fingerprint,
    preview,
    set_template,
    turn_end_ids,
    written_answer,
)
from common.data.spelling import IGNORE, encode_text, text_start

TEXTS = [
    "你好，世界。今天天气很好，我们去公园吧！",
    "hello world, what is 1+2? 答案是三。\n\n",
    "user assistant system\n",
] * 3
SPLIT = (
    r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# reasoning only after the last question, tools, enable_thinking
QWEN3 = r"""{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.open and message.role == 'user' and not (message.content.startswith('<tool_response>')
 and message.content.endswith('</tool_response>')) %}{%- set ns.open = false %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

INST = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ '[S]' + message['content'].strip() + '[/S]' }}
{%- elif message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"""

GLM = """{{ '<|begin|>' }}{% for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'].strip() }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

ROUNDS = """{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}
{%- elif message['role'] == 'user' %}{{ '问：' + message['content'] + '\n\n答：' }}
{%- else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"""

GENERATION = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% if mask_end %}{{ '<|im_end|>' }}
{%- endif %}{% endgeneration %}{% if not mask_end %}{{ '<|im_end|>' }}{% endif %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]


@cache
def byte_level(template, eos="<|im_end|>"):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    raw.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    out = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, pad_token=eos, bos_token="<|begin|>"
    )
    out.chat_template = template
    return out


@cache
def metaspace(template, kind="bpe"):
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"[]/INSTabcdehlor<>s答案你好",
    ]
    vocab = list(dict.fromkeys(vocab))
    if kind == "bpe":
        raw = Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate([*vocab, "▁a", "he", "▁he"])},
                merges=[("▁", "a"), ("h", "e"), ("▁", "he")],
                unk_token="<unk>",
                byte_fallback=True,
                fuse_unk=True,
            )
        )
    else:
        raw = Tokenizer(
            models.Unigram(
                [(token, -float(i % 7)) for i, token in enumerate(vocab)], 0, byte_fallback=True
            )
        )
    if kind != "bare":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    out = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    out.chat_template = template
    return out


def trained(tokenizer, row):
    """Decoded runs of trained tokens; spaces at their ends stay (a fence keeps decoders from dropping them)."""
    runs = []
    open_run = False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORE)
        if label != IGNORE:
            runs = runs if open_run else [*runs, []]
            runs[-1].append(token)
        open_run = label != IGNORE
    fence = tokenizer.encode("a", add_special_tokens=False)
    return [tokenizer.decode(fence + run, clean_up_tokenization_spaces=False)[1:] for run in runs]


def plain_ids(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, **kwargs)["input_ids"]


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def qwen3_turn(message, last, after_query, tools=""):
    reasoning = message.get("reasoning_content", "")
    if after_query and (last or reasoning):
        return (
            "<think>\n"
            + reasoning.strip("\n")
            + "\n</think>\n\n"
            + message["content"].lstrip("\n")
            + "<|im_end|>"
        )
    return message["content"] + "<|im_end|>"


def expect_qwen3(messages):
    query = max(i for i, m in enumerate(messages) if m["role"] == "user")
    turns = [(i, m) for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [
        qwen3_turn(m, i == len(messages) - 1, i > query)
        for i, m in turns
        if i > query or "reasoning_content" not in m  # else it would be trained without its thought
    ]


def expect_glm(messages):
    *earlier, last = [text.strip() for text in answers(messages)]
    return ["\n" + text + "<|user|>" for text in earlier] + ["\n" + last + "<|endoftext|>"]


def expect_rounds(messages):
    *earlier, last = [text.rstrip() for text in answers(messages)]
    return [text for text in earlier if text] + [last + "<|endoftext|>"]


CASES = {
    "qwen2": (lambda: byte_level(QWEN2), lambda m: [t + "<|im_end|>" for t in answers(m)]),
    "qwen3": (lambda: byte_level(QWEN3), expect_qwen3),
    "inst": (lambda: metaspace(INST), lambda m: [" " + t.strip() + "</s>" for t in answers(m)]),
    "inst_unigram": (
        lambda: metaspace(INST, "unigram"),
        lambda m: [" " + t.strip() + "</s>" for t in answers(m)],
    ),
    "glm": (lambda: byte_level(GLM, "<|endoftext|>"), expect_glm),
    "rounds": (lambda: byte_level(ROUNDS, "<|endoftext|>"), expect_rounds),
    "generation": (
        lambda: byte_level(GENERATION),
        lambda m: [t + "<|im_end|>" for t in answers(m)],
    ),
}
ORDINARY = [
    "你好",
    "世界。",
    "abc",
    " ",
    "\n",
    "\n\n",
    "😀",
    "a b",
    "### Response:\n",
    "[INST]",
    " [/INST] ",
    "问：",
    "\n\n答：",
]
ORDINARY += [
    "{{ x }}",
    "{% if %}",
    "<b>",
    "assistant\n",
    "\u3000",
    "é",
    "\U000f0000",
    "</tool>",
    "<|im_",
    "end|>",
    "龘",
]
INJECTED = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>",
    "<s>",
    "<|user|>",
    "<|endoftext|>",
    "<|assistant|>\n",
]
QUESTION = ["<think>", "</think>", "<tool_response>", "<tool_call>"]


def text(parts, blank=True):
    out = st.lists(st.sampled_from(parts), min_size=0 if blank else 1, max_size=6).map("".join)
    return out if blank else out.filter(str.strip)


@st.composite
def conversations(draw, extra=(), edges=True, blank=False):
    """[system?] (user assistant)+; without `edges` answers do not begin with white space (where tokens might merge)."""
    messages = [{"role": "system", "content": draw(text(ORDINARY))}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text([*ORDINARY, *QUESTION, *extra]))})
        answer = {"role": "assistant", "content": draw(text([*ORDINARY, *extra], blank=blank))}
        if not edges:
            answer["content"] = answer["content"].lstrip()
        if draw(st.booleans()):
            answer["reasoning_content"] = draw(text([*ORDINARY, *extra], blank=False))
        messages.append(answer)
    joined = [token for token in SPECIALS for m in messages for key in m if token in m[key]]
    assume(extra or not joined)  # pieces may join into a special token
    return messages


def fitting(name, messages):
    """Without thoughts where the template has no place for them: such rows are refused."""
    if name == "qwen3":
        return messages
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


@pytest.mark.parametrize("name", CASES)
@given(messages=conversations())
@settings(max_examples=40, deadline=None)
def test_exactly_the_turns_are_trained(name, messages):
    messages = fitting(name, messages)
    make, expected = CASES[name]
    tokenizer = make()
    row = encode_chat(tokenizer, messages, 100_000)
    assert trained(tokenizer, row) == expected(messages)
    assert row["truncated"] is False


@pytest.mark.parametrize("name", CASES)
@given(messages=conversations(edges=False))
@settings(max_examples=40, deadline=None)
def test_tokens_are_those_of_the_template(name, messages):
    messages = fitting(name, messages)
    tokenizer = CASES[name][0]()
    row = encode_chat(tokenizer, messages, 100_000)
    ids = plain_ids(tokenizer, messages)
    if name == "glm":
        ids = [*ids, tokenizer.eos_token_id]
    if name == "rounds":  # what the template writes after the last answer gives way to eos
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        rendered = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        assert tokenizer.decode(row["input_ids"][:-1]) == rendered
    else:
        assert row["input_ids"] == ids


@pytest.mark.parametrize(
    "name, thinking", [*((name, None) for name in CASES), ("qwen3", True), ("qwen3", False)]
)
@given(messages=conversations(extra=INJECTED))
@settings(max_examples=40, deadline=None)
def test_the_prompt_is_where_the_last_answer_starts(name, thinking, messages):
    kwargs = {} if thinking is None else {"enable_thinking": thinking}
    messages = fitting(name, messages)
    if thinking is False:
        messages[-1].pop("reasoning_content", None)  # with it, the row contradicts the switch
    tokenizer = CASES[name][0]()
    row = encode_chat(tokenizer, messages, 100_000, **kwargs)
    prompt = encode_prompt(tokenizer, messages[:-1], **kwargs)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt)] != IGNORE
    assert row["labels"][len(prompt) - 1] == IGNORE
    assert "prompt" not in str(row.get("notes"))


@pytest.mark.parametrize("name", CASES)
@given(messages=conversations(extra=INJECTED))
@settings(max_examples=40, deadline=None)
def test_special_tokens_in_texts_are_plain_text(name, messages):
    messages = fitting(name, messages)
    make, expected = CASES[name]
    tokenizer = make()
    row = encode_chat(tokenizer, messages, 100_000)
    harmless = [{k: v if k == "role" else defuse(v) for k, v in m.items()} for m in messages]
    reference = encode_chat(tokenizer, harmless, 100_000)
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(s) for s in SPECIALS
    }
    control = [i for i in row["input_ids"] if i in special and i != tokenizer.unk_token_id]
    assert control == [
        i for i in reference["input_ids"] if i in special and i != tokenizer.unk_token_id
    ]
    if not name.startswith("inst"):
        assert trained(tokenizer, row) == expected(messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert sum(i in special for i in prompt) <= len(control)


def defuse(text):
    for token in [*SPECIALS, "<s>", "</s>"]:
        text = text.replace(token, "*" * len(token))
    return text


@pytest.mark.parametrize("name", CASES)
@given(messages=conversations(extra=INJECTED), room=st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_truncation(name, messages, room):
    messages = fitting(name, messages)
    tokenizer = CASES[name][0]()
    full = encode_chat(tokenizer, messages, 100_000)
    row = encode_chat(tokenizer, messages, room)
    assert len(row["input_ids"]) == len(row["labels"]) <= room
    assert row["truncated"] is (len(full["input_ids"]) > room)
    assert any(label != IGNORE for label in row["labels"])
    if row["truncated"] and name != "rounds":  # the newest answer still ends as it should
        last = [label for label in full["labels"] if label != IGNORE][-1]
        assert [label for label in row["labels"] if label != IGNORE][-1] == last
    if not row["truncated"]:
        assert row == full


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "inst"])
@given(messages=conversations(blank=True), room=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_empty_answers_only_learn_to_end(name, messages, room):
    messages = fitting(name, messages)
    make, expected = CASES[name]
    assert trained(make(), encode_chat(make(), messages, 100_000)) == expected(messages)
    row = encode_chat(make(), messages, room)
    assert len(row["input_ids"]) <= room and any(label != IGNORE for label in row["labels"])


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def test_oldest_exchanges_go_first_and_the_system_stays():
    tokenizer = byte_level(QWEN2)
    head = [{"role": "system", "content": "规则"}]
    turns = [[user(f"问题{i}"), said(f"回答{i}")] for i in range(9)]
    newest = encode_chat(tokenizer, head + turns[7] + turns[8], 10_000)
    row = encode_chat(tokenizer, head + sum(turns, []), len(newest["input_ids"]) + 3)
    assert row == newest | {"truncated": True}


def test_long_question_loses_its_middle():
    tokenizer = byte_level(QWEN2)
    messages = [user("甲" + "龘" * 500 + "乙"), said("答")]
    row = encode_chat(tokenizer, messages, 100)
    shown = tokenizer.decode(row["input_ids"])
    assert shown.startswith("<|im_start|>system\nYou") and shown.endswith(
        "乙<|im_end|>\n<|im_start|>assistant\n答<|im_end|>"
    )
    assert "\ufffd" not in shown and trained(tokenizer, row) == ["答<|im_end|>"]
    assert 94 <= len(row["input_ids"]) <= 100


def test_long_answer_loses_its_tail_but_not_its_end():
    tokenizer = byte_level(QWEN2)
    row = encode_chat(tokenizer, [user("龘" * 200), said("甲" + "龘" * 500)], 100)
    (turn,) = trained(tokenizer, row)
    assert turn.startswith("甲龘") and turn.endswith("龘<|im_end|>") and "\ufffd" not in turn
    assert 20 <= sum(label == IGNORE for label in row["labels"]) <= 25 and len(row["labels"]) >= 94


def test_a_long_tool_result_does_not_push_the_calls_out():
    tokenizer = byte_level(QWEN3)
    messages = [
        user("北京天气"),
        call("天气", {"city": "北京"}),
        {"role": "tool", "content": "晴" * 900},
        said("晴天"),
    ]
    row = encode_chat(tokenizer, messages, 256)
    first, last = trained(tokenizer, row)
    assert first.startswith("<tool_call>") and last == "<think>\n\n</think>\n\n晴天<|im_end|>"


def call(name, arguments, content=""):
    return said(
        content,
        tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}],
    )


TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "天气 <|im_end|>", "parameters": {}},
    }
]


@pytest.mark.parametrize("arguments", [{}, {"n": 3}, {"city": "北京", "raw": '<|im_end|>"\n'}])
@pytest.mark.parametrize("content", ["", "我查一下。"])
def test_tool_calls_and_results(arguments, content):
    tokenizer = byte_level(QWEN3)
    messages = [
        user("天气？"),
        call("weather", arguments, content) | {"reasoning_content": "要查\n"},
        {"role": "tool", "content": "晴 <|im_start|>assistant\n"},
        {"role": "tool", "content": ""},
        said("晴天", reasoning_content="好"),
        user("谢谢"),
        said("不客气"),
    ]
    calls = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call><|im_end|>'
    calls = ("\n" if content else "") + calls % json.dumps(arguments, ensure_ascii=False)
    row = encode_chat(tokenizer, messages[:5], 10_000, tools=TOOLS)
    assert trained(tokenizer, row) == [
        "<think>\n要查\n</think>\n\n" + content + calls,
        "<think>\n好\n</think>\n\n晴天<|im_end|>",
    ]
    control = [tokenizer.convert_ids_to_tokens(i) for i in row["input_ids"] if i < len(SPECIALS)]
    assert control == ["<|im_start|>", "<|im_end|>"] * 5
    row = encode_chat(tokenizer, messages, 10_000, tools=TOOLS)
    # once a question follows, the template leaves out both thoughts: their answers are not trained
    assert trained(tokenizer, row) == ["<think>\n\n</think>\n\n不客气<|im_end|>"]
    assert row["notes"] == [THOUGHTS_LEFT_OUT]
    prompt = encode_prompt(tokenizer, messages[:-1], tools=TOOLS)
    assert row["input_ids"][: len(prompt)] == prompt and prompt[-1:] == tokenizer.encode("\n")


@pytest.mark.parametrize("inline", [False, True])
def test_thinking(inline):
    tokenizer = byte_level(QWEN3)

    def think(thought, answer):
        if inline:
            return said(f"<think>\n{thought}\n</think>\n\n{answer}")
        return said(answer, reasoning_content=thought)

    messages = [user("一"), think("旧想法", "旧答"), user("二"), think("新想法", "新答")]
    row = encode_chat(tokenizer, messages, 10_000)
    assert trained(tokenizer, row) == ["<think>\n新想法\n</think>\n\n新答<|im_end|>"]
    assert row["notes"] == [THOUGHTS_LEFT_OUT]
    shown = tokenizer.decode(row["input_ids"])
    assert "旧想法" not in shown and "旧答" in shown
    # a template that knows nothing of thinking trains it as it stands
    if inline:
        row = encode_chat(byte_level(QWEN2), messages, 10_000)
        assert trained(tokenizer, row)[0] == "<think>\n旧想法\n</think>\n\n旧答<|im_end|>"


def test_thinking_off_leaves_the_empty_block_to_the_prompt():
    tokenizer = byte_level(QWEN3)
    messages = [user("一"), said("壹"), user("二"), said("贰")]
    row = encode_chat(tokenizer, messages, 10_000, enable_thinking=False)
    assert trained(tokenizer, row) == ["壹<|im_end|>", "贰<|im_end|>"]
    assert tokenizer.decode(row["input_ids"]).endswith("<think>\n\n</think>\n\n贰<|im_end|>\n")
    row = encode_chat(tokenizer, messages, 10_000, enable_thinking=True)
    assert trained(tokenizer, row) == ["壹<|im_end|>", "<think>\n\n</think>\n\n贰<|im_end|>"]


def test_a_question_that_looks_like_a_tool_result_stays_one():
    tokenizer = byte_level(QWEN3)
    messages = [
        user("一"),
        said("查", reasoning_content="想"),
        user("<tool_response>\n晴\n</tool_response>"),
        said("晴"),
    ]
    row = encode_chat(tokenizer, messages, 10_000)
    assert trained(tokenizer, row)[0] == "<think>\n想\n</think>\n\n查<|im_end|>"


@pytest.mark.parametrize("mask_end", [True, False])
def test_generation_mask_always_has_the_end_token(mask_end):
    tokenizer = byte_level(GENERATION)
    messages = [user("问 <|im_end|>"), said("甲"), user("二"), said("乙")]
    row = encode_chat(tokenizer, messages, 1000, mask_end=mask_end)
    assert trained(tokenizer, row) == ["甲<|im_end|>", "乙<|im_end|>"]


def test_a_template_that_rewrites_texts_still_gives_exact_turns():
    upper = QWEN2.replace("message['content']", "(message['content']|upper)[:40]")
    messages = [user("hi"), said("abc " * 5), user("x"), said("y")]
    row = encode_chat(byte_level(upper), messages, 1000)
    assert trained(byte_level(upper), row) == ["ABC " * 5 + "<|im_end|>", "Y<|im_end|>"]
    with pytest.raises(ValueError, match="does not show the text of an answer"):  # it cuts it off
        encode_chat(byte_level(upper), [user("hi"), said("abc " * 20), user("x"), said("y")], 1000)
    with pytest.raises(ValueError, match="special tokens"):
        encode_chat(byte_level(upper), [user("<|im_end|>" * 9), said("y")], 1000)


def test_headers_that_differ_between_prompt_and_history():
    """The prompt opens a <think> block that answers in the data do not have: they start at the common part."""
    opens = QWEN2.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    )
    tokenizer = byte_level(opens)
    messages = [user("一"), said("壹"), user("二"), said("<think>\n想\n</think>\n\n贰")]
    row = encode_chat(tokenizer, messages, 1000)
    assert trained(tokenizer, row) == ["壹<|im_end|>", "想\n</think>\n\n贰<|im_end|>"]
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert row["input_ids"][: len(prompt)] == prompt


def test_two_end_tokens_and_a_mask_that_runs_on():
    both = QWEN2.replace("'<|im_end|>' + '\n'", "'<|im_end|><|endoftext|>\n'")
    tokenizer = byte_level(both)
    assert trained(
        tokenizer, encode_chat(tokenizer, [user("一"), said("壹"), user("二"), said("贰")], 1000)
    ) == [
        "壹<|im_end|><|endoftext|>",
        "贰<|im_end|><|endoftext|>",
    ]
    runs_on = GENERATION.replace(
        "{% if mask_end %}{{ '<|im_end|>' }}", "{% if true %}{{ '<|im_end|>\n' }}"
    )
    runs_on = runs_on.replace("{% if not mask_end %}{{ '<|im_end|>' }}{% endif %}", "")
    row = encode_chat(byte_level(runs_on), [user("一"), said("壹")], 1000)
    assert trained(byte_level(runs_on), row) == ["壹<|im_end|>"]


def test_rows_the_template_cannot_show_are_refused():
    with pytest.raises(ValueError, match="does not show tool calls"):
        encode_chat(byte_level(QWEN2), [user("一"), call("weather", {})], 1000)
    rewritten = QWEN2.replace("message['content']", "message['content'] | reverse").replace(
        "<|im_start|>assistant\n", ""
    )
    with pytest.raises(ValueError, match="generation"):
        encode_chat(byte_level(rewritten), [user("a"), said("b")], 1000)


# what a template has no place for -> how the row is refused
SYSTEM = {"role": "system", "content": "规则"}
RESULT = {"role": "tool", "content": "晴"}
NO_SYSTEM = QWEN2.replace(
    "{{- '<|im_start|>' + m", "{% if message.role != 'system' %}{{- '<|im_start|>' + m"
)
NO_SYSTEM = NO_SYSTEM.replace("+ '\n' }}{% endfor %}", "+ '\n' }}{% endif %}{% endfor %}")
NO_TOOL = NO_SYSTEM.replace("!= 'system'", "!= 'tool'")
LAST_TWO = QWEN2.replace("for message in messages", "for message in messages[-2:]")
NEVER_THINKS = QWEN2.replace("message['content']", "message['content'].split('</think>')[-1]")
NAMES_ONLY = QWEN3.replace("tool | tojson", "tool.function.name")
NO_ARGUMENTS = QWEN3.replace("call.arguments | tojson", "''")
SILENT = QWEN2.replace(
    "message['content']", "('' if message.role == 'assistant' else message.content)"
)
LEFT_OUT = {
    "system": (NO_SYSTEM, [SYSTEM, user("一"), said("壹")], None, "the system turn"),
    "result": (NO_TOOL, [user("一"), said("查"), RESULT, said("晴")], None, "a tool's result"),
    "question": (LAST_TWO, [user("一"), said("壹"), user("二"), said("贰")], None, "a user turn"),
    "answer": (SILENT, [user("一"), said("壹")], None, "the text of an answer"),
    "field": (QWEN2, [user("一"), said("壹", reasoning_content="想")], None, "the thought"),
    "tags": (NEVER_THINKS, [user("一"), said("<think>想</think>壹")], None, "the thought"),
    "tools": (QWEN2, [user("一"), said("壹")], TOOLS, "the definitions of tools"),
    "words": (NAMES_ONLY, [user("一"), said("壹")], TOOLS, "the definitions of tools"),
    "arguments": (NO_ARGUMENTS, [user("一"), call("f", {"城": "京"})], None, "the arguments"),
    "parts": (
        QWEN2.replace(
            "message['content']",
            "(message.content if message.content is string else message.content[0].text)",
        ),
        [user([{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]), said("壹")],
        None,
        "a user turn",
    ),
    "cut": (
        QWEN2.replace("message['content']", "message['content'][:2]"),
        [user("一二三"), said("壹")],
        None,
        "a user turn",
    ),
    "generation": (
        GENERATION.replace(
            "message['role'] == 'assistant' %}",
            "message['role'] == 'assistant' and message.content %}",
        ),
        [user("一"), said("壹", reasoning_content="想")],
        None,
        "the thought",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_row_of_which_the_template_drops_something_is_refused_with_its_reason(name):
    template, messages, tools, what = LEFT_OUT[name]
    with pytest.raises(ValueError, match=f"does not show {what}"):
        encode_chat(byte_level(template), messages, 1000, tools=tools)


def test_a_prompt_of_which_the_template_drops_something_is_refused_too():
    with pytest.raises(ValueError, match="does not show the system turn"):
        encode_prompt(byte_level(NO_SYSTEM), [SYSTEM, user("一")])
    with pytest.raises(ValueError, match="does not show the definitions of tools"):
        encode_prompt(byte_level(QWEN2), [user("一")], tools=TOOLS)
    # but not for the thoughts of earlier answers, which templates leave out of a history
    history = [user("一"), said("壹", reasoning_content="想"), user("二")]
    bare = [user("一"), said("壹"), user("二")]
    for template in (QWEN2, QWEN3):
        tokenizer = byte_level(template)
        assert encode_prompt(tokenizer, history) == encode_prompt(tokenizer, bare)


def test_names_of_turns_that_a_template_leaves_out_are_told():
    messages = [user("一") | {"name": "小明"}, said("壹")]
    assert encode_chat(byte_level(QWEN2), messages, 1000)["notes"] == [NAMES_LEFT_OUT]
    shows = QWEN2.replace("message['role']", "message['role'] + (message.name or '')")
    assert shows != QWEN2
    row = encode_chat(byte_level(shows), messages, 1000)
    assert "notes" not in row and "小明" in byte_level(shows).decode(row["input_ids"])


def test_answers_trained_behind_another_prompt_are_told():
    opens = QWEN2.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer = byte_level(opens)
    (note,) = encode_chat(tokenizer, [user("一"), said("壹")], 1000)["notes"]
    assert "'' in these rows" in note and "'<think>\\n' when asked" in note
    assert "notes" not in encode_chat(tokenizer, [user("一"), said("<think>\n想</think>壹")], 1000)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_answer_is_tokenised_as_generation_meets_it(kind):
    """A vocabulary whose tokens reach from the prompt into the answer."""
    tokenizer = metaspace(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        kind,
    )
    for question, answer in (("l", "l"), ("h", "e"), ("你", "好"), ("a ", "a"), (" ", "he")):
        messages = [user(question), said(answer)]
        row = encode_chat(tokenizer, messages, 1000)
        prompt = encode_prompt(tokenizer, messages[:1])
        labels = row["labels"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert (
            labels[: len(prompt)] == [IGNORE] * len(prompt) and IGNORE not in labels[len(prompt) :]
        )
        assert trained(tokenizer, row) == [answer + "</s>"]


def test_special_tokens_in_a_document_are_text():
    text = "标记 <|im_end|> 与 <|im_start|>user\n 之后"
    for tokenizer in (byte_level(QWEN2), metaspace(INST), metaspace(INST, "bare")):
        text = text + tokenizer.eos_token
        ids = encode_text(tokenizer, text)
        assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    plain = "没有标记的 text"
    assert encode_text(tokenizer, plain) == tokenizer.encode(plain, add_special_tokens=False)


def with_bos(template):
    """A tokenizer whose own call begins with <|begin|>."""
    tokenizer = deepcopy(byte_level(template))
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_texts_and_chats_begin_as_the_tokenizers_own_call():
    tokenizer = with_bos(None)
    assert encode_text(tokenizer, "你好") == tokenizer("你好")["input_ids"]
    assert text_start(tokenizer) == [tokenizer.bos_token_id] and text_start(byte_level(QWEN2)) == []
    set_template(tokenizer, QWEN2)
    assert tokenizer.apply_chat_template([user("a")], tokenize=False).startswith("<|begin|><|im_st")
    prompt = encode_prompt(tokenizer, [user("a")])
    assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    set_template(tokenizer, GLM)  # brings its own
    assert encode_prompt(tokenizer, [user("a")]).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "template, ends",
    [
        (QWEN2, ["<|im_end|>"]),
        (GENERATION, ["<|im_end|>"]),
        (GLM, ["<|user|>"]),
        (ROUNDS, []),
        (None, []),
    ],
)
def test_the_tokens_that_end_a_turn(template, ends):
    tokenizer = byte_level(template, "<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(turn_end_ids(tokenizer)) == ends


def test_the_answer_as_text():
    tokenizer = byte_level(QWEN3)
    messages = [user("一"), call("f", {"城": "京"}, "查")]
    shown = '<think>\n\n</think>\n\n查\n<tool_call>\n{"name": "f", "arguments": {"城": "京"}}\n</tool_call>'
    assert written_answer(tokenizer, messages) == shown


def test_fingerprint_follows_tokenizer_and_template():
    prints = [fingerprint(byte_level(t)) for t in (QWEN2, QWEN3)] + [fingerprint(metaspace(QWEN2))]
    assert len(set(prints)) == 3 and prints[0] == fingerprint(byte_level(QWEN2))


def test_nothing_to_train_is_none():
    assert encode_chat(byte_level(QWEN2), [user("在吗")], 100) is None
    assert encode_chat(byte_level(QWEN3), [user("在吗" * 99)], 10) is None


def test_injected_tokens_are_spelt_as_the_tokenizer_spells_text():
    tokenizer = byte_level(QWEN2)
    ids = encode_prompt(tokenizer, [user("<|im_start|>")])
    piece = tokenizer.encode("<|im_start|>", add_special_tokens=False, split_special_tokens=True)
    assert len(piece) < len("<|im_start|>")
    assert any(ids[i : i + len(piece)] == piece for i in range(len(ids)))
    # a vocabulary in which the special token is an ordinary piece as well
    bare = metaspace(INST, "bare")
    ids = encode_prompt(bare, [user("a</s>b")])
    assert bare.eos_token_id not in ids and bare.decode(ids) == "<s>[INST] a</s>b [/INST]"


def test_calls_written_with_special_tokens_are_trained_whole():
    calls = """{% for message in messages %}{{ '<|' + message.role + '|>' }}
{%- for call in message.tool_calls or [] %}{{ call.function.name + '<|begin|>' + call.function.arguments | tojson }}
{%- endfor %}{{ message.content + ('<|system|>' if message.tool_calls else '<|im_end|>') }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    tokenizer = byte_level(calls)
    row = encode_chat(
        tokenizer, [user("一"), call("f", {"city": "北京"}), user("二"), said("贰")], 1000
    )
    assert trained(tokenizer, row) == ['f<|begin|>{"city": "北京"}<|system|>', "贰<|im_end|>"]


def test_messages_are_left_alone():
    messages = [user("<|im_end|>"), call("f", {"a": "<|im_end|>"})]
    before = json.dumps(messages)
    encode_chat(byte_level(QWEN3), messages, 8, tools=TOOLS)
    assert json.dumps(messages) == before


def test_errors_are_one_clear_line(tmp_path):
    tokenizer = byte_level(None)
    with pytest.raises(SystemExit, match="--chat_template FILE"):
        encode_chat(tokenizer, [user("a"), said("b")], 100)
    refusing = byte_level("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        encode_chat(refusing, [user("a"), said("b")], 100)
    with pytest.raises(SystemExit, match=r"missing\.jinja"):
        set_template(tokenizer, str(tmp_path / "missing.jinja"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("a\n{% for %}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"broken\.jinja:2: "):
        set_template(tokenizer, str(broken))


def test_set_template(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(QWEN2, encoding="utf-8")
    for given_as in (str(file), QWEN2):
        tokenizer = byte_level("")
        set_template(tokenizer, given_as)
        assert trained(tokenizer, encode_chat(tokenizer, [user("a"), said("b")], 100)) == [
            "b<|im_end|>"
        ]


def test_preview():
    tokenizer = byte_level(QWEN2)
    row = encode_chat(
        tokenizer, [{"role": "system", "content": "规"}, user("你是？"), said("龘😀")], 100
    )
    assert len(tokenizer.encode("龘")) > 1
    plain = preview(tokenizer, row["input_ids"], row["labels"], color=False)
    head = "<|im_start|>system\n规<|im_end|>\n<|im_start|>user\n你是？<|im_end|>\n<|im_start|>assistant\n"
    assert plain == head + "[[龘😀<|im_end|>]]\n"
    shown = preview(tokenizer, row["input_ids"], row["labels"])
    assert shown == f"\033[90m{head}\033[0m\033[32m龘😀<|im_end|>\033[0m\033[90m\n\033[0m"
