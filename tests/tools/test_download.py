"""`python -m tools.download` against a local hub with faults: what a user sees, and what stands on the disk."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from harness import ROOT, error_line, expect, finish, start
from hub import Hub
from safetensors.numpy import save

from tools import download

REPO = "org/model"
W = "model.safetensors"
rng = np.random.default_rng(0)


def tensors(count: int) -> bytes:
    return save({"a": rng.integers(0, 1000, count, dtype=np.int32), "b": np.ones(3, np.float32)})


SMALL = {"config.json": b'{"model_type": "none"}', "words.txt": rng.bytes(300_000).hex().encode()}
FILES = SMALL | {W: tensors(270_000)}  # a bit more than 1 MiB
SIZE = len(FILES[W])


@pytest.fixture
def hub():
    with Hub({REPO: dict(FILES)}) as made:
        yield made


@pytest.fixture
def get(tmp_path, monkeypatch):
    """Run the command: get(hub, flags..., what=..., code=..., VARIABLE=...) -> out, err, error (its last line).

    As a process of its own where the environment or the frame matters; else inside this one, which is faster.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import close_session
    from modelscope_hub.config import set_default_config

    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HF_TOKEN",
        "MODELSCOPE_API_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16
    )  # 10 MiB: what a cut loses at most
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    close_session()

    def words(flags, what):
        return [str(word) for word in (what, "--to", tmp_path, *flags)]

    def begin(hub, *flags, what=REPO, **env):
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "home", "NO_PROXY": "*"} | env
        command = [sys.executable, "-m", "tools.download", *words(flags, what)]
        return start(command, fork=False, **settings)

    def inside(hub, *flags, what=REPO):
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        set_default_config(None)  # it has read the variables
        monkeypatch.setattr(sys, "argv", ["tools.download", *words(flags, what)])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                download.main(words(flags, what))
            except SystemExit as error:
                code = 1 if isinstance(error.code, str) else error.code
                err.write(f"\nerror: {error.code}\n" if isinstance(error.code, str) else "")
        return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())

    def run(hub, *flags, code=0, what=REPO, **env):
        result = (
            finish(begin(hub, *flags, what=what, **env), 60)
            if env
            else inside(hub, *flags, what=what)
        )
        if code is None:
            return result
        if code:
            result.error = error_line(result, code)
        return expect(result, code)

    run.begin = begin
    run.folder = tmp_path / "model"
    return run


