"""Fetch a model or a data set with its hub's own client; every file is checked, pickles and code
are left out.

    python -m tools.download ORG/NAME                      # HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY
    python -m tools.download ORG/NAME --source modelscope
    python -m tools.download ORG/NAME --dataset --include "data/*-of-0010*.parquet"
    python -m tools.download ORG/NAME --aria2              # continues in the middle of a file
    python -m tools.download models/NAME --verify          # read all of it again; no network
    python -m tools.download models/NAME --repair          # and fetch what is broken
    python -m tools.download models/NAME --manifest --try  # facts and memory; one sentence
    python -m tools.download data/NAME --manifest          # files, rows, columns

The same command again continues. Exit codes: 0 done, 1 failed, 2 usage, 75 interrupted.
"""

import argparse
import difflib
import errno
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from filelock import FileLock
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, logging
from huggingface_hub.utils.sha import git_hash

from common.convert import model_folder
from common.data.files import atomic_file, sha256
from common.runs import machine
from tools.manifest import describe, describe_data, parquet, tensors

POINTER = "only a Git LFS pointer"
ELSEWHERE = "another --revision, --source or HF_ENDPOINT may have them"
# {source, type, repo, revision, commit, files: {path: {size, sha256 or git}}}
RECORD = ".danpu.json"
KINDS = {"model": "model", "dataset": "data set"}  # types as the hubs call them
FOLDERS = {"model": "models", "dataset": "data"}
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib"]
OTHERS = ["*.py", "*.so", "*.sh", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "*.ggml", "*.ot"]
OTHERS += ["*.tflite", "*.mlmodel", "consolidated*.safetensors", ".*", "*/.*"]
ARIA2 = "aria2c --no-conf --input-file=- --continue --check-integrity --split=8"
ARIA2 += " --max-connection-per-server=8 --file-allocation=none --auto-save-interval=1"
ARIA2 += " --follow-torrent=false --follow-metalink=false --console-log-level=error"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        flag = message.rpartition(" ")[2]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message}{hint}\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m tools.download", description=__doc__, formatter_class=form)
    add = parser.add_argument
    switch = {"action": "store_true"}
    patterns = {"nargs": "+", "action": "extend", "default": [], "metavar": "PATTERN"}
    add("model", help="ORG/NAME on the hub, or a folder that was fetched before")
    add("--dataset", **switch, help="ORG/NAME is a data set")
    add("--source", choices=("hf", "modelscope"), help="default: hf")
    add("--to", help="it goes to TO/NAME (default: models, data with --dataset)")
    add("--revision", help="branch, tag or commit (default: the newest)")
    add("--include", **patterns, help='only these, even code: "*.json" "*.py"')
    add("--exclude", **patterns, help="not these")
    add("--allow_pickle", **switch, help="take pickles, which can run code, where nothing else is")
    add("--aria2", **switch, help="Hugging Face's large files through aria2c")
    add("--dry_run", **switch, help="only show files and sizes")
    add("--verify", **switch, help="read the folder again: sizes, hashes, safetensors; no network")
    add("--repair", **switch, help="the same, then fetch what is broken, changed or missing")
    add("--manifest", **switch, help="write danpu_manifest.json: hashes, shapes, training memory")
    add("--try", dest="try_", **switch, help="load the model and let it write a sentence")
    add("--window", type=int, default=2048, help="tokens per row in the memory table")
    add("--batch", type=int, default=2, help="rows per card in the memory table")
    add("--lora_r", type=int, default=16, help="rank in the memory table")
    args = parser.parse_args(argv)
    if args.aria2 and not shutil.which("aria2c"):
        parser.error("--aria2: no aria2c on PATH (apt install aria2); or leave the flag out")
    if not Path(args.model).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", args.model):
        parser.error("neither a folder nor ORG/NAME, without address or datasets/ before it")
    return args


def again() -> str:
    return f"python -m tools.download {shlex.join(sys.argv[1:])}"


