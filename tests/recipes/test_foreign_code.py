"""Models, adapters, tokenizers and checkpoints that would run code, given to every script that takes
one (support/faults/foreign.py): one line, and nothing runs.
"""

import json
import re
import sys

import pytest
from harness import RECIPES, ROOT, expect, finish, start

DRIVER = ROOT / "tests/support/faults/foreign.py"
ASKS_A_SERVER = ("translate.py",)  # its --model is a name at an endpoint
FLAGS = r'"--(?:model\w*|adapter|base|reference\w*|teacher|tokenizer|from_config)"'


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """recipe -> {case: what the script said}; made when first asked for."""
    made = {}

    def ask(recipe: str) -> dict:
        if recipe not in made:
            folder = tmp_path_factory.mktemp("foreign")
            expect(finish(start([sys.executable, DRIVER, recipe, folder])))
            made[recipe] = json.loads((folder / "said.json").read_text(encoding="utf-8"))
        return made[recipe]

    return ask


def refusal(found: dict) -> str:
    """The one line of a refusal, of which nothing was run and nobody asked."""
    assert not found["ran"], "code was run"
    assert found["code"] == 1, found["said"][-2000:]
    assert "Traceback" not in found["said"] and "[y/N]" not in found["said"]
    errors = [line for line in found["said"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and found["said"].rstrip().endswith(errors[0]), found["said"][-2000:]
    assert "weights_only" not in errors[0] and "trust_remote_code" not in errors[0]
    return errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_models_adapters_and_tokenizers_that_bring_code_are_refused(said, recipe):
    cases = {case: found for case, found in said(recipe).items() if case.count(" --")}
    assert len(cases) >= 11
    for case, found in cases.items():
        line = refusal(found)
        assert "holds code" in line or "(auto_map)" in line, f"{case}: {line}"
        assert "/" in line, f"{case}: which folder is meant? {line}"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_script_that_opens_a_model_is_among_them(said, recipe):
    folder = ROOT / recipe
    asked = {case.split()[0] for case in said(recipe)}
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name in ASKS_A_SERVER:
            assert "from_pretrained" not in text and "models.load" not in text
        elif "__main__" in text and re.search(FLAGS, text):
            assert path.relative_to(folder).as_posix() in asked, path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pickle_with_code_in_a_checkpoint_is_refused(said, recipe):
    """The marker names it and has its hash; Trainer and the loop read tensors only."""
    cases = {case: found for case, found in said(recipe).items() if " resumes: " in case}
    assert cases
    unread = cases.pop("train.py resumes: training_args.bin", None)
    assert unread is None or (unread["code"], unread["ran"]) == (0, False)
    for case, found in cases.items():
        assert "a file of the checkpoint holds code" in refusal(found), case


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_pickles_of_deepspeed_are_opened_of_this_users_runs_only(said, recipe):
    """A folder with a marker, right hashes, a run.json and somebody else's signature."""
    for folder in ("folder", "output folder"):
        line = refusal(said(recipe)[f"train.py zero: another's {folder}"])
        assert "it is not signed with" in line and "--trust_checkpoint true" in line
    vouched = said(recipe).get("train.py zero: vouched for")
    assert vouched is None or vouched["ran"], "nothing would have run: the cases prove nothing"
