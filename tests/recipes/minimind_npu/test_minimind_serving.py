"""minimind's OpenAI-compatible server: OpenAI's client, lm-evaluation-harness's shapes, many at once, random bodies."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import psutil
import pytest
import random_requests
import serving as sockets
import torch
from harness import ROOT, environment, own_modules
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.data.labels import encode_chat, encode_prompt
from common.demo import openai_server, serve
from common.demo.openai_request import Refusal, parse

RECIPE = ROOT / "minimind_npu"
(
    models,
    generation,
    asks,
    parts,
    constraints,
    worker,
    desk_module,
    api,
    client_module,
    terminal,
    app,
    registries,
) = own_modules(
    RECIPE.name,
    "model",
    "engine.generation",
    "server.asks",
    "server.parts",
    "server.constraints",
    "server.worker",
    "server.desk",
    "serve_openai_api",
    "server.client",
    "chat",
    "app",
    "toolcall.registry",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "某个城市的天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["北京", "上海"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]
TALK = {"你是谁？": "我是小丹，住在海边。END 还有话。", "数数": "一二三四五六七八九十。"}
THOUGHT = {"5加2等于几？": ("5加2等于7。", "答案是7。")}
SLOTS = 4
WAITING = 3
WINDOW = 256


def user(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output folder whose final/ knows TALK, THOUGHT and one call of a tool, taught in seconds."""
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(0)
    model = models.build("tiny", len(tokenizer), hidden_size=64, num_hidden_layers=2)
    rows = [encode_chat(tokenizer, user(*pair), WINDOW) for pair in TALK.items()]
    for question, (thought, answer) in THOUGHT.items():
        said = {"role": "assistant", "reasoning_content": thought, "content": answer}
        rows.append(encode_chat(tokenizer, [*user(question), said], WINDOW))
    asked = user("北京天气怎么样？")
    called = {"role": "assistant", "content": "", "tool_calls": CALL}
    told = {"role": "tool", "content": "晴"}
    ended = {"role": "assistant", "content": "北京今天晴。"}
    rows.append(encode_chat(tokenizer, [*asked, called, told, ended], WINDOW, tools=[WEATHER]))
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(200):
        loss = model(ids, labels=labels, attention_mask=(ids != 0).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    assert loss < 0.05
    out = tmp_path_factory.mktemp("taught") / "kind"
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
    return out


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """The server process: .port, .process, .log()."""
    file = tmp_path_factory.mktemp("log") / "log.txt"
    command = [sys.executable, RECIPE / "serve_openai_api.py", "--model", trained, "--port", 0]
    command += ["--slots", SLOTS, "--max_waiting", WAITING, "--max_length", WINDOW]
    with file.open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment(PYTHONIOENCODING="utf-8"),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        pattern = r"serving kind on .*http://127\.0\.0\.1:(\d+)/v1 "
        found = sockets.until(
            lambda: process.poll() is not None or re.search(pattern, file.read_text()), 120
        )
        assert found is not True, file.read_text()
        yield SimpleNamespace(process=process, port=int(found[1]), log=file.read_text)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as connected:
        yield connected


def ask(client, question="你是谁？", **options):
    messages = user(question) if isinstance(question, str) else question
    options = {"model": "kind", "temperature": 0} | options
    return client.chat.completions.create(messages=messages, **options)


def metrics(server) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


# ---- answers -------------------------------------------------------------------------------------------------


def test_an_answer_and_its_stream(client, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    whole = ask(client)
    choice = whole.choices[0]
    assert choice.message.content == TALK["你是谁？"]
    assert choice.finish_reason == "stop"
    prompt = encode_prompt(tokenizer, user("你是谁？"))
    assert whole.usage.prompt_tokens == len(prompt)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TALK["你是谁？"]
    )
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_stop_strings_limits_and_seeds(client):
    assert ask(client, stop="END").choices[0].message.content == "我是小丹，住在海边。"
    cut = ask(client, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3
    drawn = [
        ask(client, temperature=2, seed=seed, max_tokens=30).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_choices(client):
    several = ask(client, n=3, temperature=2, seed=5, max_tokens=20)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, temperature=2, seed=5, max_tokens=20, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_log_probabilities(client, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = generation.MiniMindChatModel(trained).model
    answer = ask(client, logprobs=True, top_logprobs=2, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 6
    assert (
        b"".join(bytes(one.bytes) for one in entries).decode("utf-8", "ignore").startswith("我是")
    )
    prompt = encode_prompt(tokenizer, user("你是谁？"))
    with torch.inference_mode():
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    values, ids = first.topk(2)
    assert entries[0].logprob == pytest.approx(values[0].item(), abs=1e-4)
    assert [top.logprob for top in entries[0].top_logprobs] == pytest.approx(
        values.tolist(), abs=1e-4
    )
    chunks = list(ask(client, logprobs=True, max_tokens=6, stream=True))
    told = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert [one.logprob for one in told] == [one.logprob for one in entries]


def test_thoughts_are_told_apart(client):
    question = next(iter(THOUGHT))
    thought, said = THOUGHT[question]
    for extra in ({}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}):
        message = ask(client, question, **extra).choices[0].message
        assert (message.reasoning_content, message.content) == (thought, said)
        streamed = {"reasoning_content": "", "content": ""}
        for chunk in ask(client, question, stream=True, **extra):
            for name in streamed:
                streamed[name] += getattr(chunk.choices[0].delta, name, None) or ""
        assert streamed == {"reasoning_content": thought, "content": said}


def test_calls_of_tools_there_and_back(client):
    messages = user("北京天气怎么样？")
    choice = ask(client, messages, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "北京"}
    chunks = list(ask(client, messages, tools=[WEATHER], stream=True))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert [delta.index for delta in deltas] == [0]
    assert json.loads(deltas[0].function.arguments) == {"city": "北京"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "晴"}
    messages = [*messages, choice.message.model_dump(exclude_none=True), result]
    messages[1] = {k: v for k, v in messages[1].items() if k in ("role", "tool_calls")}
    assert ask(client, messages, tools=[WEATHER]).choices[0].message.content == "北京今天晴。"
    unasked = ask(client, "北京天气怎么样？", tools=[WEATHER], tool_choice="none").choices[0]
    assert unasked.message.tool_calls is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_demanded_call_always_comes(client, choice):
    """Asked something else, at a temperature at which it babbles."""
    found = ask(client, "数数", tools=[WEATHER], tool_choice=choice, temperature=2, seed=1, n=3)
    for one in found.choices:
        assert one.finish_reason == "tool_calls"
        assert json.loads(one.message.tool_calls[0].function.arguments)["city"] in ("北京", "上海")


def accepts(constraint, token: int) -> bool:
    allowed = bool(constraint.allowed()[token])
    if allowed:
        constraint.take(token)
    return allowed


def test_strict_tools_are_called_by_their_schema_or_not_at_all(client, trained):
    """The model knows the call with another city."""
    function = json.loads(json.dumps(WEATHER["function"])) | {"strict": True}
    function["parameters"]["properties"]["city"]["enum"] = ["上海"]
    strict = [{"type": "function", "function": function}]
    called = ask(client, "北京天气怎么样？", tools=strict, max_tokens=80).choices[0]
    assert called.finish_reason == "tool_calls"
    assert json.loads(called.message.tool_calls[0].function.arguments) == {"city": "上海"}
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    grammar = constraints.strict_grammar(tokenizer, [asks.Tool(**strict[0])])
    grammars = constraints.Grammars(tokenizer, len(tokenizer))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
    for text, fits in (
        ("<think>\n想\n</think>\n\n好的。", True),
        ("先看看。" + call % "上海" + "\n" + call % "上海", True),
        ("先看看。" + call % "北京", False),
    ):
        following = grammars.constraint(grammar, "tools")
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert all(accepts(following, token) for token in ids) == fits
    tokenizer.get_added_vocab = dict  # a model that spells its tags
    with pytest.raises(Refusal):
        constraints.strict_grammar(tokenizer, [asks.Tool(**strict[0])])


def test_json_by_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "好": {"type": "boolean"},
            "n": {"type": "integer", "minimum": 3, "maximum": 5},
        },
        "required": ["好", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for thinking in (False, True):
        body = {"chat_template_kwargs": {"enable_thinking": thinking}}
        answer = ask(
            client,
            response_format=form,
            temperature=1,
            n=4,
            seed=3,
            max_tokens=120,
            extra_body=body,
        )
        whole = [one for one in answer.choices if one.finish_reason == "stop"]
        assert whole or thinking
        for one in whole:
            found = json.loads(one.message.content)
            assert isinstance(found["好"], bool) and found["n"] in (3, 4, 5)


# ---- texts, as lm-evaluation-harness asks ------------------------------------------------------------------------


def test_texts_continue(client):
    made = client.completions.create(model="kind", prompt=["数", "你"], max_tokens=5, temperature=0)
    assert [choice.index for choice in made.choices] == [0, 1]
    assert made.usage.completion_tokens <= 10
    stream = client.completions.create(
        model="kind", prompt="数", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == made.choices[0].text


def test_scores_of_given_tokens(client, trained):
    """The shape of local-completions: token ids, echo, one token more, the likeliest beside each."""
    model = generation.MiniMindChatModel(trained).model
    prompts = [[1, 5, 9, 30, 77], [1, 200, 3]]
    scored = client.completions.create(
        model="kind", prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1, seed=1234
    )
    for prompt, choice in zip(prompts, scored.choices, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        told = choice.logprobs.token_logprobs
        assert told[0] is None and len(told) == len(prompt) + 1
        own = [expected[i, token].item() for i, token in enumerate(prompt[1:])]
        assert told[1:-1] == pytest.approx(own, abs=1e-4)
        best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:-1]]
        assert best == pytest.approx(expected[:-1].max(-1).values.tolist()[: len(best)], abs=1e-4)
    only = client.completions.create(
        model="kind", prompt=prompts[0], max_tokens=0, echo=True, logprobs=0
    )
    assert len(only.choices[0].logprobs.tokens) == len(prompts[0])


# ---- adapters ----------------------------------------------------------------------------------------------------


def test_adapters_answer_under_their_names_in_one_process(trained, tmp_path):
    """Two adapters and the base, asked at the same time, as each alone."""
    from peft import LoraConfig, get_peft_model

    from common.convert import adapter

    folders = {}
    for seed, name in enumerate(("law", "med")):
        base = generation.MiniMindChatModel(trained).model
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        adapter.remember_base(tmp_path / name, str(trained / "final"))
        folders[name] = str(tmp_path / name)
    chat_model = generation.MiniMindChatModel(trained)
    base_answer = answers_of(chat_model.model)
    adapters = {"kind": None} | api.load_adapters(chat_model, folders)
    at_work = worker.Worker(chat_model.model, adapters, 2, WINDOW)
    at_work.start()
    try:
        found = together(at_work, list(adapters) * 2)
    finally:
        at_work.close()
        at_work.thread.join(20)
    assert found["kind"] == base_answer
    assert len({tuple(found[name]) for name in adapters}) == 3
    for name, folder in folders.items():
        alone = adapter.put_on(generation.MiniMindChatModel(trained).model, folder).eval()
        assert found[name] == answers_of(alone)


def answers_of(model) -> list[int]:
    return generation.Engine(model, 1, WINDOW).generate([[1, 5, 9]], 12)[0]


def together(at_work, names: list[str]) -> dict[str, list[int]]:
    """Each model's answer to one prompt, all asked before one is answered."""
    found: dict[str, list[int]] = {}
    left = threading.Semaphore(0)

    def hear(name, request):
        if request.finished:
            found.setdefault(name, list(request.tokens))
            assert found[name] == request.tokens
            left.release()

    for name in names:
        job = worker.Job(name, [1, 5, 9], generation.Sampling(12))
        job.on_token = lambda request, name=name: hear(name, request)
        job.on_failure = pytest.fail
        at_work.submit(job)
    for _ in names:
        assert left.acquire(timeout=60)
    return found


# ---- many --------------------------------------------------------------------------------------------------------


def test_many_at_once_get_their_own_answers_or_are_told_when_to_come_again(server, client):
    """No answer is lost: each client comes again after a 429, as OpenAI's own does."""
    before = metrics(server)
    url = f"http://127.0.0.1:{server.port}/v1"
    patient = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)

    def one(number):
        question = list(TALK)[number % 2]
        while True:
            try:
                return question, ask(patient, question).choices[0].message.content
            except openai.RateLimitError as error:
                assert int(error.response.headers["retry-after"]) > 0
                assert error.code == "queue_full"
                time.sleep(0.05)

    with ThreadPoolExecutor(24) as pool:
        for question, said in pool.map(one, range(48)):
            assert said == TALK[question]
    after = metrics(server)
    ok = 'danpu_requests_total{path="/v1/chat/completions",status="200"}'
    full = 'danpu_requests_total{path="/v1/chat/completions",status="429"}'
    assert after[ok] - before[ok] == 48
    assert after[full] > 0
    sockets.until(lambda: metrics(server)["danpu_running"] == 0)
    assert metrics(server)["danpu_waiting"] == 0


def test_a_client_that_leaves_frees_its_slot(server, client):
    begun = metrics(server)["danpu_generated_tokens_total"]
    stream = ask(client, temperature=2, seed=1, stream=True, max_tokens=200, n=SLOTS)
    next(iter(stream))
    stream.close()
    sockets.until(lambda: metrics(server)["danpu_running"] == 0)
    assert metrics(server)["danpu_generated_tokens_total"] - begun < 200 * SLOTS


def test_the_asynchronous_client(server):
    async def both():
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", timeout=60) as own:
            kind = {"model": "kind", "temperature": 0}
            work = [own.chat.completions.create(messages=user(q), **kind) for q in TALK]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*work)]

    assert asyncio.run(both()) == list(TALK.values())


# ---- what is refused ---------------------------------------------------------------------------------------------

GOOD = {"model": "kind", "messages": user("你好"), "max_tokens": 2, "temperature": 0}


def post(server, body, path="/v1/chat/completions") -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


TOOL_RESULT = {"role": "tool", "content": "x", "tool_call_id": "a"}
CASES = {
    "no such model": ({"model": "other"}, 404, "model"),
    "unsupported by name": ({"frequency_penalty": 1}, 400, "frequency_penalty"),
    "too many choices": ({"n": 99}, 400, "n"),
    "alternatives alone": ({"top_logprobs": 3}, 400, "top_logprobs"),
    "a tool that is not there": ({"tool_choice": "required"}, 400, "tool_choice"),
    "tools of one name": ({"tools": [WEATHER, WEATHER]}, 400, "tools"),
    "a name that is none": (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        400,
        "tools[0].function.name",
    ),
    "a schema without one": ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    "a schema that is none": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            }
        },
        400,
        "response_format",
    ),
    "a result of no call": (
        {"messages": [*user("x"), TOOL_RESULT]},
        400,
        "messages[1].tool_call_id",
    ),
    "no room": ({"messages": user("长" * 2000)}, 400, "messages"),
    "a limit beyond the window": ({"max_tokens": 10**6}, 400, "messages"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_requests_are_named(server, case):
    change, status, param = CASES[case]
    found, body = post(server, GOOD | change)
    assert (found, body["error"]["param"]) == (status, param), body


def test_bad_texts_are_named(server):
    good = {"model": "kind", "prompt": "x", "max_tokens": 1}
    for change, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "stream": True}, "echo"),
    ):
        status, body = post(server, good | change, "/v1/completions")
        assert status == 400
        assert param in (None, body["error"]["param"]), body


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = sorted(set(asks.ChatAsk.model_fields) | {"min_p", "prefix", "x"})
RARE = st.sampled_from(
    [
        WEATHER,
        [WEATHER],
        "auto",
        "required",
        "json_object",
        {"type": "json_object"},
        0,
        1,
        3,
        True,
        [],
    ]
)


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES | RARE, max_size=4))
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_bodies_neither_fail_nor_hang(server, changes):
    body = GOOD | changes
    body.pop("stream", None)
    if isinstance(body.get("max_tokens"), int):
        body["max_tokens"] = min(body["max_tokens"], 4)
    status, answer = post(server, body)
    assert status in (200, 400, 404), answer
    assert ("error" in answer) == (status != 200)


