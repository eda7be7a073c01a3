"""Shared fixtures. The repository root goes on sys.path so that tests import `common` like a recipe
does."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# before torch: two workers with a team of threads each on two cores mostly wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "tests/npu"), str(ROOT)]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prepared data and tiny models of this session stay out of the user's cache; subprocesses
    inherit it."""
    shared = tmp_path_factory.getbasetemp()
    if (
        "PYTEST_XDIST_WORKER" in os.environ
    ):  # one for all workers: what one has prepared serves the others
        shared = shared.parent
    os.environ["DANPU_CACHE"] = str(shared / "danpu-cache")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch-extensions"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """train_qwen's first command, run once: (output folder, what it printed). DANPU_TEST_RUN names
    one made before."""
    from harness import expect, shell

    if made := os.environ.get("DANPU_TEST_RUN"):
        return Path(made), ""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one run for all workers
        shared = shared.parent
    out, printed = shared / "tiny-run", shared / "tiny-run.txt"
    with FileLock(shared / "tiny-run.lock"):
        if not printed.is_file():
            printed.write_text(
                expect(shell(ROOT / "train_qwen/train_zero2.sh", OUTPUT=out)).stdout,
                encoding="utf-8",
            )
    return out, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def npu():
    """npu(soc, devices) -> variables under which a child process sees simulated NPUs
    (tests/npu/npu_sim)."""
    from npu_sim import simulator

    return simulator.environment


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if not (path := shutil.which("chromium")):
        pytest.fail(
            "no chromium: run tests/run.sh as root, or apt-get install chromium fonts-noto-cjk"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


LONGEST = (  # begin with these, so that no worker ends long after the other
    "training", "npu", "bloom", "chatglm", "notebooks", "dpo", "recipes", "minimind_training", "minimind_use",
    "quickstart",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
