"""The thread that owns the model: it steps the engines while requests join and leave a batch.

One engine for each model id (the base and each adapter); those that have something to do take
turns, a step each.
"""

from __future__ import annotations

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from engine.generation import Engine, Request, Sampling

from common.demo.openai_request import Refusal


@dataclass(eq=False)
class Job:
    """Tokens wanted after a prompt.

    on_token: called in the worker's thread with the Request after each new token.
    on_failure: called there, once, with a Refusal, when there will be no more.
    """

    model: str
    prompt: list[int]
    sampling: Sampling
    constraint: object = None
    on_token: Callable[[Request], object] | None = None
    on_failure: Callable[[Refusal], object] | None = None
    request: Request | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """From any thread: no more tokens are computed for it."""
        self.cancelled = True
        if self.request:
            self.request.cancel()


@dataclass(eq=False)
class Scoring:
    """Log-probabilities wanted of the tokens `ids` [T] themselves.

    on_done: called with (log-probabilities of ids[1:], the likeliest `top` of each place as
    (id, log-probability)).
    """

    model: str
    ids: list[int]
    top: int
    on_done: Callable[[list[float], list[list[tuple[int, float]]]], object]
    on_failure: Callable[[Refusal], object]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Worker:
    """Steps `engines` (model id -> Engine) in a thread of its own until `close`."""

    def __init__(self, model, adapters: dict[str, str | None], slots: int, max_length: int):
        """adapters: model id -> name of a PEFT adapter of `model`, None: without."""
        self.model = model
        self.adapters = adapters
        self.slots = slots
        self.engines = {name: Engine(model, slots, max_length) for name in adapters}
        # at most the model's positions
        self.max_length = min(engine.max_length for engine in self.engines.values())
        self.jobs: dict[Request, Job] = {}
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.closing = False
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, job: Job | Scoring) -> None:
        """From any thread."""
        self.inbox.put(job)

    def close(self) -> None:
        """End all answers under way; in a signal handler too."""
        self.closing = True
        self.inbox.put(None)

    @property
    def running(self) -> int:
        """Answers in the batches."""
        return sum(_unfinished(engine.running) for engine in self.engines.values())

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return sum(_unfinished(engine.waiting) for engine in self.engines.values())

    # ---- the thread ----

    def _work(self) -> None:
        while not self.closing:
            self._take_in(wait=not self._busy())
            for name, engine in self.engines.items():
                if _has_work(engine) and not self.closing:
                    self._step(name, engine)
        for job in self.jobs.values():
            job.on_failure(Refusal(503, "the server is shutting down", code="shutting_down"))

    def _busy(self) -> bool:
        return any(_has_work(engine) for engine in self.engines.values())

    def _take_in(self, wait: bool) -> None:
        """Begin what has come; with `wait` sleep until something comes."""
        try:
            while True:
                job = self.inbox.get(block=wait)
                if job is None:
                    return
                wait = False
                if not job.cancelled:
                    self._begin(job)
        except queue.Empty:
            return

    def _begin(self, job: Job | Scoring) -> None:
        with self._failing([job]):
            if isinstance(job, Scoring):
                with self._adapter(job.model):
                    job.on_done(*score(self.model, job.ids, job.top))
                return
            job.request = self.engines[job.model].submit(
                job.prompt, job.sampling, constraint=job.constraint
            )
            self.jobs[job.request] = job

    def _step(self, name: str, engine: Engine) -> None:
        stepped: list[tuple[Request, int]] = []
        with self._failing(self._jobs_of(engine), engine), self._adapter(name):
            stepped = engine.step()
        for request, _ in stepped:
            job = self.jobs.get(request)
            if job:
                job.on_token(request)
        for request in [request for request in self.jobs if request.finished]:
            del self.jobs[request]

    def _jobs_of(self, engine: Engine) -> list[Job]:
        requests = [*engine.running, *engine.waiting]
        return [self.jobs[request] for request in requests if request in self.jobs]

    @contextmanager
    def _failing(self, jobs: list, engine: Engine | None = None):
        """An error of the model fails these jobs, and an engine begins anew; the thread goes on."""
        try:
            yield
        except ValueError as error:  # the engine refuses the prompt
            for job in jobs:
                job.on_failure(Refusal(400, str(error), code="invalid_value"))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            told = Refusal(
                500, f"the model failed: {type(error).__name__}", code="generation_failed"
            )
            if isinstance(error, torch.OutOfMemoryError):
                told = Refusal(503, "out of memory; try again later", code="out_of_memory")
            for job in jobs:
                job.on_failure(told)
                job.cancel()
            if engine:
                name = next(name for name, one in self.engines.items() if one is engine)
                self.engines[name] = Engine(self.model, self.slots, self.max_length)

    @contextmanager
    def _adapter(self, name: str):
        adapter = self.adapters[name]
        if adapter:
            self.model.set_adapter(adapter)
            yield
        elif hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield


def _has_work(engine: Engine) -> bool:
    return bool(_unfinished(engine.waiting) or _unfinished(engine.running))


def _unfinished(requests: Iterable[Request]) -> int:
    return sum(not request.finished for request in list(requests))


@torch.inference_mode()
def score(model, ids: list[int], top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """ids [T] -> log-probabilities of ids[1:], and the `top` likeliest tokens of each place."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    chances = logits.log_softmax(-1)
    found = chances.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    values, best = chances.topk(top, -1) if top else (chances[:, :0], tokens[:, :0])
    pairs = zip(best.tolist(), values.tolist(), strict=True) if top else [((), ())] * len(found)
    return found, [list(zip(ids, lps, strict=True)) for ids, lps in pairs]