def size_text(files: dict) -> str:
    size = sum(known["size"] for known in files.values())
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def problem(folder: Path, name: str, known: dict, read: bool = True) -> str | None:
    """What is wrong with a file, by what the hub said of it; read: not only by its size."""
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise SystemExit(f"{folder}: the file name {name!r} leads out of the folder")
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != known["size"]:
        return f"{size:,} bytes, expected {known['size']:,}"
    if model_folder.is_pointer(path):
        return POINTER
    if read and known.get("sha256") and sha256(path) != known["sha256"]:
        return f"its sha256 is not {known['sha256']}"
    if read and known.get("git") and git_hash(path.read_bytes()) != known["git"]:
        return f"its git is not {known['git']}"
    try:
        if path.suffix == ".safetensors":
            tensors(path)
        if path.suffix == ".parquet":
            parquet(path)
    except ValueError as error:
        return str(error)
    return None


def problems(folder: Path, files: dict, read: bool = True) -> dict[str, str]:
    """path -> what is wrong, of the files that are not right."""
    found = {path: problem(folder, path, known, read) for path, known in files.items()}
    return {path: why for path, why in found.items() if why}


def verify(folder: Path, files: dict) -> None:
    """Read every file again; SystemExit when something is broken."""
    wrong = problems(folder, files)
    for path, why in wrong.items():
        print(f"  {path}: {why}")
    if not wrong:
        model_folder.check(folder, any(path.endswith((".safetensors", ".bin")) for path in files))
    if wrong or not files:
        raise SystemExit(f"{folder}: {len(wrong)} of {len(files)} files broken; see --repair")
    print(f"{folder}: {len(files)} files, {size_text(files)}, all right")


def client(target: dict):
    """The hub's own."""
    if target["source"] == "modelscope":
        # beneath `modelscope`, which would import torch and hides the hashes
        from modelscope_hub import HubApi

        return HubApi()
    return HfApi()


def list_files(target: dict) -> dict:
    """`target` with the commit and all the files that the hub has now."""
    repo, kind = target["repo"], target["type"]
    hub = client(target)
    if target["source"] == "modelscope":
        found = hub.list_repo_files(repo, kind, revision=target["revision"])
        files = {f.path: {"size": f.size, "sha256": f.sha256} for f in found if not f.is_dir}
        return target | {"files": files}
    revision = target["commit"] or target["revision"]
    commit = hub.repo_info(repo, repo_type=kind, revision=revision, timeout=30).sha
    files = {}
    # page by page: what the hub tells of a repository at once is not all of a large one
    for found in hub.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind):
        if isinstance(found, RepoFile):
            sha = {"sha256": found.lfs.sha256} if found.lfs else {"git": found.blob_id}
            files[found.path] = {"size": found.size, **sha}
    return target | {"commit": commit, "files": files}


def fetch(target: dict, files: dict, folder: Path, aria2: bool) -> None:
    if target["source"] == "modelscope":
        listed = []
        for path, known in files.items():
            listed.append({"Path": path, "Size": known["size"], "Sha256": known["sha256"]})
        where = {"revision": target["revision"], "local_dir": folder, "file_list": listed}
        client(target).download_repo(target["repo"], target["type"], **where)
        return
    for left in folder.glob(".cache/huggingface/download/**/*.incomplete"):
        left.unlink()  # by a run that was killed; the library does not continue them
    logging.set_verbosity_error()  # its warnings show signed addresses
    if aria2:
        large = {path: known["sha256"] for path, known in files.items() if "sha256" in known}
        fetch_aria2(target, large, folder)
    where = {"local_dir": folder, "allow_patterns": [glob.escape(path) for path in files]}
    where |= {"revision": target["commit"], "repo_type": target["type"]}
    snapshot_download(target["repo"], **where)


def fetch_aria2(target: dict, shas: dict[str, str], folder: Path) -> None:
    """Several connections a file. aria2c gets the addresses that the hub redirects to, on stdin
    where no list of processes shows them, and no token. shas: path -> sha256."""
    drafts = folder.resolve() / ".cache/aria2"
    job = []
    for path, sha in shas.items():
        place = {"repo_type": target["type"], "revision": target["commit"]}
        url = hf_hub_url(target["repo"], path, **place)
        job += [get_hf_file_metadata(url).location, f" out={path}", f" checksum=sha-256={sha}"]
    words = [*ARIA2.split(), f"--dir={drafts}", f"--stop-with-process={os.getpid()}"]
    # it knows the variables of proxies in small letters only
    env = {f"{scheme}_proxy": proxy for scheme, proxy in urllib.request.getproxies().items()}
    told = "\n".join(job).encode()
    code = subprocess.run(words, input=told, env=os.environ | env).returncode
    if code:
        kind = errno.ENOSPC if code == 9 else errno.EIO
        raise OSError(kind, f"aria2c ended with code {code}, see its manual")
    for path in shas:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (drafts / path).replace(folder / path)


