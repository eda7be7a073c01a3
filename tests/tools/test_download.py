"""`python -m tools.download` against a hub that fails in every way: what a user sees, and what stands on the disk."""

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
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, error_line, expect, finish, start
from hub import Hub
from safetensors.numpy import save

from tools import download
from tools.hub import fetch, link, sources, weights

REPO, NAME = "org/model", "model"
rng = np.random.default_rng(0)


def tensors(count: int) -> bytes:
    return save(
        {"a": rng.integers(0, 1000, count, dtype=np.int32), "b": np.ones(3, dtype=np.float32)}
    )


SMALL = {"config.json": b'{"model_type": "none"}', "words.txt": rng.bytes(300_000).hex().encode()}
WEIGHTS = {"model.safetensors": tensors(270_000)}  # a bit more than 1 MiB
FILES = SMALL | WEIGHTS
SIZE = len(WEIGHTS["model.safetensors"])


@pytest.fixture
def hub():
    with Hub({REPO: dict(FILES)}) as made:
        yield made


@pytest.fixture
def get(tmp_path, monkeypatch):
    """Run the command: get(hub, flags..., what=..., code=..., VARIABLE=...) -> stdout, stderr, error (its last line).

    As a process of its own where the environment matters; else inside this one, which is faster.
    """
    from huggingface_hub import constants

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
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))

    def words(flags, what):
        return [str(word) for word in (what, "--to", tmp_path, "--retry_wait", 0.02, *flags)]

    def begin(hub, *flags, what=REPO, **env):
        settings = {
            "HF_ENDPOINT": hub.url,
            "MODELSCOPE_ENDPOINT": hub.url,
            "HF_HOME": tmp_path / "hf",
        }
        return start(
            [sys.executable, "-m", "tools.download", *words(flags, what)],
            fork=False,
            **settings | env,
        )

    def inside(hub, *flags, what=REPO):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setattr(sys, "argv", ["tools.download", *words(flags, what)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code, message = download.outcome(words(flags, what))
        return subprocess.CompletedProcess(
            [], code, out.getvalue(), err.getvalue() + (message or "")
        )

    def run(hub, *flags, code=0, what=REPO, **env):
        result = (
            finish(begin(hub, *flags, what=what, **env), 60)
            if env
            else inside(hub, *flags, what=what)
        )
        if code:
            result.error = error_line(result, code)
        return expect(result, code)

    run.begin = begin
    return run


def stands(folder: Path, files: dict[str, bytes] = FILES) -> None:
    """The folder holds exactly these files, byte by byte, beside our own record and lock."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert set(found) - {".danpu.json", ".danpu.lock"} == set(files)
    for path, data in files.items():
        assert found[path].read_bytes() == data, path


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.part"))


# ---- the plain way ------------------------------------------------------------------------------------------


def test_a_model_arrives_whole_and_a_second_call_fetches_nothing(hub, get, tmp_path):
    left_out = {
        "pytorch_model.bin": b"p" * 10,
        "modeling_new.py": b"print()",
        "onnx/model.onnx": b"o",
        ".gitattributes": b"",
    }
    nested = {"sub/folder/vocabulary 词.json": b"[1, 2]"}
    hub.repos[REPO] |= left_out | nested
    planned = get(hub, "--dry_run").stdout
    assert (
        not (tmp_path / NAME).exists()
        and "model.safetensors" in planned
        and "4 files, 1.6 MiB" in planned
    )
    printed = get(hub).stdout
    stands(tmp_path / NAME, FILES | nested)
    assert (
        "left out (pickle): pytorch_model.bin" in printed
        and "left out (code): modeling_new.py" in printed
    )
    assert "4 files, 1.6 MiB, whole; checked by hash" in printed
    assert f"MODEL={tmp_path / NAME} DATA=my.jsonl bash" in printed
    sent = sum(seen.sent for seen in hub.seen)
    assert (
        "all were there" in get(hub).stdout
        and "all were there" in get(hub, what=tmp_path / NAME).stdout
    )
    assert sum(seen.sent for seen in hub.seen) == sent
    assert "0 B to fetch" in get(hub, "--dry_run", what=tmp_path / NAME).stdout


def test_chosen_files_only(hub, get, tmp_path):
    hub.repos[REPO]["modeling_new.py"] = b"print()"
    get(hub, "--include", "*.json", "*.py", "--exclude", "none*")
    stands(
        tmp_path / NAME, {k: v for k, v in hub.repos[REPO].items() if k.endswith(("json", "py"))}
    )
    assert "fits --include *.yaml" in get(hub, "--include", "*.yaml", code=1).error
    get(hub)
    stands(tmp_path / NAME, hub.repos[REPO])


def test_start_does_not_import_torch():
    code = (
        "import sys, tools.download; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == [
        "False",
        "False",
    ]


# ---- faults that pass ---------------------------------------------------------------------------------------

W = "model.safetensors"
PASSING = {
    "cut once": [("cut", 1, {"at": 400_000})],
    "cut early, again and again": [("cut", 1, {"at": 1000 * n}) for n in range(1, 9)],
    "stalled": [("stall", 1, {"at": 400_000})],
    "stalled at once": [("stall", 2, {"at": 0})],
    "503 twice": [("status", 2, {})],
    "429 with Retry-After": [("status", 1, {"code": 429, "retry_after": 1})],
    "too long": [("length", 1, {"by": 50})],
    "too short": [("length", 1, {"by": -50})],
    "one bit wrong": [("flip", 1, {"at": 777_777})],
    "a web page": [("html", 1, {})],
    "wrong place": [("cut", 1, {"at": 400_000}), ("place", 1, {})],
    "cut, then one bit wrong": [("cut", 1, {"at": 400_000}), ("flip", 1, {"at": 777_777})],
}
SENT = {
    "cut once": SIZE,
    "cut early, again and again": SIZE,
    "stalled": SIZE,
    "503 twice": SIZE,
    "one bit wrong": 2 * SIZE,
}
SAID = {
    "stalled": "no bytes for 0.4 s",
    "503 twice": "answers 503",
    "429 with Retry-After": "answers 429 Too Many Requests; again in 1.0 s",
    "a web page": "sends a web page instead of the file",
    "one bit wrong": f"expected {hashlib.sha256(WEIGHTS[W]).hexdigest()}; deleted",
    "wrong place": "continues at another place",
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_by_itself(name, hub, get, tmp_path):
    for kind, times, settings in PASSING[name]:
        hub.fault(W, kind, times, **settings)
    printed = get(hub, "--stall", 0.4, "--retries", 2).stdout
    stands(tmp_path / NAME)
    assert SAID.get(name, "cut after" if "cut" in name else "") in printed
    if name in SENT:
        assert hub.sent(W) == SENT[name]  # nothing that was there is fetched again


def test_a_server_without_ranges_starts_the_file_anew(hub, get, tmp_path):
    hub.ranges = False
    hub.fault(W, "cut", at=400_000)
    get(hub)
    stands(tmp_path / NAME)
    assert hub.sent(W) == 400_000 + SIZE


def test_the_listing_is_asked_again(hub, get, tmp_path):
    hub.fault("listing", "status", 1)
    hub.fault("listing", "html", 1)
    get(hub)
    stands(tmp_path / NAME)


def test_without_hashes_two_versions_are_never_glued(hub, get, tmp_path):
    hub.hashes = False
    hub.fault("words.txt", "cut", at=200_000)
    hub.fault("words.txt", "etag")
    printed = get(hub).stdout
    new = bytes([SMALL["words.txt"][0] ^ 1]) + SMALL["words.txt"][1:]
    stands(tmp_path / NAME, FILES | {"words.txt": new})
    assert (
        hub.asked("words.txt")[1].headers["if-range"]
        and "3 of them by size and structure only" in printed
    )


def test_without_hashes_structure_is_checked_and_a_cut_resumed(hub, get, tmp_path):
    hub.hashes = False
    hub.fault("config.json", "flip", at=0)
    hub.fault(W, "cut", at=300_000)
    hub.fault(W, "cut", at=600_000)
    assert "config.json: no JSON" in get(hub).stdout
    stands(tmp_path / NAME)
    assert hub.sent(W) == SIZE


# ---- faults that do not pass --------------------------------------------------------------------------------

LASTING = {
    "one bit wrong": (
        "flip",
        {"at": 777_777},
        f"expected {hashlib.sha256(WEIGHTS[W]).hexdigest()}; deleted 3 times",
    ),
    "a web page": ("html", {}, f"sends a web page instead of the file of {SIZE:,} bytes; gave up"),
    "too long": (
        "length",
        {"by": 9},
        f"sends {SIZE + 9:,} bytes instead of the file of {SIZE:,} bytes; gave up",
    ),
    "too short": ("length", {"by": -9}, f"sends {SIZE - 9:,} bytes"),
    "503": ("status", {}, "answers 503 Service Unavailable; gave up after 3 tries"),
    "stalled": ("stall", {"at": 5000}, "no bytes for 0.2 s"),
    "404": ("status", {"code": 404}, "answers 404"),
    "another protocol": (
        "redirect",
        {"to": "ftp://x.test/y"},
        "leads to an address that is not http(s)",
    ),
    "in circles": ("redirect", {"to": "?"}, "redirects in circles"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass_leaves_nothing_under_the_name(name, hub, get, tmp_path):
    kind, settings, words = LASTING[name]
    hub.fault(W, kind, 1000, **settings)
    result = get(hub, "--retries", 2, "--stall", 0.2, code=1)
    assert (
        "1 of 3 files could not be fetched: model.safetensors: " in result.error
        and words in result.error
    )
    assert (
        not (tmp_path / NAME / W).exists()
        and (tmp_path / NAME / "words.txt").read_bytes() == SMALL["words.txt"]
    )
    assert "never arrived whole" in get(hub, "--verify", code=1).stdout
    assert "is not whole yet" in get(hub, "--manifest", what=tmp_path / NAME, code=1).error
    hub.faults.clear()
    get(hub)
    stands(tmp_path / NAME)


def test_exit_codes_and_lines_of_the_real_command(hub, get, tmp_path):
    """The other tests mostly call what is behind it."""
    assert get(hub, "--dry_run", NO_PROXY="*").stderr == ""
    hub.fault(W, "status", code=404)
    assert "answers 404 Not Found" in get(hub, NO_PROXY="*", code=1).error
    assert (
        "unknown flag --repare; did you mean --repair?"
        in get(hub, "--repare", NO_PROXY="*", code=2).error
    )
    get(hub, NO_PROXY="*")
    stands(tmp_path / NAME)


def test_refusals_are_one_line_and_not_repeated(hub, get, tmp_path):
    assert "has no model org/other" in get(hub, what="org/other", code=1).error
    assert "has no revision v9 of org/model" in get(hub, "--revision", "v9", code=1).error
    hub.token = "hf_secret"
    asked = len(hub.seen)
    refused = get(hub, code=1).error
    assert (
        "HF_TOKEN" in refused
        and f"accept the licence on {hub.url}/{REPO}" in refused
        and len(hub.seen) == asked + 1
    )
    assert "HF_TOKEN is not allowed" in get(hub, HF_TOKEN="hf_wrong", code=1).error
    assert not (tmp_path / NAME).exists()
    nobody = Hub({})  # never started
    [server.server_close() for server in nobody.servers]
    assert (
        "cannot be reached" in (lost := get(nobody, "--retries", 1, code=1).error)
        and "HF_ENDPOINT" in lost
    )
    assert "HF_HUB_OFFLINE" in get(hub, HF_HUB_OFFLINE=1, code=1).error


def test_a_token_goes_to_the_hub_only_and_is_never_shown(hub, get, tmp_path):
    """The other host answers 400 to anyone who brings a token; the folder and the output must not hold it either."""
    hub.token = "hf_secret"
    hub.fault(W, "cut", at=1000)
    result = get(hub, HF_TOKEN="hf_secret")
    stands(tmp_path / NAME)
    there = [seen for seen in hub.seen if seen.server == "cdn"]
    assert there and not any("authorization" in seen.headers for seen in there)
    shown = result.stdout + result.stderr + (tmp_path / NAME / ".danpu.json").read_text()
    assert "hf_secret" not in shown and "secret-of-the-cdn" not in shown
    asked = len(hub.seen)
    assert "answers 401" in get(hub, "--source", hub.url, HF_TOKEN="hf_secret", code=1).error
    assert not any(
        "authorization" in seen.headers for seen in hub.seen[asked:]
    )  # any address may stand in --source


# ---- interrupted --------------------------------------------------------------------------------------------


def halfway(hub: Hub, path: str = W) -> threading.Event:
    """Slow the file down; the event is set when a good part of it left the server."""
    reached = threading.Event()
    hub.fault(path, "slow", seconds=0.02)
    hub.on_bytes = lambda name, count: reached.set() if name == path and count > 200_000 else None
    return reached


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_download_goes_on_where_it_was(sign, hub, get, tmp_path):
    reached = halfway(hub)
    process = get.begin(hub)
    assert reached.wait(30)
    process.send_signal(sign)
    result = finish(process, 30)
    assert result.returncode == (-9 if sign == signal.SIGKILL else 75)
    assert "Traceback" not in result.stderr
    assert (
        sign == signal.SIGKILL or f"Continue with: python -m tools.download {REPO}" in result.stderr
    )
    (part,) = parts(tmp_path / NAME)
    have = part.stat().st_size
    assert 100_000 < have < SIZE and not (tmp_path / NAME / W).exists()
    hub.on_bytes = None
    get(hub)
    stands(tmp_path / NAME)
    assert [seen.start for seen in hub.asked(W)] == [0, have]


def test_two_at_once_fetch_everything_once(hub, get, tmp_path):
    reached = halfway(hub)
    first = get.begin(hub)
    assert reached.wait(30)
    second = expect(finish(get.begin(hub)))
    expect(finish(first))
    assert "another download into" in second.stdout and "all were there" in second.stdout
    stands(tmp_path / NAME)
    assert hub.sent(W) == SIZE


@pytest.fixture
def small_disk(tmp_path):
    """A 24 MB file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, text=True
    )
    assert not mounted.returncode, (
        f"a small tmpfs cannot be mounted; run the tests as root: {mounted.stderr.strip()}"
    )
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_too_little_space_is_told_before_anything_is_fetched(get, small_disk):
    with Hub({REPO: SMALL | {W: tensors(5_000_000)}}) as hub:
        line = get(hub, "--to", small_disk, code=1).error
        assert (
            "19.6 MiB to fetch, 24.0 MiB free" in line and "too little" in line and hub.sent(W) == 0
        )


def test_full_disk_is_one_line_and_the_same_command_goes_on(hub, get, small_disk):
    filler = small_disk / "filler"

    def fill(path, count):
        if path == W and count > 200_000 and not filler.exists():
            room = os.statvfs(small_disk)
            filler.write_bytes(b"0" * (room.f_bavail * room.f_frsize - 300_000))

    hub.on_bytes = fill
    line = get(hub, "--to", small_disk, "--include", W, code=1).error
    assert (
        "no space left on device" in line
        and "free some space, then: python -m tools.download" in line
    )
    (part,) = parts(small_disk / NAME)
    have = part.stat().st_size
    assert have >= 200_000 and not (small_disk / NAME / W).exists()
    filler.unlink()
    hub.on_bytes = None
    get(hub, "--to", small_disk)
    stands(small_disk / NAME)
    assert [seen.start for seen in hub.asked(W)] == [0, have]


# ---- names, pickles, folders --------------------------------------------------------------------------------

NAMES = [
    "../out.json",
    "/tmp/out.json",
    "a/../../out.json",
    "a\\..\\out.json",
    "C:/out.json",
    "a//b.json",
    "./a.json",
]


@pytest.mark.parametrize(
    "name", [*NAMES, "a\nb.json", "a\ud800.json", ".danpu.json", "model.safetensors.part"]
)
def test_names_that_lead_out_are_refused(name, tmp_path):
    with pytest.raises(link.Fatal, match="which is no path inside"):
        fetch.safe_target(tmp_path, name)


def test_a_bad_name_ends_the_download_before_it_begins(hub, get, tmp_path):
    hub.repos[REPO]["../../out.json"] = b"{}"
    assert "'../../out.json', which is no path inside" in get(hub, code=1).error
    assert (
        "'../../out.json', which is no path inside"
        in get(hub, "--source", "modelscope", code=1).error
    )
    assert [p.name for p in tmp_path.iterdir()] in ([], ["hf"])


def test_a_record_that_names_files_elsewhere_is_not_believed(hub, get, tmp_path):
    get(hub)
    outside, record = tmp_path / "outside.safetensors", tmp_path / NAME / ".danpu.json"
    outside.write_bytes(b"mine")
    found = json.loads(record.read_text())
    stat = outside.stat()
    found["files"]["../outside.safetensors"] = found["files"][W] | {
        "size": 4,
        "mtime_ns": stat.st_mtime_ns,
    }
    record.write_text(json.dumps(found))
    for flags in ([], ["--repair", "true"], ["--verify"]):
        assert ".danpu.json cannot be read; delete it" in get(hub, *flags, code=1).error
    assert outside.read_bytes() == b"mine"


def test_links_out_of_the_folder_are_not_followed(hub, get, tmp_path):
    hub.repos[REPO]["sub/x.json"] = b"{}"
    (tmp_path / NAME).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / NAME / "sub").symlink_to(tmp_path / "elsewhere")
    assert "a link leads out of" in get(hub, "--repair", "true", code=1).error
    assert not list((tmp_path / "elsewhere").iterdir())


