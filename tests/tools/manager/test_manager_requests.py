"""The training manager's endpoints: what a request may name, what it may not, and random ones."""

import asyncio
import json
import socket
import time
from collections import Counter
from types import SimpleNamespace

import managing
import pytest
import random_requests
import serving
from harness import ROOT

from common.demo import serve
from tools.manager.app import build_app, make_manager
from tools.manager.arguments import words_of
from tools.manager.errors import Problem
from tools.manager.front import LIMITS, Front
from tools.manager.recipes import Recipes
from tools.manager.settings import Settings
from tools.manager.starting import Start

CPU = [{"id": "cpu", "kind": "cpu", "name": "CPU", "memory_total_mb": 1}]
HOSTS = serve.own_names("127.0.0.1")
TRAVERSALS = [
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "..", ".", "", "stub/../../etc", "%00", "\0", "a\nb",
    "C:\\x", "~root", "stub/data/rows.jsonl", "file:///etc/passwd", "a" * 90,
]  # fmt: skip
SHELL = [
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "| touch pwned",
    "&& touch pwned",
    "x\ntouch pwned",
    "' ; touch pwned #",
]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with managing.managing(tmp_path_factory.mktemp("root")) as started:
        yield started


@pytest.fixture
def inside(tmp_path):
    """The app in this process: .manager, .front(...) around it."""
    root = managing.make_root(tmp_path)
    made = make_manager(Settings(root=root, state=root / "state", weights=(root / "output",)), CPU)
    app = build_app(made)
    yield SimpleNamespace(
        manager=made, app=app, front=lambda *args, **more: Front(app, HOSTS, *args, **more)
    )
    for job in made.jobs.all():
        made.jobs.stop(job.id, force=True)
        serving.until(lambda job=job: made.jobs.look() or job.state not in ("running", "stopping"))
    made.close()


def data_id(manager, ending="rows.jsonl") -> str:
    return next(
        one["id"]
        for one in manager.get("/api/datasets")["datasets"]
        if one["path_label"].endswith(ending)
    )


# ---- what a request may name ---------------------------------------------------------------------


def test_recipes_and_their_flags_come_from_their_own_parsers(manager):
    (recipe,) = manager.get("/api/recipes")["recipes"]
    assert (
        recipe["name"] == "stub"
        and recipe["title_en"] == "Trains nothing."
        and recipe["scripts"] == ["train.py"]
    )
    (group,) = manager.get("/api/recipes/stub/flags")["groups"]
    flags = {flag["name"]: flag for flag in group["flags"]}
    assert flags["--steps"]["type"] == "int" and flags["--steps"]["default"] == 3
    assert flags["--kind"]["choices"] == ["a", "b"] and flags["--names"]["nargs"] == "+"
    assert flags["--data_path"]["managed"] and flags["--learning_rate"]["common"]
    assert (
        manager.get("/api/recipes/stub/flags", 404, script="../train.py")["error"]["param"]
        == "script"
    )
    assert manager.get("/api/recipes/none/flags", 404)["error"]["param"] == "recipe"


def test_nothing_starts_before_the_devices_are_known(tmp_path):
    root = managing.make_root(tmp_path)
    made = make_manager(Settings(root=root, state=root / "state", weights=()))
    with pytest.raises(Problem, match="devices"):
        made.starter.start(Start(recipe="stub"))
    made.devices.found = [{"id": str(i)} for i in range(4)]
    made.jobs.busy = lambda: {"0": "x", "1": "x", "2": "x", "3": "x"}
    job = made.starter.start(Start(recipe="stub", devices=[2, "0"]))
    assert job.argv[1:3] == [str(root / "common/launch.py"), "2"] and job.devices == ["0", "2"]
    assert made.starter.start(Start(recipe="stub")).argv[2] == "4"
    for wrong in ([], ["0", 0], ["9"]):
        with pytest.raises(Problem) as refused:
            made.starter.start(Start(recipe="stub", devices=wrong))
        assert refused.value.param == "devices"