def explain(error: Exception, folder: Path, target: dict) -> str:
    """What went wrong at the hub and what helps, in one line."""
    if isinstance(error, ImportError):
        return "--source modelscope needs its client: pip install modelscope-hub==0.5.1"
    hub = {"hf": constants.ENDPOINT, "modelscope": "ModelScope"}[target["source"]]
    asked = f"{target['repo']}, {target['revision'] or 'newest revision'}"
    closed = "not there, or closed to you: set HF_TOKEN or MODELSCOPE_API_TOKEN, accept its licence"
    absent = f"no such {KINDS[target['type']]} or revision; names differ by hub"
    remedies = {401: closed, 403: closed, 404: absent}
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC:
            return f"no space left on device under {folder}. Free some space, then: {again()}"
        if status := getattr(getattr(error, "response", error), "status_code", None):
            return f"{hub} answers {status} for {asked}: {remedies.get(status, 'try later')}"
        said = " ".join(f"{type(error).__name__} {error}".split())
        said = re.sub(r"\?\S+", "", said)[:200]  # what signs an address
        failed = [*getattr(error, "failed_files", {}).values()]  # of ModelScope's client
        error = failed[0] if failed else error.__cause__ or error.__context__
    remedy = "HF_ENDPOINT chooses a mirror, --source modelscope another hub"
    return f"{hub} cannot be reached, or the line was cut ({said}); {remedy}. Again: {again()}"


def other_kind(error: Exception, target: dict) -> str:
    """How to ask for what the hub has under this name, where it is of the other kind."""
    status = getattr(getattr(error, "response", error), "status_code", None)
    if status not in (401, 404) or isinstance(error, RevisionNotFoundError):
        return ""
    other = "dataset" if target["type"] == "model" else "model"
    try:
        is_there = client(target).repo_exists(target["repo"], repo_type=other)
    except Exception:  # it is only a hint
        return ""
    flag = "add --dataset" if other == "dataset" else "leave --dataset out"
    return f". There is a {KINDS[other]} of that name: {flag}" if is_there else ""


def choose(files: dict, args, kind: str) -> set[str]:
    """The files to fetch; says what is left out. SystemExit when no weights are among them, or no
    data."""
    safe = any(path.endswith(".safetensors") for path in files)
    unwanted = args.exclude + ([] if args.include else OTHERS)
    if not args.allow_pickle or (safe and not args.include):
        unwanted += PICKLES
    only = args.include or None
    wanted = set(filter_repo_objects(files, allow_patterns=only, ignore_patterns=unwanted))
    if left_out := sorted(files.keys() - wanted):
        print(f"  {len(left_out)} left out: {', '.join(left_out)[:200]}")
    if kind == "dataset":  # a card alone is none
        safe = any(Path(path).suffix not in ("", ".md") for path in wanted)
    if not wanted or not (safe or args.include or args.allow_pickle):
        others = "--allow_pickle takes pickles, which can run code; --include takes other formats"
        what = "data" if kind == "dataset" else "safetensors"
        raise SystemExit(f"no {what} to fetch, only what is left out above; {others}")
    return wanted


def load_record(folder: Path) -> dict:
    record = folder / RECORD
    return json.loads(record.read_bytes()) if record.is_file() else {}