def test_pickles_only_when_asked(get, tmp_path):
    files = SMALL | {"pytorch_model.bin": b"\x80\x04pickle", "training_args.bin": b"\x80\x04"}
    with Hub({REPO: files, "org/gguf": SMALL | {"q4.gguf": b"GGUF"}}) as hub:
        line = get(hub, code=1).error
        assert "only as pickle (pytorch_model.bin)" in line and "--allow_pickle true" in line
        assert (
            "only as pickle" in get(hub, "--include", "*.bin", code=1).error
            and hub.sent("pytorch_model.bin") == 0
        )
        get(hub, "--allow_pickle", "true")
        stands(tmp_path / NAME, files)
        assert "only other formats (q4.gguf)" in get(hub, what="org/gguf", code=1).error


def test_a_folder_of_something_else_is_left_alone(hub, get, tmp_path):
    hub.repos["other/model"] = dict(SMALL)
    mine = tmp_path / NAME / "config.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "files that this program did not fetch (config.json)" in get(hub, code=1).error
    assert mine.read_text() == "mine"
    mine.unlink()
    get(hub)
    assert "holds org/model, not other/model" in get(hub, what="other/model", code=1).error
    stands(tmp_path / NAME)


# ---- other sources ------------------------------------------------------------------------------------------


def test_modelscope(hub, get, tmp_path):
    hub.token = "ms_secret"
    assert "MODELSCOPE_API_TOKEN" in get(hub, "--source", "modelscope", code=1).error
    hub.fault(W, "cut", at=400_000)
    hub.fault(W, "flip", at=777_777)
    printed = get(hub, MODELSCOPE_API_TOKEN="ms_secret", DANPU_SOURCE="modelscope").stdout
    stands(tmp_path / NAME)
    assert "sha256 is" in printed and "3 files, 1.6 MiB, whole; checked by hash" in printed
    assert all("m_session_id" in seen.headers["cookie"] for seen in hub.seen[1:])
    lost = get(
        hub, "--source", "modelscope", what="org/none", MODELSCOPE_API_TOKEN="ms_secret", code=1
    ).error
    assert "no model org/none" in lost and "ids differ between hubs" in lost


