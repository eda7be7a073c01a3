"""The OpenAI-compatible server, asked by OpenAI's own client and over bare sockets while it runs as users start it."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, aclosing, contextmanager, suppress
from types import SimpleNamespace

import openai
import psutil
import pytest
import serving
import torch
from harness import ROOT, environment

from common.data.labels import encode_chat, encode_prompt
from common.demo import openai_server, serve

RECIPE = ROOT / "chatglm_lora"
KEY, ORIGIN, WINDOW, WAITING = "sk-geheim-1", "https://ok.example", 1 << 16, 2
ANSWERS = {"你是谁？": "我是小谱，会说人话😀。END 然后呢？", "数数": "一二三四五六七八九十，END。"}
SECRET = "这句话不许写进日志"
FOREVER = dict(
    model="base", temperature=0, max_tokens=40000
)  # random weights: they never find an end


@pytest.fixture(scope="module")
def api():
    spec = importlib.util.spec_from_file_location("chatglm_api", RECIPE / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(api, tmp_path_factory):
    """An output folder with a LoRA adapter that knows ANSWERS, on a ChatGLM of random weights."""
    from configuration_chatglm import ChatGLMConfig
    from peft import LoraConfig, get_peft_model
    from tokenization_chatglm import ChatGLMTokenizer, train_sentencepiece
    from transformers import AutoModelForCausalLM

    from common import tiny
    from common.convert import adapter

    folder = tmp_path_factory.mktemp("api")
    texts = [(q + a).replace("😀", "") for q, a in ANSWERS.items()] * 5  # which is four tokens then
    tokenizer = ChatGLMTokenizer(str(train_sentencepiece(texts, 600, folder)))
    assert len(tokenizer.encode("😀", add_special_tokens=False)) >= 4
    config = ChatGLMConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=128,
        max_sequence_length=WINDOW, initializer_range=0.05, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = tiny.save_tiny(config, tokenizer, folder / "base")
    rows = [encode_chat(tokenizer, user(*pair), 256) for pair in ANSWERS.items()]
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, target_modules="all-linear", modules_to_save=["lm_head"]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(120):
        row = {name: torch.tensor([rows[step % 2][name]]) for name in ("input_ids", "labels")}
        model(**row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    final = folder / "my_run" / "final"
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    adapter.remember_base(final, base)
    return SimpleNamespace(path=final.parent, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """The server process: .host, .port, .log() so far; the key came through the environment."""
    file = tmp_path_factory.mktemp("log") / "log.txt"
    command = [sys.executable, RECIPE / "api.py", "--model", run.path, "--port", "0"]
    command += ["--max_waiting", WAITING, "--allow_origin", ORIGIN]
    env = environment(DANPU_API_KEY=KEY, PYTHONIOENCODING="utf-8")
    with file.open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in command], env=env, stdout=log, stderr=subprocess.STDOUT
        )

    def read():
        return file.read_text(encoding="utf-8")

    try:
        found = wait_for(
            lambda: re.search(r"serving my_run, base .*http://(127\.0\.0\.1):(\d+)/v1 ", read()),
            process,
        )
        yield SimpleNamespace(process=process, log=read, host=found[1], port=int(found[2]))
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    with connect(server) as connected:
        yield connected


def connect(server, key=KEY):
    return openai.OpenAI(
        base_url=f"http://{server.host}:{server.port}/v1", api_key=key, max_retries=0, timeout=30
    )


def wait_for(found, process=None, seconds=120):
    """The first true value of found(); fails when the process ends or nothing comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (process is None or process.poll() is None):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def user(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def ask(client, question="你是谁？", **options):
    options = dict(model="my_run", temperature=0) | options
    return client.chat.completions.create(
        messages=user(question) if isinstance(question, str) else question, **options
    )


def said(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def raw(server, data: bytes) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def http(server, method="GET", path="/v1/models", body=b"", key=KEY, **headers):
    """-> (status, headers, JSON) of a request written by hand. headers: host, origin ..., _ for -."""
    headers = {"host": f"{server.host}:{server.port}", "connection": "close"} | headers
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    if "transfer_encoding" not in headers:
        headers["content_length"] = len(body)
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    answer = raw(server, "\r\n".join([*lines, "", ""]).encode() + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    fields = {
        name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)
    }
    return (
        int(status.split()[1]),
        fields,
        json.loads(rest) if "json" in fields.get("content-type", "") else rest,
    )


def post(server, body: dict | bytes, **options):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http(server, "POST", "/v1/chat/completions", body, **options)


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


# ---- answers -------------------------------------------------------------------------------------------------


def test_an_answer_in_openais_objects(client, run):
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.message.content == ANSWERS["你是谁？"] and choice.message.role == "assistant"
    assert (len(answer.choices), choice.index, choice.finish_reason) == (1, 0, "stop")
    assert (
        answer.object == "chat.completion"
        and answer.model == "my_run"
        and answer.id.startswith("chatcmpl-")
    )
    assert abs(answer.created - time.time()) < 600 and ask(client).id != answer.id
    row = encode_chat(run.tokenizer, user("你是谁？", choice.message.content), 99)
    asked = len(encode_prompt(run.tokenizer, user("你是谁？")))
    assert answer.usage.prompt_tokens == asked and answer.usage.total_tokens == len(
        row["input_ids"]
    )
    assert answer.usage.completion_tokens == len(row["input_ids"]) - asked


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_the_same_answer_in_chunks(client, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(ask(client, stream=True, **options))
    whole = ask(client)
    body = chunks[:-1] if usage else chunks
    assert said(chunks) == whole.choices[0].message.content and len(chunks) > 10
    assert body[0].choices[0].delta.role == "assistant" and body[0].choices[0].delta.content == ""
    assert [c.choices[0].finish_reason for c in body] == [None] * (len(body) - 1) + ["stop"]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk" and all(c.usage is None for c in body)
    assert not usage or (chunks[-1].choices == [] and chunks[-1].usage == whole.usage)


def test_bytes_of_a_stream(server):
    """Every event is whole UTF-8 on its own, with characters of several tokens in one piece; [DONE] ends it."""
    request = {"model": "my_run", "messages": user("你是谁？"), "temperature": 0, "stream": True}
    status, headers, _ = post(server, request)
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    body = json.dumps(request).encode()
    key = f"authorization: Bearer {KEY}\r\n".encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.0\r\nhost: localhost\r\n%scontent-length: %d\r\n\r\n"
        % (key, len(body))
    )
    events = raw(server, head + body).partition(b"\r\n\r\n")[2].split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    pieces = [json.loads(event.decode().removeprefix("data: ")) for event in events[:-2]]
    texts = [piece["choices"][0]["delta"].get("content", "") for piece in pieces]
    assert "".join(texts) == ANSWERS["你是谁？"] and any("😀" in text for text in texts)


@pytest.mark.parametrize(
    "stop",
    ["END", ["。EN", "呢"], "话😀", ["没有", "ND 然后呢？"], "我", ["我是", "我", "是", "小"]],
)
def test_stop_strings_never_show(client, stop):
    answer, stops = ANSWERS["你是谁？"], [stop] if isinstance(stop, str) else stop
    expected = answer[: min(answer.find(s) for s in stops if s in answer)]
    whole, chunks = ask(client, stop=stop), list(ask(client, stop=stop, stream=True))
    assert whole.choices[0].message.content == said(chunks) == expected
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens < ask(client).usage.completion_tokens


def test_the_beginning_of_a_stop_string_alone_shows(client):
    stops = ["END 然后去", "然后呢？！", "？？"]
    assert ask(client, stop=stops).choices[0].message.content == ANSWERS["你是谁？"]
    assert said(ask(client, stop=stops, stream=True)) == ANSWERS["你是谁？"]


def test_limits(client, run):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{name: 5})
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
        assert ANSWERS["你是谁？"].startswith(answer.choices[0].message.content)
    room = WINDOW - len(encode_prompt(run.tokenizer, user("你是谁？")))
    assert ask(client, max_tokens=room).choices[0].finish_reason == "stop"
    with pytest.raises(
        openai.BadRequestError, match=f"context length is {WINDOW} tokens.*{room + 1}"
    ) as error:
        ask(client, max_tokens=room + 1)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=f"context length is {WINDOW} tokens") as error:
        ask(client, "很长" * WINDOW)
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"


