"""The tutorial's figures: what they compute, what they refuse, and the process that computes them."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter

import pytest
import random_requests
import serving as sockets
from fastapi import FastAPI
from starlette.testclient import TestClient

from tools.manager.errors import Problem, add_handlers
from tools.manager.front import Front
from tools.manager.tutorial import client, routes


def page_of(worker, folders: dict | None = None) -> TestClient:
    def folder_of(name):
        if name not in (folders or {}):
            raise Problem(404, "there are no such weights", "weights")
        return folders[name]

    app = FastAPI()
    add_handlers(app)
    app.include_router(routes.router(worker, folder_of))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def figure():
    """figure(name, **fields) -> what the page gets; the process is the real one."""
    worker = client.Worker()
    page = page_of(worker)

    def ask(name, status=200, **fields):
        answer = page.post(f"/api/tutorial/{name}", json=fields)
        assert answer.status_code == status, answer.text
        return answer.json() if status == 200 else answer.json()["error"]

    ask.page = page
    yield ask
    worker.close()


# ---- what is computed ----------------------------------------------------------------------------


def test_tokens_and_their_bytes_make_up_the_text(figure):
    text = "今天 3+5=8, hello 龘"
    found = figure("tokens", text=text)
    spelled = bytes.fromhex(" ".join(token["bytes"] for token in found["tokens"]))
    assert spelled.decode() == text
    assert found["bytes"] == len(text.encode()) and found["characters"] == len(text)
    rare = [token["text"] for token in found["tokens"] if token["text"].startswith("⟨")]
    assert rare, "a character that the vocabulary lacks is shown as its bytes"


def test_neighbours_are_sorted_by_cosine(figure):
    found = figure("embedding", text="猫狗", chosen=1)
    cosines = [one["cosine"] for one in found["neighbours"]]
    assert cosines == sorted(cosines, reverse=True) and len(cosines) == 10
    assert all(-1 <= cosine < 1 for cosine in cosines)
    own = [point["text"] for point in found["points"] if point["own"]]
    assert "".join(own) == "猫狗" and len(found["points"]) == 12


def test_attention_looks_back_and_its_shares_sum_to_one(figure):
    found = figure("attention", text="小明把苹果给了小红", layer=3, head=2)
    rows = found["weights"]
    assert (found["layers"], found["heads"]) == (4, 4)
    for i, row in enumerate(rows):
        assert sum(row) == pytest.approx(1, abs=1e-2)
        assert not any(row[i + 1 :]), "it looked ahead"


def test_turned_vectors_know_their_distance_only(figure):
    found = figure("rope", position=8, distance=4)
    at_distance = dict(found["curve"])[4]
    assert [value for _, value in found["moved"]] == pytest.approx([at_distance] * 17, abs=1e-4)
    assert found["curve"][0] == pytest.approx([0, 1])
    assert found["pairs"][0]["wavelength"] == pytest.approx(2 * math.pi)
    assert len(found["pairs"]) == found["size"] / 2


def test_each_token_goes_to_its_likeliest_expert(figure):
    found = figure("experts", text="三加五等于八。", layer=1)
    for probabilities, chosen in zip(found["probabilities"], found["chosen"], strict=True):
        assert chosen == [probabilities.index(max(probabilities))]
    sent = [sum(i in chosen for chosen in found["chosen"]) for i in range(found["experts"])]
    shares = [count / len(found["tokens"]) for count in sent]
    assert found["shares"] == pytest.approx(shares)
    assert found["active"] < found["parameters"]


def test_next_tokens_are_sharpened_and_cut(figure):
    plain = figure("next_token", text="三加五等于")
    shown = [one["probability"] for one in plain["candidates"]]
    assert sum(shown) + plain["rest"] == pytest.approx(1, abs=1e-4)
    assert [one["sampled"] for one in plain["candidates"]] == pytest.approx(shown, rel=1e-3)
    assert plain["kept"] == plain["vocabulary"]
    assert 0 < plain["entropy"] <= math.log2(plain["vocabulary"])
    cut = figure("next_token", text="三加五等于", top_k=3)
    assert cut["kept"] == 3
    first = sum(one["probability"] for one in plain["candidates"][:3])
    expected = plain["candidates"][0]["probability"] / first
    assert cut["candidates"][0]["sampled"] == pytest.approx(expected, rel=1e-3)
    few = figure("next_token", text="三加五等于", top_p=0.05)
    assert 0 < few["kept"] < plain["kept"]
    cold = figure("next_token", text="三加五等于", temperature=0.05)
    assert cold["candidates"][0]["sampled"] > plain["candidates"][0]["sampled"]


def test_only_the_answer_and_its_end_have_a_loss(figure):
    found = figure("row_loss", question="你是谁？", answer="我是小丹。")
    trained = [token for token in found["tokens"] if token["label"]]
    assert "".join(token["text"] for token in trained) == "我是小丹。<|im_end|>"
    assert found["loss"] == pytest.approx(sum(one["loss"] for one in trained) / len(trained))
    assert found["loss"] == pytest.approx(found["uniform"], rel=0.3), "random weights know nothing"


def test_dpo_starts_at_log_two_and_minds_the_difference_only(figure):
    pair = {"prompt": "你好", "chosen": "您好。", "rejected": "哼。", "beta": 0.5}
    start = figure("dpo", **pair)
    assert start["loss"] == pytest.approx(math.log(2)) and start["pull"] == pytest.approx(0.25)
    apart = figure("dpo", gained_chosen=4, gained_rejected=-2, **pair)
    assert apart["margin"] == pytest.approx(3)
    assert apart["loss"] == pytest.approx(math.log1p(math.exp(-3)))
    both_down = figure("dpo", gained_chosen=-10, gained_rejected=-16, **pair)
    assert both_down["loss"] == pytest.approx(apart["loss"])
    assert start["chosen"]["log_prob"] < 0 and start["chosen"]["tokens"] > 1


def test_advantages_of_a_group(figure):
    found = figure("rl", rewards=[1, 0, 0, 1])
    assert found["reinforce"] == pytest.approx([0.5, -0.5, -0.5, 0.5])
    deviation = math.sqrt(1 / 3)
    expected = [value / (deviation + 1e-4) for value in found["reinforce"]]
    assert found["grpo"] == pytest.approx(expected)
    equal = figure("rl", rewards=[1, 1, 1])
    assert equal["silent"] and not any(equal["grpo"])


def test_a_call_is_run_and_a_wrong_one_is_told(figure):
    question = "37乘52等于多少？"
    call = {"name": "calculator", "arguments": {"expression": "37*52"}}
    found = figure("tools", question=question, call=json.dumps(call))
    prompt, written, result, again = (step["text"] for step in found["steps"])
    assert question in prompt and '"calculator"' in prompt and written in again
    assert json.loads(result) == {"result": 1924} and result in again
    assert not found["problem"] and not found["failed"]
    for wrong in ("", "{", '{"name": "rm", "arguments": {}}', '{"name": "calculator"}'):
        told = figure("tools", question=question, call=wrong)
        assert told["problem"] and told["failed"], wrong
    endless = {"name": "calculator", "arguments": {"expression": "9**9**9**9"}}
    assert figure("tools", question=question, call=json.dumps(endless))["failed"]


def test_sizes_of_what_is_deployed(figure):
    found = figure("deploy", size="26m", context=1000, batch=2)
    assert found["parameters"] == pytest.approx(25.83e6, rel=1e-3)
    sizes = {one["name"]: one["bytes"] for one in found["formats"]}
    assert sizes["fp32"] == 4 * found["parameters"]
    # keys and values of 8 layers, 2 heads of 64 numbers, two bytes each
    assert found["cache"] == 2 * 8 * 2 * 64 * 2 * 1000 * 2
    assert found["cache_unshared"] == 4 * found["cache"]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("tokens", {"text": ""}, "text"),
        ("tokens", {"text": "长" * 401}, "text"),
        ("tokens", {}, "text"),
        ("tokens", {"text": "好", "more": 1}, "more"),
        ("attention", {"text": "词" * 100}, "text"),
        ("attention", {"text": "好", "layer": 9}, "layer"),
        ("attention", {"text": "好", "head": -1}, "head"),
        ("embedding", {"text": "好", "chosen": 5}, "chosen"),
        ("experts", {"text": "好", "layer": 100}, "layer"),
        ("next_token", {"text": "好", "temperature": 0}, "temperature"),
        ("rl", {"rewards": [1]}, "rewards"),
        ("rl", {"rewards": [1e9, 0]}, "rewards.0"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c", "beta": 0}, "beta"),
        ("deploy", {"size": "70b"}, "size"),
    ],
)
def test_fields_out_of_bounds_are_named(figure, name, fields, param):
    assert figure(name, status=400, **fields)["param"] == param


def test_unknown_weights_and_figures(figure):
    assert figure("tokens", status=404, text="好", weights="../../etc")["param"] == "weights"
    figure("nothing", status=404, text="好")


def test_200_random_requests_neither_fail_nor_hang(figure):
    app = figure.page.app
    known = {"weights": ["tiny"], "text": ["今天天气", "好"], "call": ["{}"], "rewards": [[0, 1]]}
    maker = random_requests.Maker(app.openapi(), seed=5, known=known)
    found = random_requests.ask_many(Front(app, {"127.0.0.1"}), maker, 200)
    statuses = Counter(status for status, _ in found)
    assert not [request for status, request in found if status >= 500], statuses
    assert statuses[200] > 20 and statuses[400] > 20, statuses


# ---- the process ---------------------------------------------------------------------------------

STUB = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)["fields"]["text"]
    if asked == "sleep":
        time.sleep(60)
    if asked == "die":
        os._exit(1)
    if asked == "wait":
        while not os.path.exists(sys.argv[0] + ".go"):
            time.sleep(0.01)
    print(json.dumps({"figure": {"pid": os.getpid()}}), flush=True)
"""