def test_a_mirror_may_be_changed_on_the_way(hub, get, tmp_path):
    hub.fault(W, "status", 1000)
    get(hub, "--retries", 0, code=1)
    sent = hub.sent("words.txt")
    hub.faults.clear()
    get(hub, "--source", "modelscope")
    stands(tmp_path / NAME)
    assert hub.sent("words.txt") == sent


def test_any_web_server_with_our_manifest(hub, get, tmp_path, fetched):
    """The folder that --manifest described, put on a web server, and fetched from there."""
    mirror = {p.name: p.read_bytes() for p in fetched[0].iterdir() if not p.name.startswith(".")}
    hub.repos = {"org/tiny": mirror}
    shard = "model-00001-of-00003.safetensors"
    hub.fault(shard, "flip", at=5000)
    for address in (f"{hub.url}/files/org/tiny", f"{hub.url}/files"):
        printed = get(hub, "--source", address, what="org/tiny").stdout
        assert f"from {hub.url}/files/org/tiny" in printed
    stands(tmp_path / "tiny", {k: v for k, v in mirror.items() if k != "manifest.json"})
    assert hub.sent(shard) == 2 * len(mirror[shard])
    other = get(hub, "--source", f"{hub.url}/files/org/tiny", what="org/else", code=1).error
    assert "holds org/tiny, not org/else" in other