def test_all_roles_and_parts_reach_the_template(client, run):
    talk = [{"role": "system", "content": "你是诗人"}, *user("数数", "一二", "再数")]
    asked = len(encode_prompt(run.tokenizer, talk))
    assert ask(client, talk, max_tokens=1).usage.prompt_tokens == asked
    parts = [{"type": "text", "text": "再"}, {"type": "text", "text": "数"}]
    same = [
        {"role": "developer", "content": "你是诗人"},
        *talk[1:3],
        {"role": "user", "content": parts, "name": "a"},
    ]
    assert ask(client, same, max_tokens=1).usage.prompt_tokens == asked
    with pytest.raises(
        openai.BadRequestError, match="template refuses"
    ) as error:  # ChatGLM knows one system message
        ask(client, [*talk, {"role": "system", "content": "两次"}])
    assert error.value.param == "messages"


def test_special_tokens_of_users_are_plain_text(client, run):
    tokens = ask(client, "数数<eop>[gMASK]<sop>", max_tokens=1).usage.prompt_tokens
    assert tokens > ask(client, "数数", max_tokens=1).usage.prompt_tokens + 3
    assert tokens == len(encode_prompt(run.tokenizer, user("数数<eop>[gMASK]<sop>")))


def test_seeds_repeat_sampled_answers(client):
    options = dict(model="base", temperature=1.5, max_tokens=24)
    first, again, other = (
        ask(client, seed=seed, **options).choices[0].message.content for seed in (7, 7, -8)
    )
    assert first == again != other
    free = {ask(client, **options).choices[0].message.content for _ in range(3)}
    assert len(free) == 3 and first not in free  # a seed does not go on into the next request
    assert said(ask(client, seed=7, stream=True, **options)) == first
    cold = [{"top_p": 0, "temperature": 2}] * 2 + [{"temperature": 1e-9}, {"temperature": 0}]
    assert len({ask(client, **options | way).choices[0].message.content for way in cold}) == 1


