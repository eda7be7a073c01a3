"""What is called and what runs it: calls in a text, the registry and its limits, the four tools, the sandbox."""

import json
import os
import sys
import threading
import time

import pytest
from harness import ROOT, own_modules

RECIPE = ROOT / "minimind_npu"
calls, registry, tools, sandbox = own_modules(
    "minimind_npu", "toolcall.calls", "toolcall.registry", "toolcall.tools", "toolcall.sandbox"
)
Call, parse_calls, Registry = calls.Call, calls.parse_calls, registry.Registry
TEXT = {"type": "string"}


def schema(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


def error(text: str) -> str:
    found = json.loads(text)
    assert found.keys() == {"error"}
    return found["error"]


# ---- calls --------------------------------------------------------------------------------------------------------


def test_calls_of_an_answer_in_order_whatever_stands_around_them():
    one = '<tool_call>\n{"name": "a", "arguments": {"x": "</tool_call>"}}\n</tool_call>'
    other = '<tool_call>{"name": "b", "arguments": "{\\"y\\": [1]}"}</tool_call>'
    found = parse_calls(f"<think>{other}</think>好。\n{one}\n{other}完。")
    assert [(call.name, call.arguments, call.problem) for call in found] == [
        ("a", {"x": "</tool_call>"}, ""),
        ("b", {"y": [1]}, ""),
    ]
    assert parse_calls("没有。") == parse_calls(f"<think>{one}") == parse_calls("") == []
    assert parse_calls('<tool_call>{"name": "a"}</tool_call>')[0].arguments == {}


@pytest.mark.parametrize(
    "written, said",
    [
        ('{"name": "a", "arguments": {', "not JSON"),
        ("[" * 9999, "not JSON"),
        ('{"name": "a", "arguments": {"x": NaN}}', "NaN"),
        ('{"name": "a", "arguments": {"x": 1, "x": 2}}', "twice"),
        ('{"arguments": {}}', "name"),
        ('[{"name": "a"}]', "name"),
        ('{"name": "a", "arguments": [1]}', "not an object"),
        ('{"name": "a", "arguments": "x"}', "not JSON"),
        ('{"name": "a", "parameters": {}}', "parameters"),
        (json.dumps({"name": "a", "arguments": {"x": "y" * 30_000}}), "20,000"),
        ("", "not JSON"),
    ],
)
def test_a_call_that_cannot_be_made_says_why_and_the_next_one_counts(written, said):
    good = '<tool_call>{"name": "b"}</tool_call>'
    first, second = parse_calls(f"<tool_call>{written}</tool_call>{good}")
    assert said in first.problem and second == Call("b", text='{"name": "b"}')
    assert said in error(tools.built_in().answer(first))


def test_a_call_that_was_cut_off_is_none():
    (call,) = parse_calls('<tool_call>\n{"name": "a", "arguments": {"x": 1}}')
    assert "missing" in call.problem
    first, second = parse_calls('<tool_call>{"name": "a"<tool_call>{"name": "b"}</tool_call>')
    assert first.problem and second.name == "b"


def test_an_answer_of_nothing_but_tags_is_read_up_to_a_bound():
    found = parse_calls("<tool_call>" * 200_000)
    assert len(found) == calls.MOST + 1 and "64" in found[-1].problem
    assert all(call.problem for call in found)


# ---- the registry -------------------------------------------------------------------------------------------------


def echo(**given):
    return given


def test_arguments_are_checked_before_the_function_sees_them():
    seen = []
    made = Registry()
    made.add(lambda city, days=1: seen.append((city, days)) or "晴", {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["北京"]}, "days": {"type": "integer", "maximum": 7}},
        "required": ["city"], "additionalProperties": False,
    }, description="查天气", name="weather")  # fmt: skip
    assert made.call("weather", {"city": "北京", "days": 3}) == "晴"
    for wrong in ({}, {"city": 1}, {"city": "上海"}, {"city": "北京", "days": 8}, {"city": "北京", "x": 1},
                  {"city": "北京", "days": "3"}, {"city": "北京", "days": True}, None, [], "{}", {"city": {1}}):  # fmt: skip
        assert error(made.call("weather", wrong))
    for name in ("wether", "", None, 7, []):
        assert "weather" in error(made.call(name, {"city": "北京"}))
    assert seen == [("北京", 3)]
    (shown,) = made.schemas
    assert shown["function"]["name"] == "weather" and shown["function"]["description"] == "查天气"


