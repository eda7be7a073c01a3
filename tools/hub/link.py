"""Talk to one server over HTTP with patience, and tell what passes by itself from what does not."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

import requests
import urllib3

BLOCK = 1 << 16  # bytes read at once
CONNECT = 10  # seconds
LONGEST_WAIT = 60  # seconds between two tries, unless the server asks for more


class Retry(Exception):
    """May pass by itself. `wait`: seconds the server asked for. `restart`: what was gathered is of
    no use."""

    def __init__(self, message: str, wait: float | None = None, restart: bool = False):
        super().__init__(message)
        self.wait, self.restart = wait, restart


class Fatal(Exception):
    """Will not pass by itself. `status`: of HTTP."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """`Link.stop` was set."""


@dataclass
class Link:
    """How to talk to one server."""

    session: requests.Session
    stall: float = 30  # seconds without a byte before the connection is cut
    retries: int = 8  # in a row without a new byte
    wait: float = 1  # seconds before the first retry, doubled for each further one
    denied: str = ""  # what to do about 401 and 403
    aria2: str | None = None  # path of aria2c
    aria2_from: int = 64 << 20  # bytes; below, several connections cost more than they bring
    note: Callable[[str], None] = print
    stop: threading.Event = field(default_factory=threading.Event)


def session(token: str | None = None) -> requests.Session:
    """Proxies and certificates as the environment says. A redirect to another host or port goes
    without the token."""
    made = requests.Session()
    made.headers.update({"User-Agent": "danpu", "Accept-Encoding": "identity"})
    for scheme in ("https://", "http://"):
        made.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=64))
    if token:
        made.auth = partial(_sign, token)  # as `auth`, since ~/.netrc would overwrite a header
    return made


def _sign(token: str, request):
    request.headers["Authorization"] = f"Bearer {token}"
    return request


def host(url: str) -> str:
    """Host and port only: messages do not show the rest, which may hold a signature."""
    return urlsplit(url).netloc.rpartition("@")[2]


def get(link: Link, url: str, headers: dict | None = None) -> requests.Response:
    """An open answer with status 200 or 206. Everything else raises Retry or Fatal."""
    try:
        answer = link.session.get(url, headers=headers, stream=True, timeout=(CONNECT, link.stall))
    except requests.RequestException as error:
        raise _failure(error, host(url), link) from None
    code = answer.status_code
    if code in (200, 206):
        return answer
    answer.close()
    told = f"{host(answer.url)} answers {code} {answer.reason or ''}".strip()
    if code == 416:
        raise Retry(told, restart=True)
    if passes(code):
        raise Retry(told, wait=retry_after(answer.headers.get("Retry-After", "")))
    raise Fatal(f"{told}; {link.denied}" if code in (401, 403) and link.denied else told, code)


def passes(status: int) -> bool:
    """Whether a refusal with this status may pass by itself."""
    return status >= 500 or status in (408, 425, 429)


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header (a number or a date), at most an hour; None when it says
    nothing."""
    try:
        number = value.strip().isdigit()
        seconds = (
            float(value)
            if number
            else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0), 3600)


def blocks(answer: requests.Response, link: Link) -> Iterator[bytes]:
    """The body as it arrives, so that a cut loses nothing that came: it ends early then. Retry
    after a stall."""
    read = getattr(answer.raw, "read1", answer.raw.read)
    try:
        while block := read(BLOCK, decode_content=True):
            yield block
    except urllib3.exceptions.ReadTimeoutError:
        raise Retry(f"no bytes for {link.stall:g} s") from None
    except (urllib3.exceptions.HTTPError, OSError):
        return


def _failure(error: requests.RequestException, where: str, link: Link) -> Exception:
    """What to raise for an exception of requests, whose own text may hold a signed address."""
    why = _innermost(error)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Fatal(
            f"the certificate of {where} is not trusted; REQUESTS_CA_BUNDLE=/path/ca.pem names your authority"
        )
    if isinstance(error, requests.exceptions.ProxyError) and "407" in str(error):
        return Fatal(
            "the proxy asks for a password: HTTPS_PROXY=http://NAME:PASSWORD@HOST:PORT", 407
        )
    if isinstance(error, requests.exceptions.ProxyError):
        return Retry(f"the proxy (HTTPS_PROXY, HTTP_PROXY) gives no way to {where} ({why})")
    if isinstance(error, ValueError):  # no address, or one of another kind
        return Fatal(f"{where or 'the server'} leads to an address that is not http(s)")
    if isinstance(error, requests.TooManyRedirects):
        return Fatal(f"{where} redirects in circles")
    if isinstance(error, requests.ConnectTimeout):
        return Retry(f"no connection to {where} within {CONNECT} s")
    if isinstance(error, requests.ReadTimeout):
        return Retry(f"no answer from {where} for {link.stall:g} s")
    return Retry(f"the connection to {where} failed ({why})")


def _innermost(error: BaseException) -> str:
    """The operating system's words at the bottom of a chain of exceptions."""
    chain, words = [error], "cut"
    for link in chain:
        inner = [getattr(link, "reason", None), *link.args, link.__cause__, link.__context__]
        chain += [e for e in inner if isinstance(e, BaseException) and e not in chain]
        if isinstance(link, OSError) and isinstance(link.strerror, str):
            words = link.strerror
    return words


def patiently(attempt: Callable, link: Link, what: str, have: Callable[[], int] = lambda: 0):
    """attempt() until it returns; Retry waits (twice as long each time, with jitter) and tries
    again.

    have: bytes gathered so far; more than ever before starts the count of failures anew.
    Fatal after `link.retries` failures in a row, Stopped when link.stop is set.
    """
    best, failures = have(), 0
    while True:
        try:
            return attempt()
        except Retry as error:
            failures = 1 if have() > best else failures + 1
            best = max(best, have())
            if failures > link.retries:
                raise Fatal(f"{error}; gave up after {failures} tries") from None
            pause = min(LONGEST_WAIT, link.wait * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
            pause = pause if error.wait is None else error.wait
            link.note(f"{what}: {error}; again in {pause:.1f} s")
            if link.stop.wait(pause):
                raise Stopped from None
