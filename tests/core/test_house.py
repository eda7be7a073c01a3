"""The house's habits that ruff cannot check: what may import what, which names of the library are
touched, one idea a line."""

import ast
import inspect
import re
import subprocess
import sys

import pytest
import transformers
from harness import RECIPES, ROOT

LISTED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True)
PRODUCT = [
    ROOT / name
    for name in LISTED.stdout.split()
    if not name.startswith("tests/") and (ROOT / name).is_file()
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PRODUCT}
ROOMS = {  # room of common/: the rooms that it may import; all may use the flat core
    "data": {"data"},
    "runs": {"data", "runs"},
    "fast": {"data", "fast"},
    "convert": {"data", "convert", "runs"},
    "demo": {"data", "runs", "convert", "demo"},
}


def name(path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree) -> list[str]:
    """Modules that a file imports from common/, e.g. "common.data.load"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_the_core_is_flat_and_the_rooms_are_known():
    core = {path.name for path in (ROOT / "common").glob("*.py")} - {"__init__.py"}
    assert core == {
        "device.py",
        "collators.py",
        "trainer.py",
        "callbacks.py",
        "cli.py",
        "tiny.py",
        "voice.py",
        "launch.py",
    }
    rooms = {path.parent.name for path in (ROOT / "common").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room):
    for path, tree in TREES.items():
        if name(path).startswith(f"common/{room}/"):
            for module in imported(tree):
                parts = module.split(".")
                if parts[0] == "common" and parts[1] in ROOMS:
                    assert parts[1] in ROOMS[room], f"{name(path)} imports {module}"


def test_common_imports_no_recipe_and_no_tool():
    for path, tree in TREES.items():
        if name(path).startswith("common/"):
            for module in imported(tree):
                assert module.split(".")[0] not in (*RECIPES, "tools", "tests"), name(path)


def test_nothing_in_common_imports_in_a_circle():
    """Imports within functions count too."""
    files = {name(path)[:-3].replace("/", "."): tree for path, tree in TREES.items()}
    files = {module: tree for module, tree in files.items() if module.startswith("common.")}
    needs = {
        module: {
            other
            for other in files
            for found in imported(tree)
            if f"{found}.".startswith(f"{other}.")
        }
        for module, tree in files.items()
    }
    while needs:  # take away what needs nothing that is left
        free = {module for module, others in needs.items() if not others & needs.keys() - {module}}
        assert free, f"in a circle, or above one: {sorted(needs)}"
        needs = {module: others for module, others in needs.items() if module not in free}


TRAINER = transformers.Trainer
# names of transformers' Trainer that begin with an underscore and are used in spite of that; each
# with the reason. Today: none.
PRIVATE_NAMES: set[str] = set()


def test_no_private_name_of_the_trainer_is_overridden_or_used():
    source = inspect.getsource(TRAINER)
    theirs = {n for n in dir(TRAINER) if n.startswith("_") and not n.startswith("__")}
    theirs |= set(re.findall(r"self\.(_[a-z]\w+)", source))
    found = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
            if not bases & {"Trainer", "RecipeTrainer"}:
                continue
            defined = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            read = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            found |= {f"{name(path)}: {n}" for n in (defined | read) & theirs}
    assert found == PRIVATE_NAMES


def nested_conditionals(tree) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse, node.test))
    ]


def walrus_in_comprehension(tree) -> list[int]:
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return [
        node.lineno
        for outer in ast.walk(tree)
        if isinstance(outer, kinds)
        for node in ast.walk(outer)
        if isinstance(node, ast.NamedExpr)
    ]


def long_functions(tree) -> list[int]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, kinds) and node.end_lineno - node.lineno > 80
    ]


def long_mains(tree) -> list[int]:
    return [
        node.lineno
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name == "main"
        and node.end_lineno - node.lineno >= 60
    ]


@pytest.mark.parametrize(
    "fault", [nested_conditionals, walrus_in_comprehension, long_functions, long_mains]
)
def test_one_idea_a_line(fault):
    samples = ("make_data.py", "sample_facts.py")
    found = {name(path): fault(tree) for path, tree in TREES.items() if path.name not in samples}
    assert not {file: lines for file, lines in found.items() if lines}


def test_no_line_is_kept_from_the_formatter():
    samples = ("make_data.py", "sample_facts.py")
    for path in PRODUCT:
        if path.name not in samples:
            assert "# fmt: skip" not in path.read_text(encoding="utf-8"), name(path)


def files_without_encoding(tree) -> list[int]:
    """Calls that read or write text in whatever encoding the locale has."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if is_text(call) and not names_encoding(call)]


def is_text(call) -> bool:
    called = ast.unparse(call.func)
    if called in ("open", "os.fdopen"):
        return "b" not in ast.unparse(call.args[1] if len(call.args) > 1 else ast.Constant("r"))
    if called.startswith("subprocess."):
        return any(keyword.arg == "text" for keyword in call.keywords)
    return called.endswith((".read_text", ".write_text"))


def names_encoding(call) -> bool:
    """By its word, or in its place: read_text("utf-8")."""
    by_place = ast.unparse(call.func).endswith(".read_text") and bool(call.args)
    return by_place or any(keyword.arg == "encoding" for keyword in call.keywords)


def test_every_text_file_has_an_encoding():
    found = {name(path): files_without_encoding(tree) for path, tree in TREES.items()}
    assert not {file: lines for file, lines in found.items() if lines}


def test_data_is_read_without_torch():
    """N processes may read rows before any of them needs a device."""
    code = "import sys, common.data.load, common.data.split; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("table", ["CASES.md", "FAULTS.md"])
def test_every_test_that_a_table_names_exists(table):
    """They say what happens in which situation, and when what breaks; a name without a file may be
    in any."""
    tests = ROOT / "tests"
    known = {}
    for path in tests.rglob("test_*.py"):
        known[path] = re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    everywhere = {test for found in known.values() for test in found}
    text = (tests / table).read_text(encoding="utf-8")
    named = re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)(?:\[[^`]*\])?`", text)
    assert len(named) > 40
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert "test_" in row or row.startswith(("| fault", "| situation", "|---")), row
    for file, test in named:
        assert test in (known[tests / file] if file else everywhere), (file, test)