def stands(folder: Path, files: dict[str, bytes] = FILES) -> None:
    """The folder holds exactly these files, byte by byte, beside hidden records."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    assert {name for name in found if not name.startswith((".danpu", ".cache/"))} == set(files)
    for name, data in files.items():
        assert found[name].read_bytes() == data, name


# ---- the plain way ------------------------------------------------------------------------------------------


def test_a_model_arrives_complete_and_a_second_call_fetches_nothing(hub, get):
    left_out = {
        "pytorch_model.bin": b"p" * 10,
        "modeling_new.py": b"print()",
        "onnx/model.onnx": b"o",
        ".gitattributes": b"",
    }
    nested = {"sub/folder/vocabulary 词 [1].json": b"[1, 2]"}
    hub.repos[REPO] |= left_out | nested
    planned = get(hub, "--dry_run").stdout
    assert not get.folder.exists() and "4 files, 1.6 MiB" in planned
    assert (
        "left out: .gitattributes, modeling_new.py, onnx/model.onnx, pytorch_model.bin" in planned
    )
    assert "4 files, 1.6 MiB, complete" in get(hub).stdout
    stands(get.folder, FILES | nested)
    sent = hub.sent()
    get(hub)
    get(hub, what=get.folder)
    assert hub.sent() == sent


def test_chosen_files_only(hub, get):
    hub.repos[REPO]["modeling_new.py"] = b"print()"
    get(hub, "--include", "*.json", "*.py", "--exclude", "none*")
    stands(get.folder, {k: v for k, v in hub.repos[REPO].items() if k.endswith(("json", "py"))})
    assert "no safetensors to fetch" in get(hub, "--include", "*.yaml", code=1).error
    get(hub)
    stands(get.folder, hub.repos[REPO])


def test_pickles_only_when_asked(get, tmp_path):
    files = SMALL | {"pytorch_model.bin": b"\x80\x04pickle", "training_args.bin": b"\x80\x04"}
    with Hub(
        {REPO: files, "org/both": FILES | files, "org/gguf": SMALL | {"q4.gguf": b"GGUF"}}
    ) as hub:
        refused = get(hub, code=1)
        assert "2 left out: pytorch_model.bin, training_args.bin" in refused.stdout
        assert "--allow_pickle takes pickles" in refused.error
        assert "--allow_pickle" in get(hub, "--include", "*.bin", code=1).error
        assert hub.sent("pytorch_model.bin") == 0
        get(hub, "--allow_pickle")
        stands(get.folder, files)
        get(hub, "--allow_pickle", what="org/both")
        stands(tmp_path / "both")
        assert "--include takes other formats" in get(hub, what="org/gguf", code=1).error


def test_start_does_not_import_torch():
    code = (
        "import sys, tools.download; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    words = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert words == ["False", "False"]


# ---- faults on the way --------------------------------------------------------------------------------------


def test_a_cut_connection_is_continued_at_its_byte(hub, get):
    hub.fault(W, "cut", at=400_000)
    hub.fault(W, "cut", at=800_000)
    get(hub)
    stands(get.folder)
    starts = [seen.start for seen in hub.asked(W)]
    assert starts[0] == 0 and 300_000 < starts[1] <= 400_000 and 700_000 < starts[2] <= 800_000


BROKEN_ON_THE_WAY = {
    "one bit wrong": ("flip", {"at": 777_777}, "1 of 3 files arrived broken"),
    "too short": ("length", {"by": -9}, f"should be of size {SIZE}"),
    "503": ("status", {"code": 503}, "answers 503 for org/model"),
    "404": ("status", {"code": 404}, "answers 404 for org/model"),
}


@pytest.mark.parametrize("name", BROKEN_ON_THE_WAY)
def test_what_arrives_broken_is_not_kept_and_the_same_command_goes_on(name, hub, get):
    kind, settings, words = BROKEN_ON_THE_WAY[name]
    hub.fault(W, kind, **settings)
    assert words in get(hub, code=1).error
    assert not (get.folder / W).exists()
    assert f"  {W}: missing" in get(hub, "--verify", code=1).stdout
    get(hub)
    stands(get.folder)


PAGE = b"<html>sign in</html>"  # shorter than config.json
NOTHING = ("page", {"body": b""})
CUT = ("cut", {"at": 400_000})
FALSE_ANSWERS = [
    ("hf", "listing", [("page", {"body": PAGE})]),
    ("hf", W, [("page", {"body": PAGE})]),
    ("hf", W, [NOTHING]),
    ("hf", W, [CUT, ("page", {"body": PAGE})]),
    ("hf", W, [CUT, NOTHING]),
    ("hf", W, [CUT, ("status", {"code": 416})]),
    ("hf", "config.json", [NOTHING]),
    ("hf", "config.json", [("page", {"body": PAGE.ljust(len(SMALL["config.json"]))})]),
    ("modelscope", "listing", [("page", {"body": PAGE})]),
    ("modelscope", W, [("page", {"body": PAGE}), NOTHING]),
    ("modelscope", W, [CUT, ("status", {"code": 416})]),
]


@pytest.mark.parametrize("source, file, faults", FALSE_ANSWERS)
def test_a_false_answer_never_stands_under_the_name_of_a_file(
    source, file, faults, hub, get, caplog
):
    """Pages with 200, empty bodies, 416 on a resume: the client asks again by itself, or one line
    says what was wrong and the same command goes on."""
    for kind, settings in faults:
        hub.fault(file, kind, **settings)
    first = get(hub, "--source", source, code=None)
    if first.returncode:
        error_line(first, 1)
        assert not (get.folder / file).exists()
        get(hub, "--source", source)
    stands(get.folder)
    assert "secret-of-the-store" not in first.stdout + first.stderr + caplog.text


def test_refusals_are_one_line_with_a_remedy(hub, get):
    assert "answers 404 for org/other" in get(hub, what="org/other", code=1).error
    assert "answers 404 for org/model, v9" in get(hub, "--revision", "v9", code=1).error
    hub.fault("listing", "status", code=500)
    assert "answers 500 for org/model" in get(hub, code=1).error
    hub.token = "hf_secret"
    refused = get(hub, code=1).error
    assert (
        "answers 401" in refused and "set HF_TOKEN" in refused and "accept its licence" in refused
    )
    assert not get.folder.exists()
    nobody = Hub({})  # never started
    for server in nobody.servers:
        server.server_close()
    lost = get(nobody, code=1).error
    assert (
        "cannot be reached" in lost
        and "Connection refused" in lost
        and "HF_ENDPOINT chooses a mirror" in lost
    )


def test_a_model_that_is_closed_to_this_token(hub, get, monkeypatch):
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = get(hub, code=1).error
    assert "answers 403" in refused and "hf_wrong" not in refused


def test_a_token_goes_to_the_hub_only_and_is_never_shown(hub, get, monkeypatch):
    """The store answers 400 to anyone who brings a token."""
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = get(hub)
    stands(get.folder)
    assert any(seen.server == "store" for seen in hub.seen)
    shown = result.stdout + result.stderr + (get.folder / ".danpu.json").read_text()
    assert "hf_secret" not in shown and "secret-of-the-store" not in shown


def test_the_real_command_with_a_mirror_a_proxy_and_no_network(hub, get):
    """Only the proxy knows a host of this name."""
    get(hub, HF_ENDPOINT="http://hub.test", HTTP_PROXY=hub.url, NO_PROXY="")
    stands(get.folder)
    assert {seen.server for seen in hub.seen} == {"hub", "store"}
    assert all(seen.proxied for seen in hub.seen)
    assert "offline mode is enabled" in get(hub, HF_HUB_OFFLINE=1, code=1).error
    assert (
        "unrecognized arguments: --repare; did you mean --repair?"
        in get(hub, "--repare", HF_HUB_OFFLINE=1, code=2).error
    )


# ---- interrupted --------------------------------------------------------------------------------------------


def halfway(hub: Hub) -> threading.Event:
    """Slow the weights down; the event is set when the rest has arrived and some of them."""
    reached = threading.Event()
    hub.fault(W, "slow", seconds=0.03)

    def seen(name, count):
        if name == W and count > 200_000 and hub.sent("words.txt") == len(SMALL["words.txt"]):
            reached.set()

    hub.on_bytes = seen
    return reached


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_download_keeps_complete_files(sign, hub, get):
    reached = halfway(hub)
    process = get.begin(hub)
    assert reached.wait(30)
    process.send_signal(sign)
    result = finish(process, 5)
    assert result.returncode == 75 and "Traceback" not in result.stderr
    assert f"complete files stay. Again: python -m tools.download {REPO}" in result.stderr
    assert not (get.folder / W).exists()
    get(hub)
    stands(get.folder)
    assert hub.sent("words.txt") == len(SMALL["words.txt"])
    assert not list(get.folder.rglob("*.incomplete"))


def test_a_second_download_waits_for_the_first(hub, get):
    reached = halfway(hub)
    first = get.begin(hub)
    assert reached.wait(30)
    get(hub)
    expect(finish(first))
    stands(get.folder)
    assert hub.sent(W) == SIZE


@pytest.fixture
def small_disk(tmp_path):
    """A 24 MB file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    assert not mounted.returncode, (
        f"a small tmpfs cannot be mounted; run the tests as root: {mounted.stderr.strip()}"
    )
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_too_little_space_is_reported_before_anything_is_fetched(get, small_disk):
    with Hub({REPO: SMALL | {W: tensors(7_000_000)}}) as hub:
        assert "27.3 MiB to fetch, more than is free" in get(hub, "--to", small_disk, code=1).error
        assert hub.sent(W) == 0


