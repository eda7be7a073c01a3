"""Where a model's files are listed: the Hugging Face hub or a mirror of it, ModelScope, or a folder
on a web server."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import quote, urlencode

from tools.hub import link as web
from tools.hub.fetch import Entry, size_text
from tools.hub.link import Fatal, Link, Retry
from tools.hub.model_folder import MANIFEST

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before huggingface_hub is imported
MODELSCOPE = "https://www.modelscope.cn"
MODELSCOPE_LIMIT = 3000  # files; its listing ends there without a word
LARGEST_LISTING = 64 << 20  # bytes

PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
FOREIGN = (
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".tflite",
    ".ot",
    ".mlmodel",
    ".llamafile",
)
CODE = (".py", ".so", ".sh")


@dataclass(frozen=True)
class Listing:
    """What a source holds. `source` is hf, modelscope or an address, `place` the address in use,
    `commit` may be ""."""

    source: str
    place: str
    repo: str
    revision: str
    commit: str
    files: list[Entry]


def open_source(source: str, repo: str, revision: str | None, link: Link) -> Listing:
    """Ask `source` (hf, modelscope or http(s)://...) for the files of `repo`; sets the session and
    hints of `link`."""
    if source == "hf":
        from huggingface_hub import constants, get_token

        return _hub(source, constants.ENDPOINT, repo, revision, get_token(), link)
    if source == "modelscope":
        return _modelscope(repo, revision or "master", link)
    retries, link.retries = (
        link.retries,
        min(2, link.retries),
    )  # perhaps it is simply no address of this kind
    try:
        # without token: only HF_ENDPOINT gets it
        return _folder(source, repo, link) or _hub(source, source, repo, revision, None, link)
    finally:
        link.retries = retries


# ---- Hugging Face's layout ----------------------------------------------------------------------------------


def _hub(
    source: str, place: str, repo: str, revision: str | None, token: str | None, link: Link
) -> Listing:
    from huggingface_hub import HfApi

    place = place.rstrip("/")
    link.session = web.session(token)
    lacks = (
        "set HF_TOKEN to a token that may read it"
        if not token
        else "HF_TOKEN is not allowed to read it"
    )
    link.denied = f"{lacks}, and accept the licence on {place}/{repo} if it asks for that"
    api = HfApi(endpoint=place, token=token or False)
    info = web.patiently(lambda: _hub_info(api, repo, revision, link), link, web.host(place))
    # the commit, not the branch: the same version however long the download takes
    root = f"{place}/{repo}/resolve/{quote(info.sha or revision or 'main', safe='')}"
    files = []
    for found in info.siblings or []:
        name, url = found.rfilename, f"{root}/{quote(found.rfilename)}"
        large = found.lfs
        small = None if large else Entry(name, url, found.size, git=found.blob_id)
        files.append(small or Entry(name, url, large.size, large.sha256))
    return Listing(source, place, repo, revision or "main", info.sha or "", files)


def _hub_info(api, repo: str, revision: str | None, link: Link):
    """ModelInfo with sizes and hashes; Retry or Fatal."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    where = web.host(api.endpoint)
    try:
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=link.stall)
    except OfflineModeIsEnabled:
        raise Fatal(
            "HF_HUB_OFFLINE=1 forbids the network; a folder that was fetched before needs none"
        ) from None
    except HFValidationError as error:
        raise Fatal(" ".join(str(error).split())) from None
    except HfHubHTTPError as error:
        code, headers = error.response.status_code, error.response.headers
        if web.passes(code):
            wait = web.retry_after(headers.get("Retry-After", ""))
            raise Retry(f"{where} answers {code}", wait=wait) from None
        if headers.get("X-Error-Code") == "RevisionNotFound":
            raise Fatal(f"{where} has no revision {revision} of {repo}", code) from None
        if code in (401, 403):  # hubs say 401 for names that do not exist, too
            raise Fatal(
                f"{where} answers {code} for {repo}: no such model, or it is closed to you: {link.denied}",
                code,
            ) from None
        raise Fatal(f"{where} has no model {repo} (it answers {code})", code) from None
    except HTTPError as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise Retry(
            f"{where} cannot be reached ({why}); HF_ENDPOINT chooses a mirror, --source modelscope another hub"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Retry(f"{where} answers with something that is no hub's listing") from None


# ---- ModelScope ---------------------------------------------------------------------------------------------


def _modelscope(repo: str, revision: str, link: Link) -> Listing:
    """Its two public addresses (list, file) are all that is needed, hence no `modelscope`
    package."""
    place, token = (
        os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE,
        os.environ.get("MODELSCOPE_API_TOKEN"),
    )
    place = (place if "://" in place else f"https://{place}").rstrip("/")
    link.session = web.session(token)
    if token:  # the listing asks for the cookie, newer addresses for the header
        domain, safe = web.host(place).partition(":")[0], place.startswith("https:")
        link.session.cookies.set("m_session_id", token, domain=domain, secure=safe)
    link.denied = f"set MODELSCOPE_API_TOKEN, and accept the licence on {place}/models/{repo} if it asks for that"
    root = f"{place}/api/v1/models/{repo}/repo"
    try:
        answer = get_json(
            f"{root}/files?{urlencode({'Revision': revision, 'Recursive': True})}", link
        )
    except Fatal as error:
        if error.status != 404:
            raise
        hint = "ids differ between hubs, search its page for yours"
        raise Fatal(
            f"{web.host(place)} has no model {repo} with revision {revision} ({hint})", 404
        ) from None
    found = _member(answer, "Data", "Files")
    if len(found) >= MODELSCOPE_LIMIT:
        raise Fatal(
            f"{repo} has {MODELSCOPE_LIMIT} files or more, ModelScope lists no further; use --source hf"
        )
    files = [
        Entry(
            path=f["Path"],
            url=f"{root}?{urlencode({'Revision': revision, 'FilePath': f['Path']})}",
            size=f.get("Size"),
            sha256=f.get("Sha256") or None,
        )
        for f in found
        if f.get("Type") != "tree"
    ]
    return Listing("modelscope", place, repo, revision, "", files)


def _member(answer, *keys) -> list[dict]:
    for key in keys:
        answer = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(answer, list) or not all(
        isinstance(f, dict) and isinstance(f.get("Path"), str) for f in answer
    ):
        raise Fatal("the listing of ModelScope has another form than expected")
    return answer


# ---- any web server -----------------------------------------------------------------------------------------


def _folder(url: str, repo: str, link: Link) -> Listing | None:
    """A folder with our manifest.json at the address, or under it by the model's name; None when
    there is none."""
    link.session, other = web.session(), None
    for base in dict.fromkeys(
        f"{url.rstrip('/')}{tail}" for tail in ("", f"/{repo}", f"/{repo.split('/')[-1]}")
    ):
        try:
            found = get_json(f"{base}/manifest.json", link)
        except Fatal as error:
            if error.status == 0:
                raise
            continue
        if not isinstance(found, dict) or MANIFEST not in found:
            continue
        if found.get("repo") in ("", None, repo):
            try:
                files = [
                    Entry(f["path"], f"{base}/{quote(f['path'])}", f["size"], f["sha256"])
                    for f in found["files"]
                ]
            except (KeyError, TypeError):
                raise Fatal(f"{base}/manifest.json is damaged") from None
            return Listing(
                url, base, repo, found.get("revision") or "", found.get("commit") or "", files
            )
        other = other or Fatal(f"{base} holds {found['repo']}, not {repo}")
    if other:
        raise other
    return None


def get_json(url: str, link: Link):
    """What stands at an address as JSON, None when it is no JSON."""

    def attempt() -> bytes:
        with web.get(link, url) as answer:
            body = bytearray()
            for block in web.blocks(answer, link):
                body += block
                if len(body) > LARGEST_LISTING:
                    raise Fatal(
                        f"the listing of {web.host(url)} is longer than {size_text(LARGEST_LISTING)}"
                    )
            length = answer.headers.get("Content-Length", "")
            if length.isdigit() and len(body) < int(length):
                raise Retry("the listing was cut")
            return bytes(body)

    try:
        return json.loads(web.patiently(attempt, link, web.host(url)))
    except ValueError:
        return None


# ---- which of the files -------------------------------------------------------------------------------------


def matches(path: str, patterns: list[str]) -> bool:
    """Whether a path, its file name or one of its folders (`onnx/`) fits one of the patterns."""
    return any(
        fnmatchcase(path, p)
        or fnmatchcase(path.rsplit("/", 1)[-1], p)
        or (p.endswith("/") and path.startswith(p))
        for p in patterns
    )


def reason_to_skip(path: str, allow_pickle: bool, has_safetensors: bool) -> str | None:
    name = path.rsplit("/", 1)[-1].lower()
    if any(part.startswith(".") for part in path.split("/")):
        return "hidden"
    if name.endswith(PICKLE) and not (allow_pickle and not has_safetensors):
        return "pickle"
    if name.endswith(FOREIGN):
        return "other formats"
    if name.endswith(CODE):
        return "code"
    if name.startswith("consolidated") and name.endswith(".safetensors"):
        return "the same weights again"
    return None


def choose(files: list[Entry], include: list[str], exclude: list[str], allow_pickle: bool):
    """(files to fetch, reason -> files left out). Fatal when nothing is left, or no weights but
    pickles.

    `include` names exactly what to fetch, even code and other formats, but pickles only with
    `allow_pickle`.
    """
    plain = [f for f in files if f.path.endswith(".safetensors") and "consolidated" not in f.path]
    wanted, skipped = [], {}
    for file in files:
        if include:
            pickled = file.path.lower().endswith(PICKLE) and not allow_pickle
            reason = (
                "not included" if not matches(file.path, include) else "pickle" if pickled else None
            )
        else:
            reason = reason_to_skip(file.path, allow_pickle, bool(plain))
        reason = "excluded" if matches(file.path, exclude) else reason
        if reason:
            skipped.setdefault(reason, []).append(file)
        else:
            wanted.append(file)
    _refuse_without_weights(wanted, skipped, include)
    return wanted, skipped


def _refuse_without_weights(
    wanted: list[Entry], skipped: dict[str, list[Entry]], include: list[str]
) -> None:
    pickles = [
        f for f in skipped.get("pickle", []) if not f.path.endswith((".pkl", ".pickle", ".joblib"))
    ]
    weights = [f for f in wanted if f.path.lower().endswith((".safetensors", *PICKLE, *FOREIGN))]
    if not wanted and include and not pickles:
        raise Fatal(
            f"nothing to fetch: no file of the repository fits --include {' '.join(include)}"
        )
    if pickles and not weights and (not include or not wanted):
        raise Fatal(
            f"the weights are there only as pickle ({pickles[0].path}), and loading a pickle runs whatever code its "
            "author put in. --allow_pickle true fetches them all the same; better: a repository with safetensors"
        )
    if not wanted:
        raise Fatal(
            "nothing to fetch: every file of the repository is left out; name some with --include"
        )
    foreign = skipped.get("other formats", [])
    if foreign and not weights and not include:
        raise Fatal(
            f"no safetensors, only other formats ({foreign[0].path}); name what you want with --include"
        )
