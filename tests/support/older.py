"""Folders as transformers 4 reads them: an environment of its own, made once beside the other caches.

    read([folder, ...]) -> [{"ids", "start", "chat", "ends", "logits"}, ...]

Only what differs is installed (transformers, its tokenizers and hub); torch is that of this environment.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
TEXT = "你好 <b> 12 hello，世界"
SCRIPT = """
import json, sys, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith("4.57"), transformers.__version__
text, *folders = sys.argv[1:]
for folder in folders:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = {"ids": tokenizer(text)["input_ids"], "keys": sorted(tokenizer(text)), "chat": None}
    found["special"] = sorted(tokenizer.all_special_ids)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        found["chat"] = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    if Path(folder, "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found["ends"] = model.generation_config.eos_token_id
        with torch.no_grad():
            found["logits"] = model(torch.tensor([found["ids"] * 3])).logits[0, -1].tolist()
    print(json.dumps(found))
"""


def read(folders: list) -> list[dict]:
    """What transformers 4.57 makes of each folder; an error of its own ends the test with it."""
    command = [sys.executable, "-c", SCRIPT, TEXT, *map(str, folders)]
    packages = os.pathsep.join(filter(None, [str(site()), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def site() -> Path:
    """The folder of the packages; RuntimeError when pip cannot fetch them."""
    home = Path(os.environ.get("TRANSFORMERS4_CACHE") or Path.home() / ".cache" / "danpu")
    version = f"py{sys.version_info[0]}{sys.version_info[1]}"
    folder = home / "-".join([PACKAGES[0].replace("==", "-"), version])
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / "transformers4.lock"):
        if not folder.is_dir():  # else another process was faster
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    try:
        done = subprocess.run(
            [*pip, str(unfinished), *PACKAGES], text=True, capture_output=True, errors="replace"
        )
        if done.returncode:
            raise RuntimeError(f"fetching {' '.join(PACKAGES)} failed: {done.stderr[-500:]}")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def agree(folder, theirs: dict, logits: bool = True) -> None:
    """Assert that this environment's transformers reads the folder as `theirs`, what `read` gave."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert theirs["keys"] == ["attention_mask", "input_ids"]  # more than that generate() refuses
    assert theirs["ids"] == tokenizer(TEXT)["input_ids"]
    assert theirs["special"] == sorted(tokenizer.all_special_ids)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": TEXT}]
        ours = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        assert theirs["chat"] == ours["input_ids"]
    if not logits:
        return
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert theirs["ends"] == model.generation_config.eos_token_id
    with torch.no_grad():
        ours = model(torch.tensor([theirs["ids"] * 3])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(theirs["logits"]), ours, atol=1e-4, rtol=1e-3)