def test_full_disk_is_one_line_and_the_same_command_goes_on(hub, get, small_disk):
    filler = small_disk / "filler"

    def fill(path, count):
        if path == W and not filler.exists():
            room = os.statvfs(small_disk)
            filler.write_bytes(b"0" * (room.f_bavail * room.f_frsize - 300_000))

    hub.on_bytes = fill
    hub.repos[REPO][W] = tensors(3_000_000)
    line = get(hub, "--to", small_disk, "--include", W, code=1).error
    assert (
        "no space left on device" in line
        and "Free some space, then: python -m tools.download" in line
    )
    assert not (small_disk / "model" / W).exists()
    filler.unlink()
    hub.on_bytes = None
    get(hub, "--to", small_disk)
    stands(small_disk / "model", hub.repos[REPO])


# ---- verify and repair --------------------------------------------------------------------------------------


def damage(file: Path, at: int) -> None:
    """Flip one bit, and leave size and date as they were."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_finds_and_repair_fetches_only_what_is_broken(hub, get):
    get(hub)
    asked = len(hub.seen)
    assert "3 files, 1.6 MiB, all right" in get(hub, "--verify", what=get.folder).stdout
    damage(get.folder / W, 500_000)
    (get.folder / "config.json").unlink()
    result = get(hub, "--verify", code=1)
    assert f"  {W}: its sha256 is not {hashlib.sha256(FILES[W]).hexdigest()}" in result.stdout
    assert "  config.json: missing" in result.stdout
    assert "2 of 3 files broken" in result.error and len(hub.seen) == asked
    get(hub, "--repair", what=get.folder)
    stands(get.folder)
    assert hub.sent(W) == 2 * SIZE and hub.sent("words.txt") == len(SMALL["words.txt"])
    damage(get.folder / "words.txt", 5)
    assert "words.txt: its git is not" in get(hub, "--verify", code=1).stdout
    (get.folder / W).write_bytes(FILES[W][:-4])
    assert f"{W}: {SIZE - 4:,} bytes, expected {SIZE:,}" in get(hub, "--verify", code=1).stdout


def test_a_changed_file_is_only_replaced_by_repair(hub, get):
    get(hub)
    mine = get.folder / "config.json"
    mine.write_text("{}")
    assert "2 bytes, expected 22; --repair fetches it again" in get(hub, code=1).error
    assert mine.read_text() == "{}"
    get(hub, "--repair")
    stands(get.folder)


def test_repair_adopts_a_folder_of_another_program(hub, get):
    get.folder.mkdir()
    for path, data in FILES.items():
        (get.folder / path).write_bytes(data)
    damage(get.folder / W, 9000)
    assert "was not fetched from" in get(hub, what=get.folder, code=1).error
    get(hub, "--repair")
    stands(get.folder)
    assert hub.sent(W) == SIZE and hub.sent("words.txt") == hub.sent("config.json") == 0
    hub.repos["other/model"] = dict(SMALL)
    assert "was not fetched from other/model" in get(hub, what="other/model", code=1).error


def test_a_repair_is_no_update_and_an_update_leaves_no_mixture(hub, get):
    """The new version has one file instead of two shards; a loader must never find old ones beside new ones."""
    shards = {f"m-{n}.safetensors": save({"a": np.full(9, n, np.float32)}) for n in (1, 2)}
    hub.repos[REPO] = SMALL | shards
    get(hub)
    first, hub.commit = hub.commit, "beef" * 10
    (get.folder / "m-1.safetensors").unlink()
    # this hub has only its newest version
    get(hub, "--repair", what=get.folder, code=1)
    assert hub.seen[-1].path.endswith(first)
    hub.repos[REPO] = FILES | {"config.json": b'{"model_type": "new"}'}
    hub.fault(W, "status", code=500)
    get(hub, code=1)
    assert not list(get.folder.glob("*.safetensors"))
    get(hub)
    stands(get.folder, hub.repos[REPO])
    assert hub.sent("words.txt") == len(SMALL["words.txt"])


def test_an_update_spares_what_the_user_changed(hub, get):
    get(hub)
    mine = get.folder / "config.json"
    mine.write_text("mine")
    hub.commit = "beef" * 10
    hub.repos[REPO]["config.json"] = b'{"model_type": "new"}'
    assert "--repair fetches it again" in get(hub, code=1).error
    assert mine.read_text() == "mine"


def test_names_that_lead_out_are_refused(hub, get, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "elsewhere/out.json"
    outside.write_text("mine")
    for name in (
        "../elsewhere/out.json",
        str(outside),
        "sub/../../elsewhere/out.json",
        "link/out.json",
    ):
        get.folder.mkdir(exist_ok=True)
        (get.folder / "link").symlink_to(tmp_path / "elsewhere")
        hub.repos[REPO] = FILES | {name: b"{}"}
        assert "leads out of the folder" in get(hub, "--repair", "--include", "*", code=1).error, (
            name
        )
        assert outside.read_text() == "mine" and hub.sent() == 0
        shutil.rmtree(get.folder)


def header(text: bytes | dict, data: int = 8) -> bytes:
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def one(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "empty file": b"",
    "cut in the length": b"\x10\0\0",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "no JSON": header(b"{]"),
    "no utf-8": header(b'{"\xff": 1}'),
    "unknown dtype": header({"a": one("F33")}),
    "shape does not fit": header({"a": one(shape=(3,))}),
    "overlap": header({"a": one(), "b": one(offsets=(4, 12))}, 12),
    "gap": header({"a": one(), "b": one(offsets=(12, 20))}, 20),
    "ends behind the file": header({"a": one()}, 4),
    "more bytes than tensors": header({"a": one()}, 12),
    "backwards": header({"a": one(offsets=(8, 0))}),
    "huge shape": header({"a": one(shape=(1 << 62, 1 << 62))}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_recognised(name, tmp_path):
    (tmp_path / W).write_bytes(BROKEN[name])
    assert "broken safetensors file" in download.problem(tmp_path, W, {"size": len(BROKEN[name])})
    sound = header({"a": one()})
    (tmp_path / W).write_bytes(sound)
    assert download.problem(tmp_path, W, {"size": len(sound)}) is None


def test_a_file_that_is_broken_in_the_repository_is_not_kept(hub, get):
    hub.repos[REPO][W] = BROKEN["overlap"]
    assert f"  {W}: broken safetensors file" in get(hub, code=1).stdout
    assert not (get.folder / W).exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 5\n" % 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", W, "merges.txt"])
def test_a_pointer_of_git_lfs_is_named_as_that(name, hub, get):
    hub.repos[REPO][name] = LFS
    result = get(hub, code=1)
    assert f"  {name}: only a Git LFS pointer" in result.stdout
    assert "not in this repository; another --revision, --source or HF_ENDPOINT" in result.error
    assert not (get.folder / name).exists() and "Again" not in result.error
    (get.folder / name).write_bytes(LFS)  # as a clone without git-lfs leaves it
    (get.folder / download.RECORD).unlink()
    told = get(hub, "--verify", what=get.folder, code=1).error
    assert f"Git LFS pointers without contents ({name})" in told and "git lfs pull" in told


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
BOTH = {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    ).encode()
}


@pytest.mark.parametrize("place", ["", "vision/"])
def test_an_index_that_names_a_shard_nobody_has_ends_before_the_weights(place, hub, get):
    files = BOTH | {SHARDS[0]: FILES[W]}
    hub.repos[REPO] = dict(SMALL) | {place + name: data for name, data in files.items()}
    told = get(hub, code=1).error
    assert f"{REPO} is not whole: its index names files that are not in the repository" in told
    assert f"({SHARDS[1]})" in told
    assert hub.sent(place + SHARDS[0]) == 0
    hub.repos[REPO][place + SHARDS[1]] = FILES[W]
    hub.commit = "beef" * 10
    get(hub)
    stands(get.folder, hub.repos[REPO])


def test_an_index_that_nobody_follows_is_no_fault(hub, get):
    hub.repos[REPO] = (
        FILES | BOTH | {"pytorch_model.bin.index.json": b'{"weight_map": {"a": "x.bin"}}'}
    )
    get(hub)
    assert "all right" in get(hub, "--verify").stdout
    hub.repos["org/half"] = SMALL | BOTH | {name: FILES[W] for name in SHARDS}
    get(hub, "--include", "*.json", what="org/half")  # chosen so
    assert "all right" in get(hub, "--verify", what=get.folder.parent / "half").stdout


def test_a_shard_that_is_gone_is_found_by_verify(hub, get):
    hub.repos[REPO] = SMALL | BOTH | {name: FILES[W] for name in SHARDS}
    get(hub)
    record = json.loads((get.folder / download.RECORD).read_text())
    del record["files"][SHARDS[1]]  # a record of another program's making
    (get.folder / SHARDS[1]).unlink()
    (get.folder / download.RECORD).write_text(json.dumps(record))
    told = get(hub, "--verify", code=1).error
    assert f"its index names files that are not there ({SHARDS[1]})" in told


# ---- ModelScope and aria2c ----------------------------------------------------------------------------------


def test_modelscope(hub, get, monkeypatch):
    hub.token = "ms_secret"
    refused = get(hub, "--source", "modelscope", code=1).error
    assert "ModelScope answers 401" in refused and "MODELSCOPE_API_TOKEN" in refused
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    hub.fault(W, "cut", at=400_000)
    hub.fault(W, "flip", at=777_777)
    hub.repos[REPO] |= {"pytorch_model.bin": b"p", "modeling_new.py": b"print()"}
    get(hub, "--source", "modelscope")
    stands(get.folder)
    damage(get.folder / W, 5000)
    assert "its sha256 is not" in get(hub, "--verify", code=1).stdout
    get(hub, "--repair", what=get.folder)
    stands(get.folder)
    lost = get(hub, "--source", "modelscope", what="org/none", code=1).error
    assert "ModelScope answers 404 for org/none" in lost and "names differ by hub" in lost


def test_without_modelscopes_client_the_line_says_what_to_install(hub, get, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    line = get(hub, "--source", "modelscope", code=1).error
    pins = (ROOT / "requirements-dev.txt").read_text().split()
    assert f"pip install {next(pin for pin in pins if pin.startswith('modelscope'))}" in line


STUB = """#!{python}
# Stands in for aria2c where it is not installed: the same input, one connection a file, continued.
import hashlib, os, sys, urllib.request
address, *options = sys.stdin.read().splitlines()
options = dict(line.strip().split("=", 1) for line in options + sys.argv if "=" in line)
target = os.path.join(options["--dir"], options["out"])
os.makedirs(os.path.dirname(target), exist_ok=True)
have = os.path.getsize(target) if os.path.exists(target) else 0
request = urllib.request.Request(address, headers={{"Range": f"bytes={{have}}-"}})
with urllib.request.urlopen(request) as answer, open(target, "ab") as file:
    while block := answer.read1(1 << 16):
        file.write(block)