def test_2000_requests_made_from_the_schema_neither_fail_nor_hang(trained):
    """Within this process; the model, its grammars and its template are real."""
    chat_model = generation.MiniMindChatModel(trained)
    at_work = worker.Worker(chat_model.model, {"kind": None}, SLOTS, WINDOW)
    limits = desk_module.Limits(waiting=64, new_tokens=2)
    desk = desk_module.Desk(chat_model, at_work, limits)
    answering = api.build_app(desk, ["kind"], chat_model.sampling_defaults())
    front = openai_server.Front(answering, serve.own_names("127.0.0.1"), [])
    at_work.start()
    bodies = {"/v1/chat/completions": asks.ChatAsk, "/v1/completions": asks.TextAsk}
    reads = ("/v1/models", "/v1/models/kind", "/health", "/metrics")
    known = {
        "model": ["kind"],
        "max_tokens": [1, 2],
        "max_completion_tokens": [1, 2],
        "n": [1, 2],
        "content": ["你是谁？", "数数"],
        "prompt": ["从前", "一"],
        "type": ["function", "text", "json_object"],
        "name": ["weather"],
        "role": ["user", "user", "system", "assistant"],
        "schema": [{"type": "object"}, {"enum": [1, "a"]}],
        "tool_calls": [None],
        "tool_call_id": [None],
        "reasoning_content": [None],
        "logprobs": [None, 1],
        "top_logprobs": [None],
        "response_format": [None, {"type": "json_object"}],
        "stop": ["。"],
        "echo": [False],
        "stream_options": [None],
        "tools": [None, [WEATHER]],
        "tool_choice": [None],
    }
    schema = random_requests.described(bodies, reads)
    maker = random_requests.Maker(
        schema, seed=20, known=known, odd=0.02, optional=0.1, always=("content",)
    )
    found = random_requests.ask_many(front, maker, 2000, patience=20)
    at_work.close()
    at_work.thread.join(20)
    statuses = Counter(status for status, _ in found)
    assert not [request for status, request in found if status >= 500], statuses
    answered = Counter(path.split("?")[0] for status, (_, path, *_) in found if status == 200)
    assert min(answered[path] for path in bodies) > 20 and statuses[400] > 200, (answered, statuses)
    assert not at_work.thread.is_alive()


