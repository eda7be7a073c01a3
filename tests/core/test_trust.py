"""Whose checkpoint is opened, and what loaders say of what would run code."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from common import tiny
from common.convert import models
from common.data.labels import encode_prompt, set_template
from common.demo.chat_model import ChatModel
from common.runs import checkpoint, errors, run_folder, trust
from tools import download, manifest

ZERO = {"config": {"zero_optimization": {"stage": 2}}}


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch):
    monkeypatch.setenv("DANPU_KEY", str(tmp_path / "home/.local/state/danpu/key"))
    return tmp_path / "home/.local/state/danpu/key"


def by_another(monkeypatch, tmp_path):
    """What follows is written or read by somebody with another key."""
    monkeypatch.setenv("DANPU_KEY", str(tmp_path / "another"))


def save(out, engine="zero-2"):
    folder = out / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    (folder / "global_step4/mp_rank_00_model_states.pt").write_bytes(b"x" * 100)
    (folder / "latest").write_text("global_step4")
    checkpoint.mark_complete(folder, step=4, world_size=2, engine=engine)
    return folder


def look(out, trusted=False, zero=True, **changes):
    known = {"resume_from_checkpoint": None, "world_size": 2, "max_steps": 12}
    known["hf_deepspeed_config"] = SimpleNamespace(**ZERO) if zero else None
    args = SimpleNamespace(**known | changes)
    return run_folder.inspect(args, out, {"seed": 1}, False, False, trusted)


# ---- the key -------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_for_this_user_only(key):
    with ThreadPoolExecutor(8) as pool:
        signatures = set(pool.map(trust.sign, [{"step": 1}] * 32))
    assert len(signatures) == 1 and None not in signatures
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert os.listdir(key.parent) == ["key"]


def test_a_key_is_made_where_files_cannot_be_linked(key, monkeypatch):
    def link(part, path):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert trust.why_no_key() is None and trust.sign({"step": 1}) == trust.sign({"step": 1})
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and os.listdir(key.parent) == ["key"]


def no_home(key):
    key.parents[3].write_text("a file where the home should be")


def empty_key(key):
    key.parent.mkdir(parents=True)
    key.touch(0o600)


def open_key(key):
    trust.sign({})
    key.chmod(0o644)


@pytest.mark.parametrize("harm", [no_home, empty_key, open_key])
def test_without_a_key_a_run_says_so_and_its_checkpoints_need_the_flag(harm, key, tmp_path):
    harm(key)
    out = tmp_path / "out"
    verdict = look(out)
    assert "--trust_checkpoint true" in verdict.say[0] and verdict.exit is None
    assert not look(tmp_path / "plain", zero=False).say, "where nothing asks for a signature"
    folder = save(out)
    assert checkpoint.why_incomplete(folder) is None
    assert look(out).exit == 1
    assert look(out, trusted=True).start == str(folder)


# ---- whose checkpoint ----------------------------------------------------------------------------


def test_own_checkpoints_are_known_wherever_they_lie(tmp_path):
    look(tmp_path / "out")
    folder = save(tmp_path / "out")
    assert look(tmp_path / "out").start == str(folder)
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert look(moved).start == str(moved / "checkpoint-4")
    copied = shutil.copytree(moved / "checkpoint-4", tmp_path / "copy/checkpoint-4")
    named = look(tmp_path / "new", resume_from_checkpoint=str(copied))
    assert named.start == str(copied)


def resigned(folder, monkeypatch, tmp_path):
    """Another file, a marker with its hash, signed by whoever did it."""
    by_another(monkeypatch, tmp_path)
    (folder / "global_step4/mp_rank_00_model_states.pt").write_bytes(b"y" * 100)
    checkpoint.mark_complete(folder, step=4, world_size=2, engine="zero-2")


def signature_copied(folder, monkeypatch, tmp_path):
    signature = json.loads((folder / checkpoint.MARKER).read_text())[trust.SIGNATURE]
    resigned(folder, monkeypatch, tmp_path)
    content = json.loads((folder / checkpoint.MARKER).read_text())
    content[trust.SIGNATURE] = signature
    (folder / checkpoint.MARKER).write_text(json.dumps(content))


def unsigned(folder, monkeypatch, tmp_path):
    content = json.loads((folder / checkpoint.MARKER).read_text())
    del content[trust.SIGNATURE]
    (folder / checkpoint.MARKER).write_text(json.dumps(content))


def other_type(folder, monkeypatch, tmp_path):
    content = json.loads((folder / checkpoint.MARKER).read_text())
    content[trust.SIGNATURE] = ["é"]
    (folder / checkpoint.MARKER).write_text(json.dumps(content))


def file_added(folder, monkeypatch, tmp_path):
    (folder / "global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"z")


def file_added_behind_a_link(folder, monkeypatch, tmp_path):
    inner = folder / "global_step4"
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    (inner / "zero_pp_rank_0.pt").write_bytes(b"x")


def facts_changed(folder, monkeypatch, tmp_path):
    content = json.loads((folder / checkpoint.MARKER).read_text())
    (folder / checkpoint.MARKER).write_text(json.dumps(content | {"step": 5}))


FORGERIES = [
    resigned,
    signature_copied,
    unsigned,
    other_type,
    file_added,
    file_added_behind_a_link,
    facts_changed,
]


@pytest.mark.parametrize("forge", FORGERIES)
def test_a_forged_checkpoint_is_another_s(forge, key, tmp_path, monkeypatch):
    out = tmp_path / "out"
    look(out)
    folder = save(out)
    before = (out / run_folder.RUN_FILE).read_bytes()
    forge(folder, monkeypatch, tmp_path)
    monkeypatch.setenv("DANPU_KEY", str(key))
    assert checkpoint.why_incomplete(folder) is None, "it looks whole"
    verdict = look(out)
    assert verdict.exit == 1 and "may be another's" in verdict.error and "\n" not in verdict.error
    assert (out / run_folder.RUN_FILE).read_bytes() == before
    assert look(out, trusted=True).start == str(folder)


def test_sizes_alone_are_no_proof_of_who_wrote_a_pickle(tmp_path, monkeypatch):
    """They would be the same after another's file has taken the place of one."""
    monkeypatch.setenv("DANPU_CHECKSUM", "size")
    out = tmp_path / "out"
    assert "DANPU_CHECKSUM=size leaves checkpoints unsigned" in look(out).say[0]
    folder = save(out)
    assert trust.SIGNATURE not in json.loads((folder / checkpoint.MARKER).read_text())
    verdict = look(out)
    assert verdict.exit == 1 and "saved without checksums (DANPU_CHECKSUM=size)" in verdict.error
    assert look(out, trusted=True).start == str(folder)