@pytest.mark.parametrize(
    "parameters, said",
    [
        ([], "object"),
        ({"type": "string"}, "object"),
        ({"type": "object", "properties": {"x": {"type": "str"}}}, "'str'"),
        ({"type": "object", "requierd": ["x"]}, "did you mean required"),
        (schema(x={"type": "string", "maxlength": 3}), "did you mean maxLength"),
        (schema(x={"anyOf": [{"type": "null"}, {"kind": 1}]}), "'kind'"),
        (schema(x={"type": "string", "format": "phone"}), "'phone'"),
        (schema(x=TEXT), "do not fit"),
    ],
)
def test_a_schema_that_would_not_be_checked_is_refused(parameters, said):
    with pytest.raises(ValueError, match=f"^f: .*{said}"):
        Registry().add(lambda y=1: y, parameters, name="f")


def test_names_are_unique_and_no_schema_is_fetched():
    made = Registry()
    made.add(echo, {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:9/s.json"}}})
    with pytest.raises(ValueError, match="already"):
        made.add(echo, schema())
    assert "cannot be checked" in error(made.call("echo", {"x": 1}))


def test_whatever_a_function_does_the_caller_gets_text():
    made = Registry(characters=100)
    for name, does in {
        "raises": lambda: 1 / 0,
        "exits": lambda: sys.exit(3),
        "no_json": lambda: {1, 2},
        "nan": lambda: float("nan"),
    }.items():
        made.add(does, schema(), name=name)
        assert error(made.call(name, {}))
    made.add(lambda: "长" * 5000, schema(), name="long")
    assert made.call("long", {}) == "长" * 100 + "… (4,900 more)"
    made.add(lambda: "\ud800", schema(), name="half")
    made.call("half", {}).encode()
    made.add(lambda x: x.append(1) or x, schema(x={"type": "array"}), name="changes")
    mine = [0]
    assert made.call("changes", {"x": mine}) == "[0, 1]" and mine == [0]


def test_a_tool_that_hangs_is_left_and_in_the_end_not_called_any_more():
    gate = threading.Event()
    made = Registry(seconds=0.05)
    made.add(lambda: gate.wait(60) and "", schema(), name="hangs")
    made.add(lambda: "好", schema(), name="works", seconds=30)
    found = [error(made.call("hangs", {})) for _ in range(registry.STUCK + 1)]
    assert all("longer than 0.05" in said for said in found[:-1]) and "any more" in found[-1]
    assert made.call("works", {}) == "好"
    gate.set()  # they end after all
    deadline = time.monotonic() + 30
    while made.tools["hangs"].stuck and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made.call("hangs", {}) == ""


def test_calls_from_many_threads_at_once():
    made = tools.built_in(seconds=60)
    found = {}

    def work(n):
        found[n] = made.call("calculator", {"expression": f"{n}*{n}"})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f'{{"result": {n * n}}}' for n in range(40)}


# ---- the tools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, value",
    [("37*(52+18)", 2590), ("0.1+0.2", 0.3), ("6/2", 3), ("7/2", 3.5), ("３×４÷２", 6), ("-7//2", -4), ("2^10", 1024),
     ("sqrt(16)+max(1,2,3)", 7), ("round(2/3, 2)", 0.67), ("abs(-5)%3", 2), ("2**-1", 0.5), ("-" * 299 + "1", -1),
     ("2**4000 % 1000", 2**4000 % 1000)],
)  # fmt: skip
def test_sums(expression, value):
    assert json.loads(
        tools.built_in(seconds=60).call("calculator", {"expression": expression})
    ) == {"result": value}


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "9**99999999", "10**1200*10**1200", "(-8)**0.5", "1/0", "2**0.5**-9999", "1e5", "1j", "True", "max()",
     "abs(1,2)", "round(1,2.5)", "5 5", "", "(" * 200, "1" * 301, "1" * 250 + "**9", "__import__('os')", "().__class__", "a:=1",
     "[1]", "lambda:1", "sqrt", "sqrt(x=1)", "1if 1else 2", "'a'*9", "1\0", "max(*1)"],
)  # fmt: skip
def test_what_is_no_sum_or_too_large_a_one_is_told_at_once(expression):
    began = time.process_time()
    assert error(tools.built_in(seconds=60).call("calculator", {"expression": expression}))
    assert time.process_time() - began < 10  # 9**9**9 itself never ends


def test_dates_units_and_words():
    call = tools.built_in(seconds=60).call
    assert json.loads(call("date", {"date": "2024-2-28", "days": 2})) == {
        "date": "2024-3-1",
        "weekday": "星期五",
    }
    assert json.loads(call("date", {"date": "2023-03-01", "days": -1}))["date"] == "2023-2-28"
    for wrong in ({"date": "2023-02-29"}, {"date": "今天"}, {"date": "2024-01-01", "days": 10**30}):
        assert error(call("date", wrong))
    assert json.loads(call("units", {"value": 3, "unit": "千米", "to": "米"})) == {
        "value": 3000,
        "unit": "米",
    }
    assert (
        json.loads(call("units", {"value": 36.5, "unit": "摄氏度", "to": "华氏度"}))["value"]
        == 97.7
    )
    assert json.loads(call("units", {"value": 0.3, "unit": "斤", "to": "克"}))["value"] == 150
    assert "米" in error(call("units", {"value": 1, "unit": "米", "to": "克"}))
    assert error(call("units", {"value": float("inf"), "unit": "米", "to": "里"}))
    assert json.loads(call("lookup", {"key": " 苹果"})) == {"苹果": tools.PRICES["苹果"]}
    assert "月亮" in error(call("lookup", {"key": "月亮"}))