if os.path.getsize(target) < have + int(answer.headers["Content-Length"]):
    sys.exit(1)
if hashlib.sha256(open(target, "rb").read()).hexdigest() != options["checksum"].removeprefix("sha-256="):
    os.remove(target)
    sys.exit(32)
"""


@pytest.fixture
def aria2(tmp_path, monkeypatch):
    """PATH with an aria2c that notes its arguments: the real one if it is installed, else a stand-in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    real = shutil.which("aria2c")
    if real is None:
        real = folder / "stand-in"
        real.write_text(STUB.format(python=sys.executable))
        real.chmod(0o755)
    (folder / "aria2c").write_text(f'#!/bin/sh\necho "$@" >> {folder}/argv\nexec {real} "$@"\n')
    (folder / "aria2c").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_aria2c_fetches_large_files_and_continues_inside_them(hub, get, aria2, monkeypatch):
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repos[REPO][W] = tensors(3_000_000)  # real aria2c keeps pieces of 1 MiB
    size = len(hub.repos[REPO][W])
    hub.fault(W, "cut", at=5_000_000, times=20)
    assert "aria2c ended with code" in get(hub, "--aria2", code=1).error
    assert not (get.folder / W).exists()
    hub.faults.clear()
    sent = hub.sent(W)
    get(hub, "--aria2")
    stands(get.folder, hub.repos[REPO])
    assert size - 5_000_000 <= hub.sent(W) - sent < size
    argv = (aria2 / "argv").read_text()
    assert argv.count("--input-file=-") == 2 and "secret" not in argv and "http" not in argv