def test_the_terminal_and_the_page_ask_a_server(server, monkeypatch):
    url = f"http://127.0.0.1:{server.port}/v1"
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    args = terminal.parse_args(["--base_url", url, "--temperature", "0", "--max_new_tokens", "40"])
    served = terminal.open_model(args)
    talk = terminal.Chat(served, **terminal.options_of(args, served))
    said = []
    lines = ["你是谁？", "/think on", "/clear", "5加2等于几？", "/exit"]
    terminal.talk(talk, lines, lambda *words, **_: said.extend(words))
    text = "".join(said)
    assert "我是小丹，住在海边。" in text and "<think>5加2等于7。</think>答案是7。" in text
    assert talk.history[-1]["reasoning_content"] == "5加2等于7。"
    page = app.build_demo(served)
    assert served.described() == [url] and page.title.startswith("minimind_npu")
    stop = threading.Event()
    counts = []
    for _, count in served.stream(user("数数"), stop, max_new_tokens=20, temperature=0):
        counts.append(count)
        stop.set()
    assert counts == [1]
    with pytest.raises(ValueError, match="temperature"):
        list(served.stream(user("x"), max_new_tokens=20, temperature=-1))
    with pytest.raises(SystemExit, match="the server at .* has kind"):
        client_module.ServedModel(url, "other")
    with pytest.raises(SystemExit, match="no OpenAI-compatible server answers"):
        client_module.ServedModel("http://127.0.0.1:9/v1")
    with pytest.raises(SystemExit, match="expected http"):
        client_module.ServedModel("file:///etc/passwd")