def test_flags_follow_the_files(tmp_path):
    recipes = Recipes(managing.make_root(tmp_path), tmp_path / "cache")
    stub = recipes.get("stub")
    before = recipes.flags(stub, "train.py")
    (stub.folder / "train.py").write_text(managing.TRAIN.replace("--steps", "--strides"))
    after = recipes.flags(stub, "train.py")
    assert (
        before[0]["flags"][0]["name"] == "--steps" and after[0]["flags"][0]["name"] == "--strides"
    )
    (stub.folder / "train.py").write_text("import nothing_of_that_name")
    with pytest.raises(Problem, match="does not start: ModuleNotFoundError"):
        recipes.flags(stub, "train.py")
    again = Recipes(tmp_path, tmp_path / "cache")  # after a restart: from the disk
    (stub.folder / "train.py").write_text(managing.TRAIN)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert again.flags(again.get("stub"), "train.py") == before


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--stepz", 3, "did you mean --steps"),
        ("--steps", "three", "whole number"),
        ("--steps", 1.5, "whole number"),
        ("--steps", True, "expected int"),
        ("--steps", 10**400, "finite"),
        ("--learning_rate", "nan", "finite"),
        ("--learning_rate", -1, "0 or more"),
        ("--kind", "c", "one of a, b"),
        ("--names", ["--output_dir"], "cannot begin with -"),
        ("--names", [], "needs a value"),
        ("--teacher", "/etc/passwd", "configured folders"),
        ("--teacher", "../..", "configured folders"),
        ("--teacher", "stub/link", "configured folders"),
        ("--teacher", "a\nb", "line ends"),
        ("--teacher", "x" * 5000, "characters"),
        ("--output_dir", "x", "folder of its own"),
        ("--data_path", "x", "dataset"),
        ("--model_name_or_path", "x", "`model`"),
        ("; touch pwned", 1, "unknown flag"),
        ("--steps=3 --code", 1, "unknown flag"),
    ],
)
def test_a_flag_that_does_not_fit_is_named(manager, flag, value, told):
    link = manager.root / "stub/link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    body = json.dumps({"recipe": "stub", "args": {flag: value}})
    error = manager.ask(
        "POST", "/api/train/start", 400, content=body, headers={"content-type": "application/json"}
    )
    assert told in error["error"]["message"], error
    assert error["error"]["param"] == flag if flag.startswith("--") and "=" not in flag else True
    assert not manager.get("/api/status")["jobs"]


def test_words_of_a_command_line(tmp_path):
    recipes = Recipes(managing.make_root(tmp_path), tmp_path / "cache")
    groups = recipes.flags(recipes.get("stub"), "train.py")
    args = {
        "steps": "4",
        "--learning_rate": 2,
        "--size": "26m",
        "--names": "a b",
        "--teacher": "-x; $(id)",
        "--kind": None,
    }
    words = words_of(args, groups, [tmp_path], tmp_path)
    assert words == [
        "--steps=4",
        "--learning_rate=2.0",
        "--size=26m",
        "--names",
        "a",
        "b",
        "--teacher=-x; $(id)",
    ]
    assert words_of({"--teacher": "stub/data"}, groups, [tmp_path], tmp_path) == [
        "--teacher=stub/data"
    ]
    with pytest.raises(Problem, match="given twice"):
        words_of({"steps": 1, "--steps": 2}, groups, [tmp_path], tmp_path)


@pytest.mark.parametrize("name", TRAVERSALS)
def test_ids_are_never_paths(manager, name):
    """In every place that takes one."""
    for field in ("job", "weights"):
        assert manager.client.get("/api/report", params={field: name}).status_code == 404
    for path in ("train/logs", "train/metrics"):
        assert manager.client.get(f"/api/{path}", params={"job": name}).status_code == 404
    asked = [
        {"recipe": name},
        {"recipe": "stub", "script": name},
        {"recipe": "stub", "launcher": name},
    ]
    asked += [
        {"recipe": "stub", "dataset": [name]},
        {"recipe": "stub", "dataset": [{"id": name}]},
        {"resume": name},
    ]
    asked += [{"recipe": "stub", "model": name}]
    for body in asked:
        known = body.get("script") == "" or body.get("launcher") == ""
        answer = manager.client.post("/api/train/start", json=body)
        assert answer.status_code in ((400, 404) if not known else (201,)), (body, answer.text)
    for body in ({"job": name}, {"job": name, "force": True}):
        assert manager.client.post("/api/train/stop", json=body).status_code == 404
    assert manager.client.post("/api/train/remove", json={"job": name}).status_code == 404
    assert manager.client.post("/api/chat/servers", json={"weights": name}).status_code == 404
    preview = {"id": name, "recipe": "stub"}
    assert manager.client.get("/api/datasets/preview", params=preview).status_code == 404
    page = manager.client.get("/api/report/picture", params={"name": name, "weights": "x"})
    assert page.status_code == 404
    for job in manager.get("/api/status")["jobs"]:  # of script ""
        manager.until(job["id"], "done")
        manager.post("/api/train/remove", job=job["id"])