@pytest.fixture
def stub(tmp_path):
    """(page, worker) of a script that obeys its text; a figure has a second."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    worker = client.Worker(script, figure_seconds=1, load_seconds=20)
    yield page_of(worker), worker
    worker.close()


def ask(page, text):
    answer = page.post("/api/tutorial/tokens", json={"text": text})
    return answer.status_code, answer.json()


def test_a_figure_that_hangs_or_dies_is_told_and_the_next_one_works(stub):
    page, worker = stub
    _, first = ask(page, "hello")
    assert ask(page, "sleep")[0] == 503
    _, second = ask(page, "hello")
    assert second["pid"] != first["pid"]
    assert ask(page, "die")[0] == 503
    assert ask(page, "hello")[0] == 200


def test_one_question_too_many_is_asked_to_come_again(stub, tmp_path):
    page, worker = stub
    worker.figure_seconds = 60
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(page, "wait")[0]))
        for _ in range(client.MOST_WAITING)
    ]
    for thread in threads:
        thread.start()
    sockets.until(lambda: not worker.places.acquire(blocking=False) or worker.places.release())
    assert ask(page, "hello")[0] == 429
    (tmp_path / "stub.py.go").touch()
    for thread in threads:
        thread.join(30)
    assert found == [200] * client.MOST_WAITING


def test_memory_is_given_back_when_nobody_asks(stub):
    page, worker = stub
    worker.idle_seconds = 0.05
    _, first = ask(page, "hello")
    sockets.until(lambda: worker.process is None)
    assert ask(page, "hello")[1]["pid"] != first["pid"]