def test_aria2c_checks_the_hash(hub, get, aria2):
    hub.fault(W, "flip", at=777_777)
    assert "aria2c ended with code 32" in get(hub, "--aria2", code=1).error
    get(hub, "--aria2")
    stands(get.folder)


def test_aria2c_is_missing(hub, get, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no aria2c on PATH" in get(hub, "--aria2", code=2).error


# ---- data sets ----------------------------------------------------------------------------------------------


ROWS = "datasets/org/rows"


def shard(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"text": texts}), sink, compression="none")
    return sink.getvalue().to_pybytes()


def corpus() -> dict[str, bytes]:
    """Two parquet shards, jsonl and csv beside what is not to be fetched."""
    texts = [rng.bytes(999).hex() for _ in range(400)]
    shards = {f"data/{n}-of-00102.parquet": shard(texts) for n in ("00100", "00101")}
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(9))
    others = {
        "more/part.jsonl": lines.encode(),
        "pairs.csv": b"text\nx\n",
        "README.md": b"# licence",
    }
    unwanted = {"rows.py": b"print()", "cache.pkl": b"\x80\x04", ".gitattributes": b""}
    return shards | others | unwanted


def of_corpus(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name: data
        for name, data in files.items()
        if not name.endswith(("py", "pkl", ".gitattributes"))
    }


