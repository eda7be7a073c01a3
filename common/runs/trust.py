"""What may run code when it is loaded, and whose it is: runs sign their checkpoints with a key that
only their user can read.

The signature stands in complete.json, over its list of all files with their sha256, so that it
holds wherever the folder is moved to. Without the sha256 it would say nothing of what the files
hold: a checkpoint saved with DANPU_CHECKSUM=size is not signed. It is asked for where a file may
run code when it is loaded (run_folder.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import pickle
import re
import secrets
import stat
import tempfile
from pathlib import Path

SIGNATURE = "signature"
BYTES = 32
# what torch.load says of a pickle that is more than tensors
CODE = re.compile("GLOBAL|Unsupported (class|operand)|instruction")


def holds_code(error: Exception) -> bool:
    """Whether torch.load refused a pickle, with `error`, because it is more than tensors."""
    return isinstance(error, pickle.UnpicklingError) and bool(CODE.search(str(error)))


# ---- signatures ----------------------------------------------------------------------------------


def key_file() -> Path:
    """$DANPU_KEY, or a file in the user's home. RuntimeError where there is no home."""
    return Path(os.environ.get("DANPU_KEY") or "~/.local/state/danpu/key").expanduser()


def sign(content: dict) -> str | None:
    """The signature of `content` by this user's key, which the first call makes; None where there
    can be none (see why_no_key)."""
    try:
        return _signature(content, _key())
    except (OSError, ValueError, RuntimeError):
        return None


def why_foreign(content: dict) -> str | None:
    """None where `content` has the signature of this user's key, else the reason in a few words."""
    found = content.get(SIGNATURE)
    if not found:
        return "no run signed it"
    expected = sign(content)
    if expected is None:
        return why_no_key()
    if not hmac.compare_digest(str(found).encode(), expected.encode()):
        return f"it is not signed with {key_file()}"
    return None


def why_no_key() -> str | None:
    """None where this user has a key or could make one, else the reason."""
    try:
        _key()
    except (OSError, ValueError, RuntimeError) as error:
        return f"there is no key to sign with ({error})"
    return None


def _signature(content: dict, key: bytes) -> str:
    signed = {name: value for name, value in content.items() if name != SIGNATURE}
    text = json.dumps(signed, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    path = key_file()
    if not path.exists():
        _make_key(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(f"others can read {path}: chmod 600 it, or take it away")
    key = path.read_bytes().strip()
    if len(key) < BYTES:
        raise ValueError(f"{path} is no key: take it away")
    return key


def _make_key(path: Path) -> None:
    """Written whole before it has its name; where two runs make one, the first stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent)  # for this user only
    try:
        with open(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            _name_it(part, path)
    finally:
        os.unlink(part)


def _name_it(part: str, path: Path) -> None:
    """FileExistsError where another run was first."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(Path(part).read_bytes())