def test_an_address_may_be_a_hub(hub, get, tmp_path):
    assert (
        f"from {hub.url}, 3 files"
        in get(hub, "--source", hub.url, HF_ENDPOINT="http://127.0.0.1:9").stdout
    )
    stands(tmp_path / NAME)
    assert "has no model org/none" in get(hub, "--source", hub.url, what="org/none", code=1).error


def test_the_proxy_of_the_environment_is_used(hub, get, tmp_path):
    """Only the proxy knows a host of this name."""
    get(hub, HF_ENDPOINT="http://hub.test", HTTP_PROXY=hub.url, NO_PROXY="")
    stands(tmp_path / NAME)
    assert {seen.server for seen in hub.seen} == {"hub", "cdn"} and all(
        seen.proxied for seen in hub.seen
    )


# ---- verify and repair --------------------------------------------------------------------------------------


def damage(file: Path, at: int) -> None:
    """Flip one bit, and leave size and date as they were."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_finds_and_repair_fetches_only_what_is_broken(hub, get, tmp_path):
    folder = tmp_path / NAME
    get(hub)
    asked = len(hub.seen)
    assert "3 files, 1.6 MiB, all whole (sha256)" in get(hub, "--verify", what=folder).stdout
    damage(folder / W, 500_000)
    (folder / "config.json").unlink()
    result = get(hub, "--verify", code=1)
    assert f"  {W}: sha256 is" in result.stdout and "  config.json: missing" in result.stdout
    assert "2 of 3 files broken or missing" in result.error and len(hub.seen) == asked
    get(hub, "--repair", what=folder)
    stands(folder)
    assert hub.sent(W) == 2 * SIZE and hub.sent("words.txt") == len(SMALL["words.txt"])
    (folder / W).write_bytes(WEIGHTS[W][:-4])
    assert f"{W}: {SIZE - 4:,} bytes, expected {SIZE:,}" in get(hub, "--verify", code=1).stdout


def test_a_changed_file_is_only_replaced_by_repair(hub, get, tmp_path):
    mine = tmp_path / NAME / "config.json"
    get(hub)
    mine.write_text("{}")
    assert "changed since it was fetched; --repair true" in get(hub, code=1).error
    assert mine.read_text() == "{}"
    get(hub, "--repair", "true")
    stands(tmp_path / NAME)


def test_repair_adopts_a_folder_of_another_program(hub, get, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    for path, data in FILES.items():
        (folder / path).write_bytes(data)
    damage(folder / W, 9000)
    get(hub, "--repair", "true")
    stands(folder)
    assert hub.sent(W) == SIZE and hub.sent("words.txt") == hub.sent("config.json") == 0


def test_repair_is_no_update_and_an_update_leaves_no_mixture(hub, get, tmp_path):
    """The new version has one file instead of two shards; a loader must never find old ones beside new ones."""
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()
    shards = {
        f"m-{n}.safetensors": save({name: np.zeros(9, np.float32)})
        for n, name in ((1, "a"), (2, "b"))
    }
    hub.repos[REPO] = SMALL | shards | {"m.safetensors.index.json": index}
    folder = tmp_path / NAME
    get(hub)
    first, hub.commit = hub.commit, "beef" * 10
    (folder / "m-1.safetensors").unlink()
    result = get(hub, "--repair", what=folder, code=1)  # this hub has only its newest version
    assert f"no revision {first}" in result.error
    hub.repos[REPO] = FILES | {"config.json": b'{"model_type": "new"}'}
    hub.fault(W, "status", 1000)
    printed = get(hub, "--retries", 0, code=1).stdout
    assert "m-2.safetensors: the repository has no such file any more" in printed
    assert "config.json: the repository has another version" in printed
    assert (
        not list(folder.glob("*.safetensors*"))
        and "never arrived whole" in get(hub, "--verify", code=1).stdout
    )
    hub.faults.clear()
    get(hub)
    stands(folder, hub.repos[REPO])
    assert hub.sent("words.txt") == len(SMALL["words.txt"])


def test_an_update_spares_what_the_user_changed(hub, get, tmp_path):
    get(hub)
    (tmp_path / NAME / "config.json").write_text("mine")
    hub.commit, hub.repos[REPO]["config.json"] = "beef" * 10, b'{"model_type": "new"}'
    assert "changed since it was fetched" in get(hub, code=1).error
    assert (tmp_path / NAME / "config.json").read_text() == "mine"


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
    assert "broken safetensors file" in weights.problem(tmp_path / W, W)
    (tmp_path / W).write_bytes(header({"a": one()}))
    assert weights.problem(tmp_path / W, W) is None


def test_a_file_that_is_broken_in_the_repository_is_not_taken(hub, get, tmp_path):
    hub.repos[REPO][W] = BROKEN["overlap"]
    assert "as it is in the repository itself; deleted" in get(hub, code=1).error
    assert not (tmp_path / NAME / W).exists()


def test_an_index_must_fit_its_shards(hub, get, tmp_path):
    index = {"weight_map": {"a": W, "c": W, "d": "model-2.safetensors"}}
    hub.repos[REPO]["model.safetensors.index.json"] = json.dumps(index).encode()
    result = get(hub, "--include", "*.json", W, code=1)
    assert "has no tensor c" in result.error and "model-2" not in result.error
    (tmp_path / NAME / ".danpu.json").unlink()
    printed = get(hub, "--verify", what=tmp_path / NAME, code=1).stdout
    assert "only the structure is checked" in printed and "model-2.safetensors: missing" in printed


# ---- what the model is --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A real model in three shards."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from common import tiny

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = tiny.make_tokenizer(["hello world 你好"] * 3, 400, ["<end>"], eos_token="<end>")
    config = LlamaConfig(
        vocab_size=400, hidden_size=96, intermediate_size=192, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    made = tiny.save_tiny(config, tokenizer, folder)
    tokenizer.save_pretrained(folder / "sharded")
    AutoModelForCausalLM.from_pretrained(made).save_pretrained(
        folder / "sharded", max_shard_size="900KB"
    )
    return folder / "sharded"


@pytest.fixture(scope="session")
def fetched(tiny_model, tmp_path_factory):
    """(folder, what was printed, commit): the real model fetched from a hub, with --manifest and --try."""
    place = tmp_path_factory.mktemp("fetched")
    with Hub({"org/tiny": {p.name: p.read_bytes() for p in tiny_model.iterdir()}}) as hub:
        flags = [
            "--source",
            hub.url,
            "--to",
            place,
            "--manifest",
            "--try",
            "--window",
            128,
            "--batch",
            4,
        ]
        command = [sys.executable, "-m", "tools.download", "org/tiny", *flags]
        return place / "tiny", expect(finish(start(command, NO_PROXY="*"))).stdout, hub.commit


def test_manifest_and_trial_of_a_fetched_model(fetched, tiny_model, hub, get, tmp_path):
    from transformers import AutoModelForCausalLM

    assert len(list(tiny_model.glob("*.safetensors"))) == 3
    folder, printed, commit = tmp_path / "tiny", fetched[1], fetched[2]
    shutil.copytree(fetched[0], folder)
    found = json.loads((folder / "manifest.json").read_text())
    facts = found["model"]
    assert facts["parameters"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    shape = {
        "layers": 6,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "hidden": 96,
        "vocabulary": 400,
        "window": 512,
    }
    assert shape.items() <= facts.items() and facts["dtypes"] == {"F32": facts["parameters"]}
    assert found["parallel"]["tensor"] == [1, 2] and found["parallel"]["pipeline"] == [1, 2, 3, 6]
    assert "3, 6 would need copies of key/value heads" in printed and "tokens/s on" in printed
    rows = {
        (r["method"], r["cards"], r["gradient_checkpointing"]): r for r in found["memory"]["rows"]
    }
    assert len(rows) == 4 * 5 * 2 and found["memory"]["assumptions"]["window"] == 128
    assert all(rows[m, n, True]["total_GiB"] <= rows[m, n, False]["total_GiB"] for m, n, _ in rows)
    for file in found["files"]:
        assert hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    assert (found["repo"], found["commit"]) == ("org/tiny", commit)
    hub.repos["org/tiny"] = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    assert "all were there" in get(hub, what="org/tiny").stdout  # our manifest.json is no stranger
    (folder / ".danpu.json").unlink()  # as on a machine where the folder was copied to
    damage(folder / "model-00002-of-00003.safetensors", 5000)
    assert (
        "model-00002-of-00003.safetensors: sha256 is"
        in get(hub, "--verify", what=folder, code=1).stdout
    )


def test_memory_of_the_states_by_hand():
    """7e9 parameters on 8 cards: bytes per parameter as the recipes hold them."""
    from tools.hub import manifest

    facts = {
        "parameters": 7e9,
        "sides": 1e7,
        "matrices": 6e9,
        "vocabulary": 100_000,
        "hidden": 4096,
    }
    full, zero2, zero3 = (manifest.states(m, facts, 8, 16) for m in ("full", "ZeRO-2", "ZeRO-3"))
    assert (full["weights"], full["gradients"], full["optimizer"]) == (28e9, 28e9, 56e9)
    assert (zero2["weights"], zero2["gradients"], zero2["optimizer"]) == (14e9, 14e9 / 8, 84e9 / 8)
    assert (zero3["weights"], zero3["gradients"], zero3["optimizer"]) == (
        14e9 / 8,
        14e9 / 8,
        84e9 / 8,
    )
    assert manifest.states("LoRA", facts, 8, 16)["weights"] == 14e9 + 4 * 16e7


@pytest.mark.parametrize(
    "method, recompute", [("full", False), ("full", True), ("LoRA", False), ("ZeRO-2", False)]
)
def test_estimated_activations_are_those_that_torch_keeps(method, recompute, tiny_model):
    """Saved tensors of one forward, weights (and autocast's copies of them) not counted."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from common.fast import losses
    from tools.hub import manifest

    facts = manifest.config_facts(tiny_model) | manifest.tensor_facts(tiny_model, True)
    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).train()
    losses.use_chunked_loss(model)
    if recompute:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if method == "LoRA":
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        )
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    ids = torch.randint(0, 400, (2, 256))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", enabled=method != "ZeRO-2"),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    counted = sum(size for _, size in kept.values())
    counted -= 2 * facts["matrices"] if method == "full" and not recompute else 0
    estimate = manifest.activations(method, facts, 512, recompute)
    head = 6 * 512 * 400 + 4 * 512 * 96 + {"full": 4, "LoRA": 0}.get(method, 2) * 400 * 96
    one_layer = 512 * (26 * 96 + 4 * 96 + 4 * 32 + 8 * 192) if recompute else 0  # comes in backward
    assert abs(estimate - head - one_layer - counted) < 0.06 * counted + 512 * 96 * 8


