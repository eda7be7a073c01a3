"""Shared fixtures. The repository root goes on sys.path so that tests import `common` like a recipe
does."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

# before torch: two workers with a team of threads each on two cores mostly wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "npu"), str(ROOT)]


def pytest_configure(config):
    """A folder for the fork servers (support/forking.py), one for all workers of a session."""
    if "DANPU_FORKS" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="danpu-forks-"))
        (folder / "owner").write_text(str(os.getpid()))
        os.environ["DANPU_FORKS"] = str(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prepared data, tiny models and the key of this session stay out of the user's home; subprocesses
    inherit it."""
    shared = tmp_path_factory.getbasetemp()
    if (
        "PYTEST_XDIST_WORKER" in os.environ
    ):  # one for all workers: what one has prepared serves the others
        shared = shared.parent
    os.environ["DANPU_CACHE"] = str(shared / "danpu-cache")
    os.environ["DANPU_KEY"] = str(shared / "danpu-key")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch-extensions"))


def first_command(tmp_path_factory, recipe: str, **how) -> tuple[Path, str]:
    """A recipe's first command in one process, run once for all workers: (output folder, what it
    printed). how: to start it."""
    from harness import expect, shell

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / f"run-of-{recipe}"
    printed = out.with_suffix(".txt")
    with FileLock(out.with_suffix(".lock")):
        if not printed.is_file():
            done = expect(shell(ROOT / recipe / "train_zero2.sh", OUTPUT=out, NPROC=1, **how))
            printed.write_text(done.stdout, encoding="utf-8")
    return out, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """train_qwen's; DANPU_TEST_RUN names one made before."""
    if made := os.environ.get("DANPU_TEST_RUN"):
        return Path(made), ""
    return first_command(tmp_path_factory, "train_qwen")


@pytest.fixture(scope="session")
def internlm_run(tmp_path_factory):
    """internlm_sft's, as a fork."""
    return first_command(tmp_path_factory, "internlm_sft", fork=True)


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
    "core/test_training.py",
    "npu/test_npu.py",
    "recipes/test_contract.py",
    "recipes/test_faults.py",
    "recipes/minimind_npu/test_minimind_gguf.py",  # fetches 77 MB on a new machine
    "recipes/baichuan2_dpo/test_dpo.py",
    "recipes/chatglm_lora/test_chatglm.py",
    "recipes/chinese_bloom/test_bloom.py",
    "recipes/minimind_npu/test_minimind_training.py",
    "recipes/minimind_npu/test_minimind_use.py",
    "recipes/test_notebooks.py",
    "real/test_real_lora.py",
    "real/test_real_training.py",
)


ROOMS = ("core", "tools", "npu", "gpu", "real")


def pytest_addoption(parser):
    rooms = f"{', '.join(ROOMS)}, fast (nothing slow) or a recipe; see tests/run.sh"
    parser.addoption("--room", default="", help=rooms)


def belongs(item, room: str) -> bool:
    """Whether a test is part of `--room`; of a recipe: its own tests, the tests of all recipes for
    it, and the fast ones of the core."""
    place = item.path.relative_to(TESTS).parts
    slow = item.get_closest_marker("slow") is not None
    if room in ROOMS:
        return place[0] == room
    if room == "fast":
        return not slow
    if place[0] == "core":
        return not slow
    if place[0] != "recipes":
        return False
    return place[1] == room or (len(place) == 2 and room in item.name)


def pytest_collection_modifyitems(config, items):
    room = config.getoption("--room")
    if room:
        others = [item for item in items if not belongs(item, room)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if belongs(item, room)]
    order = {name: number for number, name in enumerate(LONGEST)}

    def place(item) -> int:
        return order.get(item.path.relative_to(TESTS).as_posix(), len(order))

    items.sort(key=place)
