"""What every recipe promises: the whole folder, READMEs whose commands are right, a copy under another
name that runs on two ranks like on one, a page that opens."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from harness import RECIPES, ROOT, expect, finish, history, report, shell, start, weights

from common.runs import old_flags
from common.runs.report import KEYS

TWINS = [ROOT, ROOT / "tools/manager", *(ROOT / name for name in RECIPES)]


def commands(readme: Path) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("folder", TWINS, ids=lambda p: p.name)
def test_readme_twins_have_equal_code_blocks_and_sections(folder):
    english, chinese = folder / "README.md", folder / "README_zh.md"
    assert commands(english) and commands(english) == commands(chinese)
    sections = [
        len(re.findall(r"^#+ ", f.read_text(encoding="utf-8"), re.M)) for f in (english, chinese)
    ]
    assert sections[0] == sections[1]
    assert len(re.findall("[\u4e00-\u9fff]", chinese.read_text(encoding="utf-8"))) > 200


@pytest.mark.parametrize("folder", TWINS, ids=lambda p: p.name)
def test_files_named_in_readme_commands_exist(folder):
    for block in commands(folder / "README.md"):
        for path in re.findall(r"[\w./-]+\.(?:sh|py|json)\b", block):
            made = ("output/", "my.json", "/models", "train_mymodel/")
            assert path.startswith(made) or (ROOT / path).exists(), path


def in_recipe(recipe: str, code: str, **env) -> str:
    """What Python code prints that runs beside a recipe's modules, in a process of its own: they
    register their models with transformers."""
    paths = [str(ROOT / "tests/support"), str(ROOT), str(ROOT / recipe)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"]
    return expect(finish(start(command, **env))).stdout


def flags_of(recipe: str) -> set[str]:
    scripts = [file.stem for file in (ROOT / recipe).glob("train*.py")]
    code = (
        "from dataclasses import fields\n"
        "from importlib import import_module\n"
        "from transformers import TrainingArguments\n"
        f"modules = [import_module(name) for name in {scripts}]\n"
        "kinds = [module.Args for module in modules if hasattr(module, 'Args')]\n"
        "print(*(field.name for kind in (*kinds, TrainingArguments) for field in fields(kind)))"
    )
    return set(in_recipe(recipe, code).split())


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_named_in_readme_commands_exist(recipe):
    """Of the commands that end in train.py; the scripts beside it answer for themselves."""
    known = flags_of(recipe) | {"size", "from_weight"} | set(old_flags.RENAMED_QUIETLY)
    blocks = "\n".join(commands(ROOT / recipe / "README.md")).replace("\\\n", " ")
    lines = [line.split("#")[0] for line in blocks.splitlines()]
    lines = [
        line for line in lines if re.search(r"/(train(_\w+)?|pretrain)\.sh|/train(_rl)?\.py", line)
    ]
    assert lines
    for line in lines:
        for flag in re.findall(r" --(\w+)", line.split(".sh")[-1].split("train.py")[-1]):
            assert flag in known, line


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_whole(recipe):
    folder = ROOT / recipe
    names = "README.md README_zh.md train.py app.py ds_zero2.json ds_zero3.json train_zero2.sh"
    for name in [*names.split(), "train_zero3.sh", "data.ipynb", "infer.ipynb", "data"]:
        assert (folder / name).exists(), name
    assert len((folder / "train.py").read_text().splitlines()) <= 320
    for file in folder.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.stat().st_size <= 250 * 1024, file
    code = [
        file.read_text() for kind in ("py", "sh", "ipynb") for file in folder.rglob(f"*.{kind}")
    ]
    others = [other for other in RECIPES if other != recipe]
    assert not any(
        re.search(rf"(import|from) {other}\b", text) for text in code for other in others
    )
    for stage in (2, 3):
        settings = json.loads((folder / f"ds_zero{stage}.json").read_text())
        assert settings["zero_optimization"]["stage"] == stage


def test_common_knows_no_model_and_only_device_knows_devices():
    files = [file for kind in ("py", "ipynb") for file in ROOT.glob(f"*/**/*.{kind}")]
    files = [file for file in files if file.relative_to(ROOT).parts[0] not in ("tests", ".venv")]
    assert len(files) > 60
    for file in files:
        text = file.read_text(encoding="utf-8")
        # machine.py answers before torch can be imported
        if file.name not in ("device.py", "machine.py"):
            assert not re.search(r"""\.cuda\(|\.npu\(|["'](cuda|npu)[:"']""", text), file
        if "common" in file.relative_to(ROOT).parts:
            assert not re.search(r"qwen|bloom|chatglm|baichuan|llava|minimind", text, re.I), file
        assert not re.search(r"torch\.load\((?!.*weights_only=True)", text), file


# flags of a short run: samples as a path, so that no built-in base is taught first
SHORT = ["--max_steps", 4, "--logging_steps", 1]
SHORT += ["--report_to", "none", "--save_strategy", "no", "--bf16", "false"]
SHORT += ["--model_max_length", 128, "--max_eval_samples", 16]
ANSWERS = ["--eval_generate", 4, "--max_new_tokens", 16]
GENERATES_NOTHING = {"chinese_clip_ddp"}
MORE = {
    "chatglm_lora": ["--data_path", "data"],
    "baichuan2_dpo": ["--data_path", "data"],
    "internlm_sft": ["--data_path", "data"],
    "minimind_npu": ["--stage", "sft", "--size", "tiny", "--optimizer", "adamw"],
    "train_llava": ["--model_name_or_path", "tiny"],  # one stage
}


def short_flags(folder: Path, recipe: str) -> list:
    more = [str(folder / word) if word == "data" else word for word in MORE.get(recipe, [])]
    return [*SHORT, *([] if recipe in GENERATES_NOTHING else ANSWERS), *more]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """recipe -> its copy (with common/) under another name, run by train_zero2.sh on two ranks: the
    copy's folder and its output. Made when first asked for."""
    made = {}

    def make(recipe: str) -> tuple[Path, Path]:
        if recipe not in made:
            root = tmp_path_factory.mktemp("copy")
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "common", root / "common", ignore=ignore)
            folder = Path(shutil.copytree(ROOT / recipe, root / "my recipe", ignore=ignore))
            size = ["--per_device_train_batch_size", 2]
            flags = [*short_flags(folder, recipe), *size]
            expect(shell(folder / "train_zero2.sh", *flags, cwd="/", fork=True))
            # a recipe of stages has a folder for each
            found = next((root / "output/my recipe").rglob("report.json"))
            made[recipe] = folder, found.parent
        return made[recipe]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_under_another_name_runs(copied, recipe):
    _, out = copied(recipe)
    facts = report(out)
    assert facts["recipe"] == "my recipe" and facts["engine"] == "zero-2"
    assert facts["world_size"] == 2 and facts.keys() >= set(KEYS)
    assert (out / "loss.png").is_file() and (out / "final").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_equal_one(copied, tmp_path, recipe):
    """ZeRO-2 on two ranks and one plain process: the same losses, the same weights."""
    folder, two = copied(recipe)
    command = [
        "python",
        ROOT / "common/launch.py",
        1,
        folder / "train.py",
        "--output_dir",
        tmp_path,
    ]
    size = ["--per_device_train_batch_size", 4]
    expect(finish(start([*command, *short_flags(folder, recipe), *size])))
    expected = history(tmp_path)
    found = history(two)
    assert found.keys() == expected.keys() and len(expected) == 4
    for step in expected:
        assert abs(found[step] - expected[step]) < 1e-4 * abs(expected[step]), (step, expected)
    one = weights(tmp_path / "final")
    for name, tensor in weights(two / "final").items():
        assert (tensor.float() - one[name].float()).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_demo_opens(copied, recipe):
    """build_demo on what the run left: a page that answers."""
    _, out = copied(recipe)
    code = (
        "import app, urllib.request\n"
        "from common.demo import serve\n"
        f"demo = app.build_demo({str(out)!r})\n"
        "address = serve.serve(demo)\n"
        "print('status', urllib.request.urlopen(address, timeout=20).status)\n"
        "demo.close()"
    )
    assert "status 200" in in_recipe(recipe, code)
