"""Captions go through an endpoint line by line: a killed run goes on, the source is kept, and what is
no translation is none."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from harness import ROOT, error_line, expect, finish, own_modules, start

(translate,) = own_modules("chinese_clip_ddp", "translate")
SCRIPT = ROOT / "chinese_clip_ddp/translate.py"


def chinese(text: str) -> str:
    return "译文" + "".join(chr(0x4E00 + ord(char)) for char in text)


@contextmanager
def endpoint(reply=None, seconds: float = 0.0):
    """-> (Counter of the captions that were asked, headers of each request, its address).

    reply: caption -> (status, body, headers), or None: a good answer.
    """
    asked: Counter[str] = Counter()
    headers = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            with lock:
                asked[text] += 1
                headers.append((self.path, dict(self.headers), body))
            time.sleep(seconds)
            status, answer, more = (reply and reply(text)) or (200, said(chinese(text)), {})
            data = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            with suppress(ConnectionError):
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | more).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield asked, headers, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def said(text: str, reason: str = "stop") -> dict:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]
    }


def one(text: str, address: str, **settings) -> str:
    asked = translate.Endpoint(address, "m", retries=settings.pop("retries", 0), **settings)
    with requests.Session() as session:
        return translate.translate(text, asked, session)


def command(source, output, address, *more) -> list:
    words = ["python", SCRIPT, source, output, "--endpoint", address, "--model", "m"]
    return [*words, "--retries", 0, *more]


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- one caption ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("一只猫", "一只猫"),
        ("“一只猫”", "一只猫"),
        ("「一只猫」\n", "一只猫"),
        ("<think>猫?\n好</think>\n一只猫", "一只猫"),
        ("想一想</think>一只猫", "一只猫"),
        ("“猫”和“狗”", "“猫”和“狗”"),
        ("一只\n猫", "一只 猫"),
    ],
)
def test_what_models_put_around_a_translation_goes(answer, expected):
    with endpoint(lambda text: (200, said(answer), {})) as (_, _, address):
        assert one("a cat", address) == expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, said(""), {}), "an empty answer"),
        ((200, said("a cat"), {}), "not Chinese"),
        ((200, said("<think>猫猫猫</think>"), {}), "an empty answer"),
        ((200, said("猫" * 200), {}), "much longer"),
        ((200, said("一只", "length"), {}), "length limit"),
        ((200, {"choices": []}, {}), "another form"),
        ((200, [], {}), "another form"),
        ((200, b"<html>", {}), "another form"),
        ((200, {"choices": [{"message": {"content": None}}]}, {}), "without text"),
        ((400, {"error": "too long"}, {}), "HTTP 400"),
        ((401, {"error": "no key"}, {}), "HTTP 401"),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), "HTTP 302"),
        ((503, b"", {}), "HTTP 503"),
    ],
)
def test_what_is_no_translation_has_a_reason(reply, reason):
    with (
        endpoint(lambda text: reply) as (asked, _, address),
        pytest.raises(translate.NotTranslated, match=reason),
    ):
        one("a cat", address)
    assert asked.total() == 1


def test_the_key_goes_to_the_endpoint_alone():
    with (
        endpoint() as (asked, _, other),
        endpoint(lambda text: (307, b"", {"Location": other + "/chat/completions"})) as (
            _,
            seen,
            address,
        ),
        pytest.raises(translate.NotTranslated, match="HTTP 307"),
    ):
        one("a cat", address, key="secret")
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "m" and body["temperature"] == 0
    assert not asked


def test_it_is_asked_again_after_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(translate.time, "sleep", pauses.append)
    answers = [(503, b"", {}), (429, b"", {"Retry-After": "9"}), (200, said("cat"), {})]
    with endpoint(lambda text: answers.pop(0) if answers else None) as (asked, _, address):
        assert one("a cat", address, retries=3) == chinese("a cat")
    waited = [pause for pause in pauses if pause]  # the server sleeps too, 0 seconds
    assert asked.total() == 4 and waited[1] == 9 and waited[0] <= 1 and len(waited) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只猫", True),
        ("a cat", False),
        ("iPhone 手机壳", True),
        ("a red 汉服 on a chair", False),
        ("一只cat", True),
        ("123", True),
    ],
)
def test_what_is_chinese_already(text, expected):
    assert translate.is_chinese(text) is expected


# ---- all of them ---------------------------------------------------------------------------------


def test_rows_keep_everything_and_their_source(tmp_path):
    rows = [
        {"image": "0.jpg", "caption": "a cat", "url": "http://x"},
        {"image": "1.jpg", "caption": "一只狗"},
        {"image": "2.jpg", "caption": "a cat"},
        {"image": "3.jpg", "caption": ""},
        {"image": "4.jpg", "caption": "a dog", "n": 1},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with endpoint() as (asked, _, address):
        done = expect(finish(start(command(tmp_path / "a.jsonl", tmp_path / "b.jsonl", address))))
    assert asked == {"a cat": 1, "a dog": 1}
    assert "1 rows are left out" in done.stdout and "a.jsonl:4: no caption" in done.stdout
    assert "1 Chinese already" in done.stdout
    cat, dog = ({"caption": chinese(t), "caption_source": t} for t in ("a cat", "a dog"))
    assert lines_of(tmp_path / "b.jsonl") == [
        rows[0] | cat,
        rows[1],
        rows[2] | cat,
        rows[4] | dog,
    ]


def test_a_killed_run_goes_on_line_by_line(tmp_path):
    count = 60
    texts = [f"picture {i}" for i in range(count)]
    (tmp_path / "a.csv").write_text(
        "text,image\n" + "".join(f"{t},{t}.jpg\n" for t in texts), encoding="utf-8"
    )
    output = tmp_path / "out.jsonl"
    with endpoint(seconds=0.02) as (asked, _, address):
        words = command(tmp_path / "a.csv", output, address, "--workers", 2)
        for moment in (10, 25, 40):
            process = start(words)
            while asked.total() < moment and process.poll() is None:
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert not output.exists()
        journal = translate.journal_of(output)
        kept = {line["source"] for line in lines_of(journal)[1:]}
        assert 0 < len(kept) < count
        with open(journal, "a", encoding="utf-8") as file:
            file.write('{"source": "picture 59", "te')
        before = asked.copy()
        expect(finish(start(words)))
        assert not {text for text in asked if asked[text] > before[text]} & kept
        # once more: nothing is asked
        total = asked.total()
        expect(finish(start(words)))
        assert asked.total() == total
    assert [line["text"] for line in lines_of(output)] == [chinese(text) for text in texts]
    assert [line["text_source"] for line in lines_of(output)] == texts


def test_what_failed_is_asked_again_by_the_same_command(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i}", "image": f"{i}.jpg"}) + "\n" for i in range(6)),
        encoding="utf-8",
    )
    broken = {"t1", "t4"}
    output = tmp_path / "out.jsonl"
    with endpoint(lambda text: (500, b"", {}) if text in broken else None) as (asked, _, address):
        words = command(tmp_path / "a.jsonl", output, address)
        done = finish(start(words))
        assert "not all captions are translated" in error_line(done, 1)
        assert "2 not translated: HTTP 500, e.g. 't" in done.stdout
        assert [line["text_source"] for line in lines_of(output)] == ["t0", "t2", "t3", "t5"]
        broken.clear()
        expect(finish(start(words)))
    assert asked == {"t0": 1, "t1": 2, "t2": 1, "t3": 1, "t4": 2, "t5": 1}
    assert [line["text_source"] for line in lines_of(output)] == [f"t{i}" for i in range(6)]


def test_an_endpoint_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i}", "image": "0.jpg"}) + "\n" for i in range(200)),
        encoding="utf-8",
    )
    output = tmp_path / "out.jsonl"
    with endpoint(lambda text: (401, {"error": "wrong key"}, {})) as (asked, _, address):
        error = error_line(finish(start(command(tmp_path / "a.jsonl", output, address))), 1)
        assert "HTTP 401" in error and "wrong key" in error and asked.total() < 100
    error = error_line(finish(start(command(tmp_path / "a.jsonl", output, address))), 1)
    assert "no answer" in error and "the same command goes on" in error


def test_rows_that_are_left_out_are_counted_and_named(tmp_path, capsys):
    lines = ['{"text": "a cat"}', '{"text": "a d', '{"text": 3}', '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows, column = translate.read_rows(tmp_path / "a.jsonl", "")
    assert (rows, column) == ([{"text": "a cat"}], "text")
    said = capsys.readouterr().out
    assert f"1 rows are left out, e.g. {tmp_path / 'a.jsonl'}:2: wrong JSON" in said
    assert "2 rows are left out" in said and ":3: no caption (int in column text)" in said


def test_what_a_user_has_to_repair_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("image,words\n0.jpg,a cat\n", encoding="utf-8")
    (tmp_path / "theirs.jsonl").write_text("{}\n", encoding="utf-8")

    def error(output: str, *more, code: int = 1) -> str:
        words = command(tmp_path / "a.csv", tmp_path / output, "http://127.0.0.1:9/v1", *more)
        return error_line(finish(start(words)), code)

    assert "columns seen: image, words; name it with --column" in error("b.jsonl")
    assert "not of this script" in error("theirs.jsonl", "--column", "words")
    assert "a jsonl file is written" in error("b.csv", "--column", "words", code=2)
    journal = translate.journal_of(tmp_path / "c.jsonl")
    journal.write_text('{"made_by": "another"}\n', encoding="utf-8")
    assert "another model or prompt" in error("c.jsonl", "--column", "words")
