"""The training manager with real recipes: flags, preview and one short training of train_qwen."""

import managing
import pytest
import serving
from harness import ROOT, start

from tools.manager import preview_worker


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """Over the project itself; what it starts are forks of a process that has the libraries."""
    folder = tmp_path_factory.mktemp("state")
    started = managing.Manager(ROOT, "--state", folder, "--weights", folder, start=start)
    try:
        yield started
    finally:
        started.end()


def test_a_recipe_is_previewed_and_trained(manager):
    names = [recipe["name"] for recipe in manager.get("/api/recipes")["recipes"]]
    assert {"train_qwen", "minimind_npu", "train_llava"} <= set(names)
    groups = {
        g["title"]: g["flags"] for g in manager.get("/api/recipes/train_qwen/flags")["groups"]
    }
    assert list(groups) == ["recipe", "run", "data", "adapter", "training"]
    flags = {flag["name"]: flag for some in groups.values() for flag in some}
    rate = flags["--learning_rate"]
    assert (rate["type"], rate["default"], rate["tiny_default"], rate["common"]) == (
        "float",
        1e-5,
        3e-3,
        True,
    )
    assert flags["--bf16"]["type"] == "bool" and "linear" in flags["--lr_scheduler_type"]["choices"]
    assert flags["--hub_model_id"]["managed"] and flags["--freeze_layers"]["type"] == "int"

    listed = manager.get("/api/datasets")["datasets"]
    data = next(one["id"] for one in listed if one["path_label"] == "train_qwen/data/units.jsonl")
    asked = {"id": data, "recipe": "train_qwen", "rows": 2, "args": '{"--model_max_length": 64}'}
    serving.until(
        lambda: manager.client.get("/api/datasets/preview", params=asked).status_code == 200, 120
    )
    found = manager.get("/api/datasets/preview", **asked)
    first = found["rows"][0]
    text = "".join(token["text"] for token in first["tokens"])
    trained = "".join(token["text"] for token in first["tokens"] if token["label"])
    assert len(found["rows"]) == 2 and "<|im_start|>user" in text and "\ufffd" not in text
    assert trained.endswith("<|im_end|>") and "user" not in trained
    assert sum(found["lengths"]["counts"]) == found["used"] and found["read"] == 165
    assert first["label_tokens"] < first["length"] <= found["lengths"]["max"]
    for wrong in ("[]", "{", '{"--model_max_length": 0}', '{"--output_dir": "x"}'):
        assert manager.get("/api/datasets/preview", 400, **asked | {"args": wrong})["error"][
            "param"
        ]
    asked = {"id": data, "recipe": "chinese_clip_ddp"}
    assert "no token rows" in manager.get("/api/datasets/preview", 400, **asked)["error"]["message"]

    args = {"--max_steps": 4, "--logging_steps": 2, "--eval_generate": 0, "--model_max_length": 64}
    args |= {"--save_strategy": "no", "--report_to": "none", "--bf16": False}
    body = {"recipe": "train_qwen", "args": args, "dataset": [data], "model": "tiny"}
    job = manager.post("/api/train/start", 201, **body)["job"]
    job = manager.until(job["id"], "done", "failed")
    assert job["state"] == "done", managing.text_of(manager.log(job["id"]))
    series = manager.get("/api/train/metrics", job=job["id"])["series"]
    assert series["loss"][-1][0] == 4 and series["tokens_per_second"] and series["eval_loss"]
    report = manager.get("/api/report", job=job["id"])
    assert report["json"]["recipe"] == "train_qwen" and "loss.png" in report["pictures"][0]["url"]
    (weights,) = manager.get("/api/weights")["weights"]
    assert weights["chat"] and weights["finished"] and weights["id"] == job["output_id"]
    assert manager.get("/api/evaluations")["runs"][0]["steps"] == 4


@pytest.fixture
def plain_manager(tmp_path):
    """What it starts are processes of their own: a tool's limit of memory is below what a fork that
    has the libraries begins with."""
    started = managing.Manager(ROOT, "--state", tmp_path, "--weights", tmp_path)
    try:
        yield started
    finally:
        started.end()


def test_tools_are_called_in_a_process_of_their_own(plain_manager):
    manager = plain_manager
    tools = manager.get("/api/tools")["tools"]
    assert "calculator" in [tool["function"]["name"] for tool in tools]
    call = {"name": "calculator", "arguments": {"expression": "37*(52+18)"}}
    assert manager.post("/api/tools/call", **call)["result"] == '{"result": 2590}'
    for wrong in (
        {"name": "calculator"},
        {"name": "none"},
        {"name": "calculator", "arguments": {"expression": "9**9**9"}},
    ):
        assert manager.post("/api/tools/call", 400, **wrong)["error"]["message"]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def convert_ids_to_tokens(self, ids):
        return ids

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def test_pieces_of_a_preview_are_whole_characters_of_one_kind():
    ids = list("a丹b".encode())
    found = preview_worker.pieces(Bytes(), ids, [-100, 1, 1, 1, -100])
    assert found == [
        {"text": "a", "label": False},
        {"text": "丹", "label": True},
        {"text": "b", "label": False},
    ]
    torn = preview_worker.pieces(Bytes(), ids[:3], [1, 1, -100])
    assert "".join(one["text"] for one in torn).startswith("a")
    assert (
        preview_worker.histogram([1, 2, 50])["counts"][0] == 2
        and preview_worker.histogram([])["max"] == 0
    )
    pair = {
        "chosen_input_ids": ids,
        "chosen_labels": [1] * 5,
        "rejected_input_ids": ids[:1],
        "rejected_labels": [-100],
    }
    shown = preview_worker.shown(pair, tuple(pair), None)
    assert [one["label_tokens"] for one in shown] == [5, 0]
    assert preview_worker.shown({"input_ids": ids}, ("input_ids",), None)[0]["label_tokens"] == 5