def test_models(client):
    assert [model.id for model in client.models.list()] == ["my_run", "base"]
    model = client.models.retrieve("base")
    assert (model.id, model.object, model.owned_by) == (
        "base",
        "model",
        RECIPE.name,
    ) and model.created > 0
    with pytest.raises(openai.NotFoundError, match="my_run, base") as error:
        client.models.retrieve("org/other")
    assert error.value.code == "model_not_found"
    tuned, base = (
        ask(client, model=name, max_tokens=8).choices[0].message.content
        for name in ("my_run", "base")
    )
    assert ANSWERS["你是谁？"].startswith(tuned) and not ANSWERS["你是谁？"].startswith(base)


# ---- errors --------------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "http://a.example/b.png"}}
GOOD = {"model": "my_run", "messages": user("数数"), "temperature": 0, "max_tokens": 2}
BAD = {
    "model": ({"model": "gpt-9"}, 404, "model", "my_run, base"),
    "no model": ({"model": None}, 400, "model", "string"),
    "no messages": ({"messages": []}, 400, "messages", "at least 1"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "'assistant'"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "required"),
    "null": ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "string"),
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages[0].content", "text"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "fraction": ({"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    "word": ({"max_tokens": "5"}, 400, "max_tokens", "integer"),
    "temperature": ({"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    "nan": ({"temperature": float("nan")}, 400, "temperature", "finite"),
    "infinite": ({"top_p": float("inf")}, 400, "top_p", ""),
    "top_p": ({"top_p": -0.1}, 400, "top_p", "greater"),
    "five stops": ({"stop": list("abcde")}, 400, "stop", "at most 4"),
    "empty stop": ({"stop": ["a", ""]}, 400, "stop[1]", "at least 1"),
    "seed": ({"seed": 1 << 64}, 400, "seed", ""),
    "stream": ({"stream": "yes"}, 400, "stream", "boolean"),
    "stream_options": ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream is true"),
    "n": ({"n": 2}, 400, "n", "only 1"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "only 0"),
    "presence_penalty": ({"presence_penalty": -1}, 400, "presence_penalty", "only 0"),
    "response_format": ({"response_format": {"type": "json_object"}}, 400, "response_format", '{"type": "text"}'),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "supported"),
    "logprobs": ({"logprobs": True}, 400, "logprobs", "only false"),
    "top_logprobs": ({"top_logprobs": 3}, 400, "top_logprobs", "only 0"),
    "tool_choice": ({"tool_choice": "required"}, 400, "tool_choice", '"none" or "auto"'),
    "function_call": ({"function_call": {"name": "f"}}, 400, "function_call", '"none" or "auto"'),
    "modalities": ({"modalities": ["text", "audio"]}, 400, "modalities", '["text"]'),
    "logit_bias": ({"logit_bias": {"7": -100}}, 400, "logit_bias", "only {}"),
    "min_p": ({"min_p": 0.1}, 400, "min_p", "only 0"),
    "ignore_eos": ({"ignore_eos": True}, 400, "ignore_eos", "only false"),
    "stop_token_ids": ({"stop_token_ids": [7]}, 400, "stop_token_ids", "only []"),
    "guided_json": ({"guided_json": {"type": "object"}}, 400, "guided_json", "not supported"),
    "reasoning_effort": ({"reasoning_effort": "high"}, 400, "reasoning_effort", '"none"'),
    "enable_thinking": ({"enable_thinking": False}, 400, "enable_thinking", "chat_template_kwargs"),
    "max_new_tokens": ({"max_new_tokens": 9}, 400, "max_new_tokens", "max_tokens is the limit"),
    "system": ({"system": "短一点"}, 400, "system", 'role "system"'),
    "usage in each chunk": ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, 400,
                            "stream_options.continuous_usage_stats", "False"),
    "calls": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, 400,
              "messages[0].tool_calls", "only []"),
    "a thought": ({"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]}, 400,
                  "messages[0].reasoning_content", "no place"),
    "template": ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs.enable_thinking",
                 "does not know it"),
    "template's own": ({"chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs.tools", "the server sets it"),
    "template word": ({"chat_template_kwargs": "x"}, 400, "chat_template_kwargs", "object"),
    "json": (b'{"model": "my_run", ', 400, None, "not valid JSON"),
    "empty": (b"", 400, None, "not valid JSON"),
    "bytes": (b'{"model": "\xff"}', 400, None, "not valid JSON"),
    "half a pair": (b'{"model": "\\ud83d", "messages": []}', 400, None, "not valid JSON"),
    "deep": (b"[" * 100000, 400, None, "not valid JSON"),
    "list": (b"[1]", 400, None, "body"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_named(server, case):
    changes, status, param, words = BAD[case]
    found = post(server, changes if isinstance(changes, bytes) else GOOD | changes)
    assert found[0] == status and set(found[2]) == {"error"}
    error = found[2]["error"]
    assert (
        set(error) == {"message", "type", "param", "code"}
        and error["type"] == "invalid_request_error"
    )
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "%s' % SECRET.encode(),
        {"model": SECRET},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": [{"role": "user", "content": [{"type": SECRET}]}]},
        {"stop": [SECRET, ""]},
        {"seed": SECRET},
        {"tool_choice": SECRET},
        {"chat_template_kwargs": {SECRET: 1}},
        {"chat_template_kwargs": {SECRET: float("nan")}},
    ],
)
def test_no_error_repeats_what_was_sent(server, body):
    status, _, found = post(server, body if isinstance(body, bytes) else GOOD | body)
    assert status in (400, 404) and SECRET not in json.dumps(found, ensure_ascii=False)