@pytest.mark.parametrize(
    "source, fault, settings",
    [("hf", "flip", {"at": 5000}), ("modelscope", "status", {"code": 404})],
)
def test_a_data_set_is_fetched_checked_and_repaired(source, fault, settings, get, tmp_path):
    """A cut and a broken file on the way; what was damaged later is found and fetched again."""
    files = corpus()
    broken, cut = [name for name in files if name.endswith("parquet")]
    flags = ("--dataset", "--source", source)
    with Hub({ROWS: files}) as hub:
        hub.fault(broken, fault, **settings)
        hub.fault(cut, "cut", at=100_000)
        told = get(hub, *flags, what="org/rows", code=1)
        assert "3 left out: .gitattributes, cache.pkl, rows.py" in told.stdout
        folder = tmp_path / "rows"
        assert not (folder / broken).exists()
        sent = hub.sent(cut)
        get(hub, *flags, what="org/rows")
        stands(folder, of_corpus(files))
        assert hub.sent(cut) == sent
        assert "5 files" in get(hub, "--verify", what=folder).stdout
        damage(folder / broken, 9000)
        assert "its sha256 is not" in get(hub, "--verify", what=folder, code=1).stdout
        get(hub, "--repair", what=folder)
        stands(folder, of_corpus(files))
        described = get(hub, "--manifest", what=folder).stdout
        assert "2 .parquet, 1.5 MiB, 800 rows of text: string" in described
        known = json.loads((folder / "danpu_manifest.json").read_text())
        assert (known["type"], known["files"][cut]["rows"]) == ("dataset", 400)
        assert "--try is for models" in get(hub, "--try", what=folder, code=1).error