def test_a_type_nobody_knows_and_a_model_that_does_not_write(get, tmp_path):
    plain = {
        "model_type": "from-the-future",
        "n_layer": 12,
        "n_head": 8,
        "n_embd": 64,
        "vocab_size": 100,
        "n_inner": 256,
    }
    other = {"model_type": "vit", "num_hidden_layers": 2}
    repos = {"org/new": {"config.json": json.dumps(plain).encode(), W: WEIGHTS[W]}}
    nested = {
        "model_type": "new-vl",
        "vision": {"layers": 3},
        "text_config": plain | {"num_experts": 8},
    }
    repos["org/vl"] = {"config.json": json.dumps(nested).encode(), W: WEIGHTS[W]}
    repos["org/vit"] = {"config.json": json.dumps(other).encode(), W: WEIGHTS[W]}
    with Hub(repos) as hub:
        printed = get(hub, "--manifest", what="org/new").stdout
        assert (
            "from-the-future, 270,003 parameters" in printed
            and "12 layers, 8 heads, 8 key/value heads" in printed
        )
        printed = get(hub, "--manifest", what="org/vl").stdout
        assert (
            "12 layers" in printed and "expert parallel: 1, 2, 4, 8 (divide 8 experts)" in printed
        )
        assert "--try: vit is no model that writes text" in get(hub, "--try", what="org/vit").stdout
        assert "cannot be loaded" in get(hub, "--try", what="org/new", code=1).error