@pytest.mark.parametrize("text", SHELL)
def test_shell_words_are_text_in_every_field(manager, text):
    job = manager.client.post(
        "/api/train/start",
        json={"recipe": "stub", "name": text, "args": {"--teacher": text, "--steps": 1}},
    )
    if "\n" in text:
        assert job.status_code == 400
    else:
        found = manager.until(job.json()["job"]["id"], "done")
        assert f"--teacher={text}" in managing.text_of(manager.log(found["id"])).replace(
            '"', "'"
        ).replace("\\'", "'")
        manager.post("/api/train/remove", job=found["id"])
    form = {"file": (text, b'{"text": "x"}\n')}
    assert manager.client.post("/api/datasets/upload", files=form).status_code in (200, 400)
    assert not list(manager.root.rglob("pwned")) and not (ROOT / "pwned").exists()


# ---- uploads -------------------------------------------------------------------------------------


def test_uploads_are_kept_listed_and_trained_from(manager):
    rows = b'{"text": "\xe4\xb8\xb9"}\n' * 3
    kept = manager.ask("POST", "/api/datasets/upload", files={"file": ("数据 1.jsonl", rows)})[
        "dataset"
    ]
    assert (
        kept["rows"] == 3
        and kept["kind"] == "upload"
        and kept["path_label"].endswith("uploads/数据 1.jsonl")
    )
    again = manager.ask("POST", "/api/datasets/upload", files={"file": ("数据 1.jsonl", b"{}")})[
        "dataset"
    ]
    assert again["path_label"].endswith("数据 1 (2).jsonl")  # nothing is replaced
    named = manager.ask(
        "POST", "/api/datasets/upload", files={"file": ("x", rows)}, data={"name": "b.jsonl.gz"}
    )
    assert named["dataset"]["rows"] is None
    job = manager.train(args={"--steps": 1}, dataset=[kept["id"]])
    manager.until(job["id"], "done")
    assert "uploads/数据 1.jsonl names" in managing.text_of(manager.log(job["id"]))
    told = manager.train(400, dataset=[kept["id"], again["id"]])
    assert told["param"] == "dataset" and "blanks" in told["message"]
    job = manager.train(
        args={"--steps": 1},
        dataset=[f"{data_id(manager)}:0.7", {"id": named["dataset"]["id"], "weight": 2}],
    )
    manager.until(job["id"], "done")
    assert "rows.jsonl:0.7 " in managing.text_of(manager.log(job["id"]))
    assert "b.jsonl.gz:2 names" in managing.text_of(manager.log(job["id"]))


@pytest.mark.parametrize(
    "name",
    ["a.py", "a.sh", "a.jsonl.exe", ".jsonl", "a", "..", ".hidden.jsonl", "a\0.jsonl", "-x.jsonl"],
)
def test_other_kinds_and_names_are_refused(manager, name):
    before = sorted(manager.root.rglob("*"))
    answer = manager.client.post(
        "/api/datasets/upload", files={"file": ("x", b"x")}, data={"name": name}
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] in ("name", "file")
    assert sorted(manager.root.rglob("*")) == before


def test_an_upload_has_a_size_and_a_form(inside):
    with serving.served(inside.front(max_upload=1 << 16), LIMITS) as server:
        head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        form = {"content_type": "multipart/form-data; boundary=x"}
        for size, code in ((1000, 200), (1 << 18, 413)):
            body = head + b"z" * size + b"\r\n--x--\r\n"
            status, _, said = serving.ask(server.port, "POST", "/api/datasets/upload", body, **form)
            assert status == code, said
        part = head + b"z" * (1 << 18)
        chunk = b"%x\r\n%s\r\n" % (len(part), part)
        with serving.connect(server.port) as sock:  # a length that nobody says
            start = serving.head(
                server.port, "POST", "/api/datasets/upload", transfer_encoding="chunked", **form
            )
            sock.sendall(start + chunk + b"0\r\n\r\n")
            assert serving.answer(sock)[0] == 413
        for body in (b"", b"--x", head, b"--x--\r\n", head + b"z"):
            status, _, said = serving.ask(server.port, "POST", "/api/datasets/upload", body, **form)
            assert status == 400, (body, said)
        status, _, _ = serving.ask(
            server.port, "POST", "/api/datasets/upload", b"{}", content_type="application/json"
        )
        assert status == 400
    names = [path.name for path in inside.manager.settings.uploads.iterdir()]
    assert names == ["a.txt"]  # no half of one