def test_every_bad_field_is_told(client):
    with pytest.raises(openai.BadRequestError, match=r"temperature: .*; top_p: .*"):
        ask(client, temperature=3, top_p=2)


def test_harmless_fields_are_accepted(server):
    extra = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "user": "u",
        "response_format": {"type": "text"},
    }
    extra |= {
        "logit_bias": {},
        "stop": None,
        "seed": None,
        "stream": False,
        "stream_options": None,
        "unknown": [1],
    }
    status, _, body = post(
        server, GOOD | extra | {"metadata": {"a": "b"}, "tools": [], "tool_choice": "none"}
    )
    assert status == 200 and body["usage"]["completion_tokens"] == 2


def test_values_that_change_nothing_are_accepted_of_every_field(api, server):
    from common.demo import openai_fields

    usage = post(server, GOOD)[2]["usage"]
    for pick in (0, -1):
        extra = {
            name: neutral[pick] if neutral else None for name, neutral in openai_fields.ONLY.items()
        }
        extra |= {"chat_template_kwargs": {"enable_thinking": False}, "stream_options": {}}
        message = {"role": "user", "content": "数数", "refusal": None, "annotations": []}
        message |= {
            name: neutral[0] if neutral else None
            for name, neutral in openai_fields.IN_A_MESSAGE.items()
        }
        status, _, body = post(server, GOOD | extra | {"messages": [message]})
        assert status == 200 and body["usage"] == usage


