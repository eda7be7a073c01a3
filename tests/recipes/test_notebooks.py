"""Every notebook: committed empty, short, and running top to bottom from a copy of its recipe under another name."""

import json
import shutil
import sys

import harness
import nbformat
import pytest
from harness import RECIPES, ROOT

NOTEBOOKS = sorted(ROOT.glob("*/*.ipynb"))
CELL_SECONDS = 300
SAID = {  # what must be seen, e.g. the faults that train_qwen/data.ipynb puts into its raw files
    "train_qwen/data.ipynb": ("gb18030", "empty answer", "wrong JSON", "去掉 3 行", "[["),
    "train_qwen/infer.ipynb": ("小丹",),
    "chinese_bloom/data.ipynb": (
        "gb18030",
        "belle multi-turn",
        "———— belle",
        "### 指令",
        "[[",
        "位置 0–",
    ),
    "chinese_bloom/infer.ipynb": (
        "（--stage sft）",
        "（--stage pt）",
        "模板 alpaca-zh",
        "### 回答",
        "续写",
    ),
    "chinese_clip_ddp/data.ipynb": (
        "gb18030",
        "duplicate row",
        "a web page",
        "不遮重复",
        "'[CLS]', ",
        "(3, 48, 48)",
    ),
    "chinese_clip_ddp/infer.ipynb": (
        "还没有模型",
        "维，相似度乘",
        "随便猜的 R@1：0.008",
        "1,408 added",
        "三个蓝色的三角形：最近的",
        "字节",
    ),
    "chatglm_lora/data.ipynb": (
        "gb18030",
        "context/target",
        "empty answer",
        "wrong history",
        "[gMASK]<sop>[[",
        "块内",
    ),
    "chatglm_lora/infer.ipynb": (
        "还没有模型",
        "[gMASK]<sop>【",
        "还没有名字",
        "preference.jsonl 1 rows",
    ),
    "baichuan2_dpo/data.ipynb": (
        "gb18030",
        "hh strings",
        "different prompts",
        "are the same",
        "[[",
        "写一遍",
    ),
    "baichuan2_dpo/infer.ipynb": (
        "还没有模型",
        "<reserved_106>书店几点开门？<reserved_107>【",
        "训练前的奖励",
        "胜率",
    ),
    "internlm_sft/data.ipynb": (
        "'identity': ",
        "作为一个大语言模型",
        "换掉 1 个回答",
        "是的，我是小丹，来自丹谱。",
        "[[",
    ),
    "internlm_sft/infer.ipynb": ("identity_zh", "小石", "小丹", "字节"),
    "train_llava/infer.ipynb": ("还没有模型", "模型看到 (3, 48, 48)", "沿用 0 词元", "blind"),
    "minimind_npu/data.ipynb": (
        "gb18030",
        "empty answer",
        "'一字不差': 2",
        "个窗口填满",
        "[[<think>",
    ),
    "minimind_npu/infer.ipynb": (
        "还没有会对话的模型",
        "assistant\n【",
        "想完了",
        "每字节",
        "Qwen3ForCausalLM",
    ),
    "train_llava/data.ipynb": (
        "gb18030",
        "<image> and pictures differ",
        "a picture outside the picture folder",
        "张打不开",
        "瞎猜对",
        "[[",
    ),
}


# steps of the quick run that an infer notebook makes when it finds no model: enough for its last
# cell, and to see what it shows
QUICK_STEPS = {
    "baichuan2_dpo": 40,
    "chatglm_lora": 150,
    "chinese_bloom": 30,
    "chinese_clip_ddp": 60,
    "train_llava": 30,
    "minimind_npu": {"pretrain": 40, "sft": 40},
}
# the fixtures of finished runs
FINISHED = {"train_qwen": "tiny_run", "internlm_sft": "internlm_run"}


def name(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=NOTEBOOKS, ids=name)
def notebook(request):
    return request.param


def test_there_are_notebooks():
    recipes = [recipe for recipe in RECIPES if (ROOT / recipe / "infer.ipynb").exists()]
    assert {f"{r}/{n}.ipynb" for r in recipes for n in ("data", "infer")} == set(
        map(name, NOTEBOOKS)
    )
    assert {"train_qwen", "chinese_bloom"} <= set(recipes)


def test_committed_empty_and_short(notebook):
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert content.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in code), (
        "outputs not stripped"
    )
    assert code[0].metadata.get("tags") == ["parameters"]
    assert len(content.cells) <= 15
    assert all(len(cell.source.splitlines()) <= 20 for cell in content.cells)
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 120
    assert content.cells[0].cell_type == "markdown" and any(
        "\u4e00" <= c <= "\u9fff" for c in content.cells[0].source
    )
    assert content.cells[-1].cell_type == "code" and "assert " in content.cells[-1].source
    assert notebook.parent.name not in notebook.read_text(encoding="utf-8"), (
        "a copied recipe has another name"
    )


@pytest.fixture(scope="module", autouse=True)
def forked_kernels(tmp_path_factory):
    """Kernels begin as other processes of the tests do: with the libraries imported."""
    folder = tmp_path_factory.mktemp("jupyter")
    python = harness.forked_python(harness.environment()) or sys.executable
    spec = folder / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    command = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    settings = {"argv": command, "display_name": "Python 3", "language": "python"}
    spec.write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        yield


def execute(notebook, tmp_path, **parameters) -> str:
    """Run a copy with other parameters; -> everything it printed or displayed as text."""
    from nbclient import NotebookClient

    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignore)
    recipe = shutil.copytree(notebook.parent, tmp_path / "my_model", ignore=ignore)
    content = nbformat.read(recipe / notebook.name, as_version=4)
    first = next(cell for cell in content.cells if cell.cell_type == "code")
    first.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    NotebookClient(
        content, timeout=CELL_SECONDS, resources={"metadata": {"path": str(recipe)}}
    ).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.mark.slow
def test_runs_as_it_is(notebook, request, tmp_path, monkeypatch):
    """Infer notebooks on a finished run where other tests make one too, else on the quick one that
    they make."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parameters = {}
    if notebook.stem == "infer":
        recipe = notebook.parent.name
        if recipe in FINISHED:
            parameters = {"MODEL": str(request.getfixturevalue(FINISHED[recipe])[0])}
        else:
            parameters = {"QUICK_STEPS": QUICK_STEPS[recipe]}
    text = execute(notebook, tmp_path, **parameters)
    for expected in SAID.get(name(notebook), ()):
        assert expected in text
    left = {path.name for path in (tmp_path / "my_model").iterdir()} - {"__pycache__"}
    assert left == {path.name for path in notebook.parent.iterdir()} - {"__pycache__"}, (
        "it wrote into the recipe"
    )