# ---- strangers, bodies, clients that leave -------------------------------------------------------


def test_foreign_hosts_pages_and_clients_without_the_token(inside):
    with serving.served(inside.front("geheim7"), LIMITS) as server:
        port = server.port
        own = {"authorization": "Bearer geheim7"}
        assert serving.ask(port, path="/api/status", **own)[0] == 200
        assert serving.ask(port, path="/api/status", cookie="danpu_token=geheim7")[0] == 200
        for wrong in (
            {},
            {"authorization": "Bearer x"},
            {"authorization": "geheim7"},
            {"cookie": "danpu_token="},
        ):
            status, headers, body = serving.ask(port, path="/api/status", **wrong)
            assert status == 401 and "token" in json.loads(body)["error"]["message"]
        assert serving.ask(port, path="/")[0] == 200  # the page itself
        status, headers, _ = serving.ask(port, path="/?token=geheim7")
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert "set-cookie" not in serving.ask(port, path="/?token=geheim8")[1]
        assert serving.ask(port, path="/api/status", host="evil.example", **own)[0] == 421
        post = {"method": "POST", "path": "/api/train/start", "body": b"{}"} | own
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
            assert serving.ask(port, **post, origin=origin)[0] == 403
        status, headers, _ = serving.ask(
            port, **post, origin=f"http://127.0.0.1:{port}", content_type="text/plain"
        )
        assert status == 400 and "access-control-allow-origin" not in headers
        assert "default-src 'self'" in headers["content-security-policy"]
    assert not inside.manager.jobs.all()


@pytest.mark.parametrize("body", [body for body in random_requests.BODIES if body])
def test_bodies_that_are_no_request_are_400(manager, body):
    answer = manager.client.post(
        "/api/train/start", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "param"}


def test_10_mb_and_slow_bodies_and_readers(inside):
    """The limits are those of every server here; the manager is behind them too."""
    limits = serve.Limits(body=1 << 20, body_seconds=0.3, unread_seconds=0.3)
    job = inside.manager.jobs
    with serving.served(Front(inside.app, HOSTS, limits=limits), limits) as server:
        status, _, body = serving.ask(
            server.port, "POST", "/api/train/start", b'{"name": "' + b"x" * (10 << 20) + b'"}'
        )
        assert status == 413 and json.loads(body)["error"]["message"]
        for path in ("/api/train/start", "/api/datasets/upload"):
            with serving.connect(server.port) as slow:
                form = {"content_type": "multipart/form-data; boundary=x", "content_length": 100}
                slow.sendall(serving.head(server.port, "POST", path, **form) + b"--x")
                assert serving.answer(slow)[0] == 408
        assert serving.ask(server.port, path="/api/status")[0] == 200
    assert not job.all()


def test_readers_of_a_log_that_leave_are_let_go_and_have_a_limit(inside, monkeypatch):
    jobs = inside.manager.jobs
    asked = {"recipe": "stub", "args": {"--steps": 2000, "--pause": 0.02}}
    body = json.dumps(asked).encode()
    monkeypatch.setattr("tools.manager.logs.MOST", 3)
    with serving.served(inside.front(), LIMITS) as server:
        inside.manager.start()
        status, _, said = serving.ask(
            server.port, "POST", "/api/train/start", body, content_type="application/json"
        )
        assert status == 201, said
        readers = [serving.connect(server.port) for _ in range(3)]
        for reader in readers:
            reader.sendall(serving.head(server.port, path="/api/train/logs?job=0001"))
            assert b"event: state" in reader.recv(1 << 16) + reader.recv(1 << 16)
        assert serving.ask(server.port, path="/api/train/logs?job=0001")[0] == 429
        assert serving.ask(server.port, path="/api/status")[0] == 200
        for reader in readers:
            reader.shutdown(socket.SHUT_RDWR)
            reader.close()
        serving.until(lambda: inside.manager.streams.open == 0)
        jobs.stop("0001", force=True)
        serving.until(lambda: jobs.get("0001").state == "stopped")