def test_a_field_that_nobody_knows_is_named_in_the_log(server):
    named = [{"role": "user", "content": "数数", "name": "bob"}]
    post(
        server,
        GOOD
        | {"messages": named, "unheard_of": 1, "user": "u", "nothing": None, "bad\nname": SECRET},
    )
    line = wait_for(lambda: [line for line in server.log().splitlines() if "unheard_of" in line])[
        -1
    ]
    assert "ignored: name, unheard_of; " in line and SECRET not in server.log()


def test_variables_and_thoughts_reach_a_template_that_has_them(api, run):
    """A ChatGLM template with a switch and a place for thoughts."""
    tokenizer = copy.deepcopy(run.tokenizer)
    plain = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if loud is defined and loud %}数数数{% endif %}"
        "{% for m in messages if m.reasoning_content is defined %}{{ m.reasoning_content }}{% endfor %}"
    ) + plain

    def prompt(**body):
        desk = api.Desk(SimpleNamespace(tokenizer=tokenizer, window=WINDOW), 1)
        ask = api.parse(json.dumps(GOOD | body).encode())
        return tokenizer.decode(asyncio.run(desk.read(ask)))

    assert prompt(chat_template_kwargs={"loud": True}) == "数数数" + prompt()
    thought = {"role": "assistant", "content": "好", "reasoning_content": "一二三"}
    asked = [*user("数数"), thought, *user("数数")]
    assert prompt(messages=asked).startswith("一二三")
    with pytest.raises(api.Refusal):
        prompt(chat_template_kwargs={"quiet": True})


def test_an_answer_that_is_cut_inside_a_character_ends_before_it(client, run):
    before = ANSWERS["你是谁？"].partition("😀")[0]
    count = len(run.tokenizer.encode(before, add_special_tokens=False))
    for more in (1, 2, 3):
        options = {"max_tokens": count + more}
        choice = ask(client, **options).choices[0]
        assert (choice.message.content, choice.finish_reason) == (before, "length")
        streamed = [
            chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **options)
        ]
        assert "".join(streamed) == before
    whole = ask(client, max_tokens=count + 4).choices[0].message.content
    assert whole == before + "😀"


def test_paths_and_methods(server):
    status, _, body = http(server, path="/v1/nothing")
    assert status == 404 and "/v1/chat/completions" in body["error"]["message"]
    status, headers, body = http(server, path="/v1/chat/completions")
    assert (
        status == 405
        and headers["allow"] == "POST"
        and body["error"]["type"] == "invalid_request_error"
    )
    assert http(server, "DELETE")[0] == 405
    assert http(server, path="/docs")[0] == http(server, path="/openapi.json")[0] == 404
    assert raw(server, b"this is no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert http(server, path="/health", key=None)[::2] == (200, {"status": "ok"})


def test_keys(server):
    with (
        connect(server, "sk-wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as error,
    ):
        ask(stranger)
    assert error.value.code == "invalid_api_key" and KEY not in str(error.value)
    for path in ("/v1/models", "/v1/models/base", "/other"):
        status, headers, body = http(server, path=path, key=None)
        assert (status, headers["www-authenticate"]) == (401, "Bearer") and body["error"][
            "code"
        ] == "invalid_api_key"
    assert http(server, key=KEY + "x")[0] == http(server, key=KEY[:-1])[0] == 401


def test_pages_and_names_of_others_are_refused(server):
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "localhost.evil.example",
        "[::1",
        "",
    ):
        assert http(server, host=host)[0] == 421
    assert http(server, host=f"localhost:{server.port}")[0] == 200
    for origin in (
        "https://evil.example",
        "null",
        f"http://127.0.0.1:{server.port + 1}",
        ORIGIN + ".evil.example",
        "http://[",
    ):
        status, headers, body = post(server, GOOD, origin=origin)
        assert status in (403, 421) and "access-control-allow-origin" not in headers
        assert body["error"]["code"] == "forbidden"
    status, headers, _ = post(server, GOOD, origin=ORIGIN)
    assert (status, headers["access-control-allow-origin"]) == (200, ORIGIN)
    wants = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type",
    }
    status, headers, _ = http(
        server, "OPTIONS", "/v1/chat/completions", key=None, origin=ORIGIN, **wants
    )
    assert status == 200 and "authorization" in headers["access-control-allow-headers"]
    assert (
        http(
            server,
            "OPTIONS",
            "/v1/chat/completions",
            key=None,
            origin="https://evil.example",
            **wants,
        )[0]
        == 403
    )