# ---- aria2c -------------------------------------------------------------------------------------------------

STUB = """#!{python}
# Stands in for aria2c where it is not installed: the same input, one connection.
import sys, urllib.request
lines = sys.stdin.read().splitlines()
options = dict(line.strip().split("=", 1) for line in lines[1:] if not line.strip().startswith("header="))
headers = dict(line.strip()[7:].split(": ", 1) for line in lines[1:] if line.strip().startswith("header="))
request = urllib.request.Request(lines[0], headers=headers | {{"Range": "bytes=0-99999999"}})
with urllib.request.urlopen(request) as answer, open(options["dir"] + "/" + options["out"], "wb") as file:
    file.write(answer.read())
"""


@pytest.fixture
def aria2(tmp_path):
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
    return folder


@pytest.mark.parametrize("layout", ["hf", "modelscope"])
def test_aria2c_fetches_large_files_and_is_checked_like_any_other(
    layout, hub, get, tmp_path, aria2
):
    hub.token = "hf_secret"
    for _ in range(2):  # the first answer goes to our own look at the address
        hub.fault(W, "flip", at=777_777)
    path = f"{aria2}:{os.environ['PATH']}"
    tokens = {"HF_TOKEN": "hf_secret", "MODELSCOPE_API_TOKEN": "hf_secret"}
    printed = get(hub, "--source", layout, "--aria2", "true", PATH=path, **tokens).stdout
    stands(tmp_path / NAME)
    assert "sha256 is" in printed and "deleted" in printed
    argv = (aria2 / "argv").read_text()
    assert argv.count("--input-file=-") == 2 and "secret" not in argv and "http" not in argv
    assert all("authorization" not in seen.headers for seen in hub.seen if seen.server == "cdn")