def test_a_tool_is_called_within_an_answer_by_a_served_model_as_by_one_here(server, trained):
    function = WEATHER["function"]
    tools = registries.Registry()
    tools.add(lambda city: "晴", function["parameters"], function["description"], "weather")
    for model in (
        client_module.ServedModel(f"http://127.0.0.1:{server.port}/v1"),
        generation.MiniMindChatModel(trained),
    ):
        how = {"temperature": 0, "max_new_tokens": 60}
        talk = terminal.Chat(model, registry=tools, uses_tools=True, **how)
        list(talk.answer("北京天气怎么样？", threading.Event()))
        called, given, said = talk.history[1:]
        assert called["tool_calls"] == CALL and given["content"] == "晴"
        assert said["content"] == "北京今天晴。"


def test_the_model_thread_outlives_an_error_of_the_model(trained):
    """Those in the batch are told; who comes later is answered."""
    chat_model = generation.MiniMindChatModel(trained)
    at_work = worker.Worker(chat_model.model, {"kind": None}, 2, WINDOW)
    at_work.start()
    told: list = []
    forward = chat_model.model.forward

    def fails(*args, **kwargs):
        raise RuntimeError("boom")

    chat_model.model.forward = fails
    job = worker.Job("kind", [1, 5], generation.Sampling(3))
    job.on_token = pytest.fail
    job.on_failure = told.append
    at_work.submit(job)
    sockets.until(lambda: told)
    assert (told[0].status, told[0].body["error"]["code"]) == (500, "generation_failed")
    chat_model.model.forward = forward
    assert len(together(at_work, ["kind"])["kind"]) > 0
    at_work.close()
    at_work.thread.join(20)