def test_some_shards_of_a_data_set_are_rows_to_train_on(get, tmp_path):
    from common.data.load import load_rows

    files = corpus()
    with Hub({ROWS: files}) as hub:
        some = ("--include", "data/*-of-0010*.parquet", "*.jsonl", "--exclude", "*/00100*")
        get(hub, "--dataset", *some, what="org/rows")
        get(hub, "--manifest", what=tmp_path / "rows")
    rows, stats = load_rows(tmp_path / "rows", "text", cache_dir=tmp_path / "cache")
    assert len(rows) == stats["read"] == 400 + 9


def test_data_sets_and_models_are_not_taken_for_each_other(get, tmp_path):
    card = {"README.md": b"# nothing here", "rows.py": b"print()"}
    files = {"a.parquet": b"PAR1 not at all"}
    with Hub(
        {REPO: FILES, ROWS: corpus(), "datasets/org/card": card, "datasets/org/torn": files}
    ) as hub:
        for source in ("hf", "modelscope"):
            ask = ("--source", source)
            told = get(hub, *ask, what="org/rows", code=1).error
            assert (
                "no such model" in told
                and "There is a data set of that name: add --dataset" in told
            )
            told = get(hub, *ask, "--dataset", code=1).error
            assert (
                "no such data set" in told and "a model of that name: leave --dataset out" in told
            )
            assert "There is" not in get(hub, *ask, "--dataset", what="org/none", code=1).error
        assert "no data to fetch" in get(hub, "--dataset", what="org/card", code=1).error
        assert "broken parquet file" in get(hub, "--dataset", what="org/torn", code=1).stdout
        hub.repos["datasets/org/model"] = corpus()
        get(hub)
        assert "was not fetched from org/model" in get(hub, "--dataset", code=1).error
        assert "ORG/NAME, without address" in get(hub, what="datasets/org/rows", code=2).error