def test_aria2c_is_not_asked_where_it_does_not_help(hub, get, tmp_path, aria2):
    path = f"{aria2}:{os.environ['PATH']}"
    get(hub, "--aria2", "auto", PATH=path)  # the file is small
    shutil.rmtree(tmp_path / NAME)
    hub.ranges = False
    get(hub, "--aria2", "true", PATH=path)
    stands(tmp_path / NAME)
    assert not (aria2 / "argv").exists()
    assert "no aria2c on PATH" in get(hub, "--aria2", "true", PATH="/nowhere", code=1).error


def test_an_aria2c_that_fails_is_given_up(hub, get, tmp_path, aria2):
    (aria2 / "aria2c").write_text("#!/bin/sh\nexit 6\n")
    printed = get(
        hub, "--aria2", "true", "--retries", 3, PATH=f"{aria2}:{os.environ['PATH']}"
    ).stdout
    stands(tmp_path / NAME)
    assert printed.count("aria2c ended with code 6 (network problem)") == 3


def test_a_part_of_aria2c_with_holes_is_not_continued_by_us(hub, get, tmp_path):
    entry = fetch.Entry(W, "", SIZE, hashlib.sha256(WEIGHTS[W]).hexdigest())
    part = fetch.part_of(tmp_path / NAME / W, entry)
    get(hub, "--include", "*.json")
    part.write_bytes(bytes(SIZE))
    part.with_name(part.name + ".aria2").write_bytes(b"pieces")
    get(hub, "--aria2", "false")
    stands(tmp_path / NAME)
    assert [seen.start for seen in hub.asked(W)] == [0]