# ---- the sandbox --------------------------------------------------------------------------------------------------

whole = pytest.mark.skipif(
    sys.platform != "linux" or bool(sandbox.missing()), reason="this kernel gives no namespaces"
)


def run(code: str, **limits):
    return sandbox.run(code, **{"seconds": 60} | limits)


def test_code_gets_its_input_and_nothing_else(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    code = "import os, sys\nprint(input()[::-1], os.environ.get('SECRET'), os.listdir('.'), len(sys.argv))"
    found = run(code, stdin="好人")
    assert (found.outcome, found.code, found.stdout) == ("done", 0, "人好 None [] 1\n"), found
    assert run("import sys; print('x'); sys.exit(3)").code == 3
    assert "ZeroDivisionError" in run("1/0").stderr and run("def f(:").outcome == "failed"
    with pytest.raises(ValueError, match="100,000"):
        run("#" * 100_001)


def test_an_endless_loop_endless_output_and_too_much_memory_end():
    late = run("print('a', flush=True)\nwhile True: pass", seconds=1)
    assert (late.outcome, late.stdout) == ("late", "a\n")
    much = run("while True: print('x' * 1000)", output=50_000)
    assert much.outcome == "too much output" and 50_000 < len(much.stdout) < 200_000
    assert "MemoryError" in run("x = bytearray(10**9)", memory_mb=256).stderr
    large = run(
        "with open('a', 'wb') as f:\n  for _ in range(99): f.write(bytes(2**20))", files_mb=4
    )
    assert "OSError" in large.stderr


@whole
def test_forks_are_bounded_and_none_outlives_the_code():
    bomb = """
import os, time
made = 0
try:
    for _ in range(100):  # it would end by itself
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError:
    print(made)
"""
    found = run(bomb, processes=8)
    assert found.outcome == "done" and 1 <= int(found.stdout) <= 8
    assert found.seconds < 50  # nobody waited for those that sleep


@whole
def test_there_is_no_network_and_no_file_but_its_own(tmp_path):
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    connect = "import socket\nsocket.create_connection(('127.0.0.1', {}), 5)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "unreachable" in run(connect.format(server.getsockname()[1])).stderr
    home = os.path.expanduser("~")
    places = [
        f"{tmp_path}/secret",
        f"{home}/x",
        "/tmp/x",
        f"{RECIPE}/x",
        "/dev/shm/x",
        "/run/x",
        "/etc/x",
    ]
    code = f"""
for place in {places}:
    for mode in ("r", "w"):
        try:
            open(place, mode)
            print(place, mode)
        except OSError:
            pass
open("mine", "w").write("好")
print(open("mine").read())
import os, signal
try:
    os.kill({os.getpid()}, signal.SIGKILL)
except OSError as error:
    print(type(error).__name__)
"""
    assert run(code).stdout == "好\nProcessLookupError\n"


def test_what_the_kernel_does_not_give_is_named(monkeypatch, tmp_path):
    """As in a container that may make no namespaces: limits and time hold all the same."""
    inner = tmp_path / "without.py"
    inner.write_text(f"""
import sys
sys.path.insert(0, {str(RECIPE)!r})
from toolcall import sandbox
def refused(*_):
    raise PermissionError
sandbox.new_user = sandbox.only_own_files = sandbox.own_network = sandbox.own_processes = refused
sandbox.become_nobody = refused
sandbox.main()
""", encoding="utf-8")  # fmt: skip
    monkeypatch.setattr(sandbox, "__file__", str(inner))
    found = run("print(1)")
    assert (found.outcome, found.stdout) == ("done", "1\n"), found.stderr
    assert found.missing == ("files", "network", "processes")
    left = "import os, time\nif os.fork() == 0:\n  time.sleep(60)\nprint(2)"
    found = run(left)
    assert (found.outcome, found.stdout) == ("done", "2\n") and found.seconds < 50
    assert run("while True: pass", seconds=1).outcome == "late"
    inner.write_text("raise RuntimeError('no')", encoding="utf-8")
    assert (run("").outcome, "no" in run("").stderr) == ("not started", True)


def test_many_sandboxes_at_once_from_threads():
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: run(f"print({n})").stdout}))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}\n" for n in range(6)}