def test_what_is_read_as_tensors_only_needs_no_signature(tmp_path, monkeypatch):
    out = tmp_path / "out"
    look(out, zero=False)
    by_another(monkeypatch, tmp_path)
    folder = save(out, engine="ddp")
    monkeypatch.undo()
    assert look(out, zero=False).start == str(folder)
    assert look(out, zero=False, fsdp=["full_shard"]).exit == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert look(out, zero=False).exit == 1


def test_nothing_is_deleted_through_a_link(tmp_path):
    """A folder of somebody else may hold links to any place."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "text.txt").write_text("keep")
    out = tmp_path / "out"
    for step in (2, 4, 6):
        out.mkdir(exist_ok=True)
        (out / f"checkpoint-{step}").symlink_to(mine)
    (out / "final").symlink_to(mine)
    checkpoint.rotate(out, limit=1, step=4)
    run_folder.write_run_file(out, {"settings": {"seed": 2}})
    args = SimpleNamespace(resume_from_checkpoint=None, world_size=1, max_steps=1)
    run_folder.inspect(args, out, {"seed": 1}, True, False)
    assert (mine / "text.txt").read_text() == "keep"


# ---- models --------------------------------------------------------------------------------------

TEMPLATE = "{% for one in messages %}<{{ one.role }}>{{ one.content }}<e>{% endfor %}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    settings = {"eos_token": "<e>", "chat_template": TEMPLATE}
    tokenizer = tiny.make_tokenizer(["一二三 yes no"], 300, ["<e>"], **settings)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(sound, tmp_path):
    """A copy with Python files that leave the folder `ran`."""
    folder = shutil.copytree(sound, tmp_path / "model")
    for file in ("foreign.py", "custom_generate/generate.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    return folder


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


FOREIGN = {"auto_map": {"AutoConfig": "foreign.A", "AutoModelForCausalLM": "foreign.B"}}


@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_of_any_format_is_refused(zipped, model, tmp_path):
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    content = {"x": Bomb(tmp_path / "ran")}
    if zipped is None:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit, match="holds code, not only tensors") as end:
        models.load(AutoModelForCausalLM, str(model), dtype="auto")
    assert "\n" not in str(end.value) and not (tmp_path / "ran").exists()
    with pytest.raises(Exception, match="Weights only") as refused:
        torch.load(file, weights_only=True)
    assert "holds code" in errors.explain(refused.value)
    with contextlib.suppress(RuntimeError):  # no file of torch.save, it says afterwards
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the bomb is one"


def test_code_beside_a_known_architecture_is_left_alone(model, tmp_path):
    """Many published folders name code that transformers has long had itself."""
    change(model / "config.json", **FOREIGN)
    assert models.load(AutoConfig, str(model)).model_type == "llama"
    ChatModel(model).model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
    assert not (tmp_path / "ran").exists()


def test_nobody_is_asked_whether_code_may_run(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    change(model / "config.json", model_type="foreign", **FOREIGN)
    tokenizer = {"AutoTokenizer": ["foreign.A", "foreign.A"]}
    change(model / "tokenizer_config.json", tokenizer_class="Foreign", auto_map=tokenizer)
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(SystemExit, match=r"\(auto_map\), and nothing of that is run here"):
            models.load(kind, str(model))
    assert manifest.facts_of(model)["type"] == "foreign"
    with pytest.raises(SystemExit, match="auto_map"):
        download.main([str(model), "--try"])
    assert not asked and not (tmp_path / "ran").exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].mkdir('RAN') }}",
    "{{ cycler.__init__.__globals__.os.mkdir('RAN') }}",
    "{{ raise_exception.__globals__['os'].mkdir('RAN') }}",
    "{{ '' | attr('__class__') | attr('__mro__') }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(999999999) %}{% endfor %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(escape, model, tmp_path):
    template = TEMPLATE + escape.replace("RAN", str(tmp_path / "ran"))
    tokenizer = models.load(AutoTokenizer, str(model))
    set_template(tokenizer, template)
    try:
        ids = encode_prompt(tokenizer, [{"role": "user", "content": "yes"}])
    except ValueError as error:
        assert "the chat template refuses these messages" in str(error)
    else:
        assert tokenizer.decode(ids) == "<user>yes<e>", "what it asked for is empty"
    assert not (tmp_path / "ran").exists()