# ---- talking -------------------------------------------------------------------------------------


def test_a_server_of_weights_is_started_asked_cancelled_and_ended(manager):
    opened = manager.ask("POST", "/api/chat/servers", 201, json={"weights": "tiny"})["server"]
    assert (
        manager.ask("POST", "/api/chat/servers", 200, json={"weights": "tiny"})["server"]["id"]
        == opened["id"]
    )
    path = f"/api/chat/{opened['id']}"

    def ready():
        (one,) = manager.get("/api/chat/servers")["servers"]
        assert one["state"] != "failed", one
        return one["state"] == "ready" and one

    assert serving.until(ready)["models"] == ["stub"]
    assert manager.get(f"{path}/v1/models")["data"][0]["id"] == "stub"
    said = manager.post(f"{path}/v1/chat/completions", messages=[{"content": "你好"}])
    assert said["messages"][0]["content"] == "你好"
    with manager.client.stream("POST", f"{path}/v1/completions", json={"stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert next(answer.iter_text()).startswith("data: x")
    left = manager.root / "left"
    serving.until(left.exists)  # the server knows that nobody reads on
    manager.ask("DELETE", path.replace("chat/", "chat/servers/"))
    assert manager.get("/api/chat/servers")["servers"] == []
    assert manager.post(f"{path}/v1/completions", 404)["error"]["param"] == "server"


def test_two_servers_at_most_and_unused_ones_end(inside, monkeypatch):
    chat = inside.manager.chat
    folder = inside.manager.settings.root
    first, new = chat.open("a", folder, None)
    assert new and chat.open("a", folder, None) == (first, False)
    second, _ = chat.open("b", folder, "stub")
    serving.until(lambda: first.url and second.url)
    with monkeypatch.context() as patch, pytest.raises(Problem) as refused:
        for one in (first, second):  # as if none of them had begun to serve
            patch.setattr(one, "url", None)
        chat.open("c", folder, None)
    assert refused.value.status == 429
    first.used += 1
    third, _ = chat.open("c", folder, None)  # in the place of the one unused for longer
    assert second.process.poll() is not None and set(chat.servers) == {first.id, third.id}
    first.in_flight = 1
    monkeypatch.setattr("tools.manager.chat.IDLE_SECONDS", -1)
    assert [one["id"] for one in chat.all()] == [first.id] and third.process.poll() is not None
    first.in_flight = 0
    failed, _ = chat.open("d", folder / "none", None)
    failed.process.wait()
    serving.until(lambda: failed.lines)
    assert failed.public()["error"] == "no such model" and failed.public()["state"] == "failed"


# ---- random requests -----------------------------------------------------------------------------


def test_2000_random_requests_neither_fail_nor_hang(inside):
    manager = inside.manager
    front = inside.front()
    manager.jobs.start()
    jobs = ["0001", "0002", "0003", "0004"]
    known = {
        "recipe": ["stub"],
        "script": ["train.py", None],
        "launcher": [None],
        "dataset": [one["id"] for one in manager.datasets.all()],
        "model": ["tiny", None],
        "devices": [["cpu"], None],
        "resume": [None] * 12 + jobs,
        "job": jobs,
        "weights": ["tiny"],
        "name": ["loss.png", "x"],
        "server": ["1", "2"],
        "args": ["--steps", "--teacher", "--kind"],
    }
    known["id"] = known["dataset"]
    began = time.monotonic()
    schema = inside.app.openapi()
    for path in [path for path in schema["paths"] if path.startswith("/api/tutorial/")]:
        del schema["paths"][path]  # test_tutorial.py asks those
    maker = random_requests.Maker(schema, seed=20, known=known)
    found = random_requests.ask_many(front, maker, 2000)
    statuses = Counter(status for status, _ in found)
    assert not [request for status, request in found if status >= 500], statuses
    assert (
        statuses[200] > 100 and statuses[201] > 4 and statuses[400] > 100 and statuses[404] > 100
    ), statuses
    asked = {(request[0], request[1].split("?")[0]) for _, request in found}
    assert len(asked) > 40 and time.monotonic() - began < 300
    host = {"host": "127.0.0.1"}
    assert asyncio.run(random_requests.call(front, "GET", "/api/status", host, b"")) == 200