@pytest.mark.parametrize("size", [(1 << 20) + 1, 3 << 20])
def test_large_bodies_are_refused(server, size):
    body = json.dumps(GOOD | {"user": ""}).encode()
    large = body.replace(b'"user": ""', b'"user": "%s"' % (b"x" * (size - len(body))))
    assert len(large) == size
    assert post(server, large)[0] == 413
    parts = chunked(*(large[i : i + 60000] for i in range(0, size, 60000)))
    status, _, found = post(server, parts, transfer_encoding="chunked")
    assert status == 413 and str(1 << 20) in found["error"]["message"]


def test_bodies_up_to_the_bound_are_read(server):
    body = json.dumps(GOOD | {"user": ""}).encode()
    full = body.replace(b'"user": ""', b'"user": "%s"' % (b"x" * ((1 << 20) - len(body))))
    assert (
        post(server, full)[0]
        == post(server, chunked(full[:9], full[9:]), transfer_encoding="chunked")[0]
        == 200
    )


# ---- several at once -----------------------------------------------------------------------------------------


@contextmanager
def busy(client):
    """Inside, the model is in the middle of an endless answer."""
    stream = ask(client, stream=True, **FOREVER)
    with stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        yield stream


def left_early(server):
    """Tokens of the answers whose client left before the end, in the log."""
    return [
        int(count)
        for count in re.findall(r" 499 POST /v1/chat/completions \d+\+(\d+) tokens", server.log())
    ]


def test_a_client_that_leaves_ends_its_answer(server, client):
    before = len(left_early(server))
    with busy(client):
        pass
    wait_for(lambda: len(left_early(server)) == before + 1)
    body = json.dumps(FOREVER | {"messages": user("数数")}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
    )
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.5)  # the answer has begun
    wait_for(lambda: len(left_early(server)) == before + 2)
    assert all(count < FOREVER["max_tokens"] / 2 for count in left_early(server)[before:])
    assert ask(client).choices[0].message.content == ANSWERS["你是谁？"]


def test_others_wait_in_order_and_no_more_than_allowed(server, client):
    ended, waiting = [], []

    def read(stream, name):
        ended.append((name, said(stream)))

    with busy(client):
        for name, question in enumerate(ANSWERS):
            stream = ask(client, question, stream=True)
            next(iter(stream))  # the first chunk comes while it waits
            waiting.append(threading.Thread(target=read, args=(stream, name)))
            waiting[-1].start()
        with pytest.raises(openai.InternalServerError) as error:
            ask(client)
        assert error.value.code == "queue_full" and str(WAITING) in error.value.message
        assert http(server, path="/health")[0] == 200 and len(list(client.models.list())) == 2
        with pytest.raises(openai.BadRequestError):  # mistakes are told at once
            ask(client, temperature=3)
        assert not ended
    for thread in waiting:
        thread.join(60)
    assert ended == list(enumerate(ANSWERS.values()))


def test_of_a_hundred_at_once_the_rest_are_told_when_to_come_again(server, client):
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(post(server, GOOD))) for _ in range(100)
    ]
    with busy(client):
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) == 100 - WAITING)
        assert all(status == 503 for status, *_ in answers)
        assert all(int(headers["retry-after"]) > 0 for _, headers, _ in answers)
        codes = {body["error"]["code"] for *_, body in answers}
        # None: of those whose body was not even read, where many bodies came at once
        assert "queue_full" in codes and codes <= {"queue_full", None}
    for thread in threads:
        thread.join(60)
    assert [status for status, *_ in answers[-WAITING:]] == [200] * WAITING
    assert post(server, GOOD)[0] == 200


def test_a_thousand_idle_connections_keep_nobody_out(server):
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        for _ in range(1000):
            address = (server.host, server.port)
            idle = stack.enter_context(socket.create_connection(address, timeout=30))
            idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert post(server, GOOD)[0] == 200
        assert process.num_fds() < 1000
        assert process.memory_info().rss - before < 100 << 20