def test_the_window_is_at_most_the_model_s(trained):
    """--max_length beyond the positions promises no room that is not there."""
    chat_model = generation.MiniMindChatModel(trained)
    positions = chat_model.model.config.max_position_embeddings
    at_work = worker.Worker(chat_model.model, {"kind": None}, 1, 10 * positions)
    assert desk_module.Desk(chat_model, at_work, desk_module.Limits()).window == positions


def test_too_long_is_told(trained):
    chat_model = generation.MiniMindChatModel(trained)
    at_work = worker.Worker(chat_model.model, {"kind": None}, 1, WINDOW)  # never started
    waiting = desk_module.Desk(chat_model, at_work, desk_module.Limits(seconds=0.1))
    request = parse(json.dumps(GOOD).encode(), asks.ChatAsk)

    async def answered():
        prompt = await waiting.read_chat(request)
        defaults = chat_model.sampling_defaults()
        return [step async for step in waiting.chat(request, "kind", prompt, defaults)]

    with pytest.raises(Refusal) as refused:
        asyncio.run(answered())
    assert refused.value.status == 504


# ---- parts of an answer ------------------------------------------------------------------------------------------


def read_parts(text: str, sizes, **how) -> list:
    """The pieces of a text given in parts of these sizes, neighbours of one kind joined."""
    reading = parts.Parts(**{"thinking": True, "thought_is_open": False, "calls": True} | how)
    found = []
    at = 0
    for size in [*sizes, len(text)]:
        found += reading.add(text[at : at + size])
        at += size
    found += reading.add("", last=True)
    joined: list = []
    for piece in found:
        if joined and joined[-1].kind == piece.kind != "call":
            joined[-1] = parts.Piece(piece.kind, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return [(piece.kind, piece.name, piece.text) for piece in joined]


ANSWERS = {
    '说\n\n<tool_call>\n{"name": "a", "arguments": {"x": "<b>"}}\n</tool_call>\n': [
        ("content", "", "说"),
        ("call", "a", '{"x": "<b>"}'),
    ],
    "<think>\n想\n</think>\n\n好": [("reasoning", "", "想"), ("content", "", "好")],
    "<tool_call>\n不是 JSON\n</tool_call>": [
        ("content", "", "<tool_call>\n不是 JSON\n</tool_call>")
    ],
    '<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>': [
        ("call", "a", "{}"),
        ("call", "b", "{}"),
    ],
    '<tool_call>{"name": "a"': [("content", "", '<tool_call>{"name": "a"')],
    "1 < 2 且 <tool": [("content", "", "1 < 2 且 <tool")],
    "  先空格": [("content", "", "先空格")],
}


@given(st.sampled_from(list(ANSWERS)), st.lists(st.integers(1, 9), max_size=40))
@settings(max_examples=150, deadline=None)
def test_parts_are_the_same_however_the_text_comes(text, sizes):
    assert read_parts(text, sizes) == ANSWERS[text]


def test_tags_are_text_where_nobody_asked_for_them():
    text = '<think>x</think><tool_call>{"name": "a"}</tool_call>'
    assert read_parts(text, [3] * 30, thinking=False, calls=False) == [("content", "", text)]


def test_memory_stays_bounded(server, client):
    process = psutil.Process(server.process.pid)
    for _ in range(10):
        ask(client)
    before = process.memory_info().rss
    for _ in range(30):
        ask(client, n=4, logprobs=True, top_logprobs=5)
    assert process.memory_info().rss < before * 1.1


def test_flags(capsys, monkeypatch):
    for flags, told in (
        (["--adapters", "law"], "expected ID=FOLDER"),
        (["--adapters", "a=x", "a=y"], "is taken"),
        (["--slots", "0"], "--slots"),
        (["--max_seconds", "0"], "--max_seconds"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve_openai_api.py", *flags])
        with pytest.raises(SystemExit) as ended:
            api.arguments()
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


# ---- vLLM --------------------------------------------------------------------------------------------------------


def deploy(*words, folder=ROOT, **variables):
    command = ["bash", folder / "minimind_npu" / "deploy_vllm.sh", *words]
    return subprocess.run(
        [str(word) for word in command],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )


def test_deployment_shows_its_commands():
    shown = deploy(
        "serve", "--dry-run", "--device", "cuda", "--max-model-len", 512, "--name", "dan"
    )
    assert shown.returncode == 0, shown.stderr
    exported, container, asked = shown.stdout.splitlines()
    assert "export.py --output_dir" in exported
    assert "-p 127.0.0.1:8000:8000" in container
    assert container.rstrip().endswith("--served-model-name dan --max-model-len 512 --port 8000")
    assert "http://127.0.0.1:8000/v1/chat/completions" in asked
    ascend = deploy("vllm", "--dry-run", "--device", "npu", "--vllm-image", "mine:1").stdout
    assert "--device /dev/davinci_manager" in ascend
    assert "mine:1 vllm serve /model" in ascend


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["start"], "the first word is"),
        (["vllm", "--port", "1"], "unknown flag --port"),
        (["vllm", "--vllm-port", "x"], "x is no number"),
        (["vllm", "--name", "a b", "--dry-run"], "--name a b"),
        (["vllm", "--device", "tpu", "--dry-run"], "cuda or npu"),
        (["vllm", "--model-dir", "/nowhere"], "no exported model"),
        (["convert", "--weight", "nothing", "--model-dir", "/nowhere"], "is there: train one"),
    ],
)
def test_mistakes_of_deployment_are_one_line(words, told):
    ended = deploy(*words)
    assert ended.returncode in (1, 2)
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_what_is_deployed_is_what_was_typed(trained, tmp_path):
    """The export of a run, and sizes that are not the model's."""
    copied = tmp_path / "copied"
    (copied / "output" / "minimind_npu").mkdir(parents=True)
    for name in ("minimind_npu", "common", "requirements.txt", ".venv"):
        if (ROOT / name).exists():
            (copied / name).symlink_to(ROOT / name)
    (copied / "output" / "minimind_npu" / "sft").symlink_to(trained)
    out = tmp_path / "exported"
    for _ in range(2):  # also of what is there already
        wrong = deploy("convert", "--model-dir", out, "--hidden-size", 512, folder=copied)
        assert wrong.returncode == 1
        assert "--hidden-size is 512, but the model has 64" in wrong.stderr
    again = deploy("convert", "--model-dir", out, folder=copied)
    assert again.returncode == 0
    assert "taken as it is" in again.stdout