def download(args, folder: Path) -> None:
    """Bring the folder to what the hub has, and record that."""
    old = load_record(folder)
    given = Path(args.model).is_dir()
    repo = old.get("repo") if given else args.model
    is_data = args.dataset or (given and old.get("type") == "dataset")
    kind = "dataset" if is_data else "model"
    if repo is None or (old and (old["repo"], old.get("type", "model")) != (repo, kind)):
        raise SystemExit(f"{folder} was not fetched from {args.model}: give ORG/NAME, another --to")
    source = args.source or old.get("source", "hf")
    same = old if source == old.get("source") and not args.revision else {}
    target = {"source": source, "type": kind, "repo": repo}
    target["revision"] = args.revision or same.get("revision")
    target["commit"] = same.get("commit", "") if args.repair else ""  # a repair is no update
    try:
        offered = list_files(target)
    except Exception as error:  # of several libraries, and those that they use
        told = explain(error, folder, target) + other_kind(error, target)
        raise SystemExit(told) from None
    files = offered["files"]
    print(f"{repo} {offered['commit'][:12] or source}: {len(files)} files", flush=True)
    known = old.get("files", {})
    as_before = same and (given or args.repair) and not args.include
    wanted = known if as_before else choose(files, args, kind)
    files = {path: files[path] for path in files if path in wanted or path in known}
    if args.dry_run:
        for path in files:
            print(f"  {size_text({path: files[path]}):>12}  {path}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".danpu.lock"):  # a second download waits, then finds the files
            for path in known:  # no loader may find a mixture of two versions
                if files.get(path) != known[path] and not problem(folder, path, known[path]):
                    (folder / path).unlink()
            fill(args, folder, offered | {"files": files}, offered["files"])
    print(f"{folder}: {len(files)} files, {size_text(files)}{'' if args.dry_run else ', complete'}")


def fill(args, folder: Path, record: dict, offered: dict) -> None:
    """Fetch what the record names and the folder lacks. The lists of shards come first: a model
    that is not whole there is not worth its gigabytes. offered: all files of the hub."""
    wrong = problems(folder, record["files"], read=args.repair)
    for path, why in wrong.items():
        if why != "missing" and not args.repair:
            raise SystemExit(f"{folder / path}: {why}; --repair fetches it again")
        (folder / path).unlink(missing_ok=True)
    with atomic_file(folder / RECORD) as part:
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    missing = {path: record["files"][path] for path in wrong}
    if sum(known["size"] for known in missing.values()) > shutil.disk_usage(folder).free:
        raise SystemExit(f"{size_text(missing)} to fetch, more than is free under {folder}")
    indexes = {path: known for path, known in missing.items() if path.endswith(".index.json")}
    bring(args, folder, record, indexes)
    for place in {Path(path).parent for path in record["files"]}:
        here = [Path(path).name for path in offered if Path(path).parent == place]
        if nowhere := model_folder.listed(model_folder.missing_shards(folder / place, here)):
            told = f"{record['repo']} is not whole: its index names files that are not in the"
            raise SystemExit(f"{told} repository ({nowhere}); {ELSEWHERE}")
    bring(args, folder, record, {p: known for p, known in missing.items() if p not in indexes})


def bring(args, folder: Path, record: dict, files: dict) -> None:
    """Fetch these; what arrives broken is deleted."""
    try:
        if files:
            fetch(record, files, folder, args.aria2)
    except Exception as error:
        raise SystemExit(explain(error, folder, record)) from None
    broken = problems(folder, files)
    for path, why in broken.items():
        print(f"  {path}: {why}")
        (folder / path).unlink(missing_ok=True)
    remedy = f"Again: {again()}"
    if set(broken.values()) == {POINTER}:
        remedy = f"Their contents are not in this repository; {ELSEWHERE}"
    if broken:
        raise SystemExit(f"{len(broken)} of {len(files)} files arrived broken. {remedy}")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    folder = Path(args.model)
    only_local = folder.is_dir() and (args.verify or args.manifest or args.try_)
    if not folder.is_dir():
        folder = Path(args.to or FOLDERS["dataset" if args.dataset else "model"]) / folder.name
    if args.verify and not args.repair:
        verify(folder, load_record(folder).get("files", {}))
    elif args.repair or args.dry_run or not only_local:
        download(args, folder)
    record = load_record(folder)
    is_data = record.get("type") == "dataset"
    if args.manifest and not args.dry_run:
        describe_data(folder, record) if is_data else describe(folder, record, args)
    if args.try_ and is_data:
        raise SystemExit(f"{folder} is a data set; --try is for models")
    if args.try_ and not args.dry_run:
        from common.demo.chat_model import ChatModel

        question = {"role": "user", "content": "你好，请用一句话介绍你自己。"}
        *_, (answer, _) = ChatModel(folder).stream([question], max_new_tokens=48)
        print(f"{question['content']} -> {answer.strip()!r}")


def interrupted(*_) -> None:
    print(f"interrupted, complete files stay. Again: {again()}", file=sys.stderr, flush=True)
    os._exit(75)  # the libraries' threads would first end the files they are at


if __name__ == "__main__":
    machine.tolerate_terminals()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, interrupted)
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except SystemExit as error:
        sys.exit(f"error: {error.code}" if isinstance(error.code, str) else error.code)