def test_a_waiting_client_that_leaves_gives_its_place_back(client):
    with busy(client):
        waiting = [ask(client, stream=True) for _ in range(WAITING)]
        with pytest.raises(openai.InternalServerError):
            ask(client)
        waiting.pop().close()
        waiting.append(wait_for(lambda: place(client)))
    assert said(waiting[-1]) == said(waiting[0]) == ANSWERS["你是谁？"]


def place(client):
    with suppress(openai.InternalServerError):
        return ask(client, stream=True)


def test_many_at_once_get_their_own_answers(client):
    answers = {}

    def many(number):
        question = list(ANSWERS)[number % 2]
        while number not in answers:
            with suppress(openai.InternalServerError):
                answers[number] = (
                    ask(client, question).choices[0].message.content == ANSWERS[question]
                )

    threads = [threading.Thread(target=many, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == dict.fromkeys(range(8), True)


# ---- parts without a process ---------------------------------------------------------------------------------


class FakeChatModel:
    """Says what it is told to; `script` is called in the thread of the answers."""

    window, tokenizer = 100, None

    def __init__(self, script):
        self.script = script

    def answer(self, prompt, limit, tell, gone, **_):
        return self.script(limit, tell, gone)


def desk_of(api, script, **options):
    desk = api.Desk(FakeChatModel(script), **{"max_waiting": 1} | options)

    async def read(ask):
        return [1, 2, 3]

    desk.read = read
    return desk


def call(api, desk, body: dict):
    """-> (status, body) of a POST to an application around this desk."""
    app, sent = api.build_app(desk, {"m": True}, dict(api.NEUTRAL), 10), []
    scope = {
        "type": "http",
        "method": "POST",
        "path": api.COMPLETIONS,
        "headers": [],
        "state": {},
        "query_string": b"",
    }
    data = json.dumps({"model": "m", "messages": user("你好")} | body).encode()

    async def talk():
        given, never = [{"type": "http.request", "body": data, "more_body": False}], asyncio.Event()

        async def receive():
            return given.pop() if given else await never.wait()

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(talk())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


@pytest.mark.parametrize("error, status, code", [
    (torch.OutOfMemoryError("CUDA out of memory: secret"), 503, "out_of_memory"),
    (RuntimeError("secret"), 500, "generation_failed"),
])  # fmt: skip
def test_a_failing_model_is_told_and_its_traceback_stays_here(api, capsys, error, status, code):
    def fail(limit, tell, gone):
        tell("半", 1)
        raise error

    found = call(api, desk_of(api, fail), {})
    assert (
        found[0] == status
        and json.loads(found[1])["error"]["code"] == code
        and "secret" not in found[1]
    )
    assert json.loads(found[1])["error"]["type"] == "server_error"
    assert "Traceback" in capsys.readouterr().err
    found = call(api, desk_of(api, fail), {"stream": True})
    events = found[1].split("\n\n")
    assert (
        found[0] == 200 and json.loads(events[-2].removeprefix("data: "))["error"]["code"] == code
    )
    assert '"半"' in events[1] and "secret" not in found[1] and "[DONE]" not in found[1]


def test_lines_of_a_stream_are_not_broken_by_the_text(api):
    odd = "a\u2028b\u2029c\x85d\ne\r\n\nf"

    def speak(limit, tell, gone):
        tell(odd, 1)
        return "stop", 1

    _, body = call(api, desk_of(api, speak), {"stream": True})
    texts = [
        json.loads(line.removeprefix("data: "))
        for line in body.splitlines()
        if line and "[DONE]" not in line
    ]
    assert texts[1]["choices"][0]["delta"]["content"] == odd


def test_who_reads_slowly_keeps_nobody_waiting(api):
    def speak(limit, tell, gone):
        for count in range(limit):
            tell("字", count)
        return "length", limit

    async def two():
        desk = desk_of(api, speak)
        async with aclosing(desk.answer([1], 50)) as slow:
            await anext(slow)  # and reads no further
            return [piece async for piece in desk.answer([1], 3)]

    assert [text for text, *_ in asyncio.run(asyncio.wait_for(two(), 60))] == ["字"] * 3 + [""]


def test_a_client_that_does_not_read_gives_his_place_back(api):
    """And one that does not send gets OpenAI's words."""
    left = threading.Event()

    def speak(limit, tell, gone):
        while not gone():
            tell("字" * 1000, 1)
            time.sleep(0.001)
        left.set()
        return None, 1

    limits = serve.Limits(body_seconds=0.5, unread_seconds=0.5)
    app = api.build_app(desk_of(api, speak), {"m": True}, dict(api.NEUTRAL), 10)
    body = json.dumps({"model": "m", "messages": user("你好"), "stream": True}).encode()
    with serving.served(openai_server.Front(app, set(), [], limits), limits) as running:
        begun = serving.head(running.port, "POST", api.COMPLETIONS, content_length=len(body))
        with serving.connect(running.port) as reader, serving.connect(running.port) as writer:
            reader.sendall(begun + body)
            writer.sendall(begun)
            status, _, found = serving.answer(writer)
            assert status == 408 and json.loads(found)["error"]["type"] == "invalid_request_error"
            assert left.wait(30)


def test_pieces_add_up_to_the_whole_text(api, run):
    """Ids of any kind, told one by one: the pieces are the text that decode() makes of them at once."""
    torch.manual_seed(1)
    texts = [
        "我是小谱😀，" + "".join(ANSWERS.values()),
        "  空格\n\n换行 a b\t<n>",
        "👩‍👩‍👧‍👦é\u0301🇨🇳",
    ]
    rows = [run.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    rows += [torch.randint(len(run.tokenizer), (40,)).tolist() for _ in range(20)]
    for ids in rows:
        text = api.Text(run.tokenizer, [])
        pieces = [text.add([token]) for token in ids] + [text.add([], last=True)]
        whole = run.tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) == whole.rstrip("\ufffd"), "half a character at the end is none"
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in "".join(pieces)


def test_model_ids(api, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    assert openai_server.model_ids(str(tmp_path / "run"), None, False) == {"run": True}
    assert openai_server.model_ids(str(tmp_path / "run" / "final"), None, True) == {
        "run": True,
        "base": False,
    }
    assert openai_server.model_ids("org/name", None, False) == {"org/name": True}
    assert openai_server.model_ids(str(tmp_path / "run"), "mine", False) == {"mine": True}
    with pytest.raises(SystemExit, match="--name"):
        openai_server.model_ids(str(tmp_path), "base", True)


def test_mistakes_at_the_start_are_one_line(api, server, monkeypatch, capsys):
    with pytest.raises(
        SystemExit, match=f"{server.port}: Address already in use; choose another --port"
    ):
        openai_server.bind(server.host, server.port)
    with pytest.raises(SystemExit, match="cannot serve on no.such.host.invalid"):
        openai_server.bind("no.such.host.invalid", 8000)
    for flags in (
        ["--port", "65536"],
        ["--api_key", ""],
        ["--api_key", "秘密"],
        ["--temperature", "3"],
        ["--max_waiting", "-1"],
        ["--port", "x"],
    ):
        monkeypatch.setattr(sys, "argv", ["api.py", *flags])
        with pytest.raises(SystemExit) as error:
            api.arguments()
        assert error.value.code == 2 and flags[0] in capsys.readouterr().err


# ---- the end -------------------------------------------------------------------------------------------------


def test_sigterm_ends_the_answers_and_the_log_keeps_secrets(server, client):
    """The last test: it ends the server."""
    with suppress(openai.APIError):
        ask(client, SECRET, stop=[SECRET[:4]], user=SECRET, max_tokens=3)
    http(server, path=f"/v1/models/{SECRET}")
    with pytest.raises(openai.APIError, match="shutting down"), busy(client) as stream:
        os.kill(server.process.pid, signal.SIGTERM)
        said(stream)
    assert server.process.wait(60) == 0
    log = server.log()
    line = (
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d %d POST /v1/chat/completions \d+\+\d+ tokens \d+\.\d\d s"
    )
    assert all(re.search(rf"^{line % status}$", log, re.MULTILINE) for status in (200, 499, 503)), (
        log[-2000:]
    )
    assert not any(
        word in log
        for word in (SECRET, "%E8", KEY, "sk-", "你是谁", "数数", "Traceback", "Exception")
    ), log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port))