# ---- what the model is --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A real model in three shards."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from common import tiny

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = tiny.make_tokenizer(["hello world 你好"] * 3, 400, ["<end>"], eos_token="<end>")
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    made = tiny.save_tiny(config, tokenizer, folder)
    tokenizer.save_pretrained(folder / "sharded")
    model = AutoModelForCausalLM.from_pretrained(made)
    model.save_pretrained(folder / "sharded", max_shard_size="900KB")
    return folder / "sharded"


def test_manifest_and_trial_of_a_fetched_model(tiny_model, hub, get, tmp_path):
    from transformers import AutoModelForCausalLM

    hub.repos["org/tiny"] = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    flags = ["--manifest", "--try", "--window", 128, "--batch", 4]
    printed = get(hub, *flags, what="org/tiny").stdout
    folder = tmp_path / "tiny"
    assert len(list(folder.glob("*.safetensors"))) == 3
    found = json.loads((folder / "danpu_manifest.json").read_text())
    facts = found["model"]
    assert facts["parameters"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    shape = {
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    shape |= {
        "hidden_size": 96,
        "vocab_size": 400,
        "max_position_embeddings": 512,
        "dtypes": ["F32"],
    }
    assert shape.items() <= facts.items()
    assert found["parallel"] == {"tensor": [1, 2], "pipeline": [1, 2, 3, 6], "expert": []}
    assert "tensor parallel: 1, 2" in printed and "你好，请用一句话介绍你自己。 -> '" in printed
    rows = found["memory"]
    assert len(rows) == 4 * 5 and found["memory_for"] == "4 rows of 128 tokens, LoRA rank 16"
    assert all(row["checkpointing"] <= row["GiB"] for row in rows)
    for name, known in found["files"].items():
        data = (folder / name).read_bytes()
        assert known["size"] == len(data)
        assert (
            known.get("sha256", hashlib.sha256(data).hexdigest())
            == hashlib.sha256(data).hexdigest()
        )
    assert (found["repo"], found["commit"]) == ("org/tiny", hub.commit)
    asked = len(hub.seen)
    get(hub, "--manifest", what=folder)  # of a folder that is there: no network
    assert len(hub.seen) == asked


def test_a_type_nobody_knows_and_a_model_that_does_not_write(get, tmp_path):
    plain = {
        "model_type": "from-the-future",
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "hidden_size": 64,
    }
    plain |= {"vocab_size": 100, "intermediate_size": 256, "num_experts": 8}
    other = {"model_type": "vit", "num_hidden_layers": 2}
    configs = {"org/new": plain, "org/vit": other}
    repos = {
        name: {"config.json": json.dumps(config).encode(), W: FILES[W]}
        for name, config in configs.items()
    }
    expert = {"mlp.experts.0": np.ones(270_000, np.float32), "b": np.ones(3, np.float32)}
    repos["org/new"][W] = save(expert)
    with Hub(repos) as hub:
        printed = get(hub, "--manifest", what="org/new").stdout
        assert (
            "from-the-future, 270,003 parameters" in printed
            and "expert parallel: 1, 2, 4, 8" in printed
        )
        for name in repos:
            assert "cannot be loaded" in get(hub, "--try", what=name, code=1).error
    (tmp_path / "empty").mkdir()
    assert "no config.json" in get(hub, "--manifest", what=tmp_path / "empty", code=1).error


# ---- command line -------------------------------------------------------------------------------------------


def test_mistakes_on_the_command_line(hub, get, tmp_path):
    assert "did you mean --dry_run?" in get(hub, "--dry-run", code=2).error
    assert "invalid choice: 'ftp'" in get(hub, "--source", "ftp", code=2).error
    assert "invalid int value: 'many'" in get(hub, "--window", "many", code=2).error
    assert "0 of 0 files broken" in get(hub, "--verify", code=1).error
    (tmp_path / "empty").mkdir()
    assert "was not fetched from" in get(hub, what=tmp_path / "empty", code=1).error
    assert not hub.seen