# ---- command line -------------------------------------------------------------------------------------------


def test_mistakes_on_the_command_line(hub, get, tmp_path):
    assert "--source ftp://x" in get(hub, "--source", "ftp://x", code=2).error
    assert "without password" in get(hub, "--source", "https://me:word@host/x", code=2).error
    assert "a number from 1, not '0'" in get(hub, "--workers", "0", code=2).error
    assert "true or false, not 'maybe'" in get(hub, "--repair=maybe", code=2).error
    for wrong in (
        tmp_path / "none",
        "models/none/deeper",
        "./none",
        "a b",
        "org/..",
        "https://host/x",
    ):
        assert "no such folder, and no model of a hub" in get(hub, what=wrong, code=1).error
    assert "nothing was fetched there" in get(hub, "--verify", code=1).error
    (tmp_path / "empty").mkdir()
    assert "was not fetched by this program" in get(hub, what=tmp_path / "empty", code=1).error
    assert "no config.json" in get(hub, "--manifest", what=tmp_path / "empty", code=1).error
    assert not hub.seen


def test_switches_need_no_value_and_dashes_are_fine():
    parsed = download.parse_args(
        ["--dry-run", "org/name", "--repair", "--retry-wait", "2", "--try", "false"]
    )
    assert (parsed.model, parsed.dry_run, parsed.repair, parsed.retry_wait, parsed.try_) == (
        "org/name",
        True,
        True,
        2,
        False,
    )


def test_retry_after_is_a_number_or_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert link.retry_after("7") == 7 and 90 < link.retry_after(date) <= 100
    assert (
        link.retry_after("soon") is None
        and link.retry_after("") is None
        and link.retry_after("9999999") == 3600
    )


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    from tools.hub.progress import Meter

    meter = Meter([fetch.Entry("a", "", 4 << 20), fetch.Entry("b", "", 4 << 20)], {"a": 1 << 20})
    meter.show("a", 3 << 20)
    meter.finish("b")
    meter.tick()
    assert capsys.readouterr().out == ""
    meter.spoken -= 100
    meter.tick()
    line = capsys.readouterr().out
    assert "88%" in line and "7.00M/8.00M" in line and "1/2 files" in line
    meter.close()
    assert capsys.readouterr().err == ""


def test_patterns():
    assert sources.matches("a/b.json", ["*.json"]) and sources.matches("a/b.json", ["b.json"])
    assert sources.matches("onnx/m.bin", ["onnx/"]) and not sources.matches(
        "a/onnx.json", ["onnx/"]
    )
    reasons = {
        "x.bin": "pickle",
        "m.gguf": "other formats",
        "m.py": "code",
        ".git/x": "hidden",
        "tokenizer.model": None,
    }
    assert {path: sources.reason_to_skip(path, False, True) for path in reasons} == reasons
