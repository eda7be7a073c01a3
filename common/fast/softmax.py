"""The softmax behind the head: logits become the gradient of the loss, in place.

In plain torch this is several passes over float32 values. On a CPU these stay in its cache, a few
rows at a time. On an accelerator each pass goes through its memory, 17 bytes and more for a logit
of two; torch.compile makes kernels that read the logits twice and write them once, without a
float32 buffer. They are taken where device.compile_pays() says so, for the vocabularies of real
models; TORCH_COMPILE_DISABLE=1 is how to do without.

R rows of a chunk, n of them in use, V vocabulary.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from common import device, voice

CACHE_ELEMENTS = 2**19  # fp32 elements that stay in a CPU core's L2 cache during the softmax
COMPILED_VOCABULARY = 4096  # the runs of smaller ones are over before a kernel is compiled
_failed: list[str] = []  # why the kernels could not be compiled


def pieces(total: int, size: int) -> list[slice]:
    """Equal slices of at most `size` covering range(total)."""
    count = -(-total // size)
    edges = [total * i // count for i in range(count + 1)] if count else [0]
    return [slice(start, end) for start, end in pairwise(edges)]


def is_compiled(kind: str, vocabulary: int) -> bool:
    """Whether `loss_of_chunk_` takes the compiled kernel for logits [R, vocabulary] on a device of
    this kind, and so wants one R for all chunks."""
    return kind != "cpu" and vocabulary >= COMPILED_VOCABULARY and _pays() and not _failed


def loss_of_chunk_(
    buffer: Tensor,
    targets: Tensor,
    log_probs: Tensor,
    correct: Tensor | None,
    wants_gradient: bool = True,
    cap: float = 0.0,
) -> None:
    """The first n rows of buffer [R, V]: logits -> d(sum of losses)/d(logits), where that is
    wanted; fills log_probs [n] and, if given, correct [n] for targets [n]. fp32 inside.

    cap: the losses are those of cap * tanh(logits / cap) (Gemma team 2024); 0: of the logits.
    """
    rows = len(targets)
    if is_compiled(buffer.device.type, buffer.shape[1]):
        found = _compiled(buffer, targets, correct is not None, wants_gradient, cap)
        if found is not None:
            log_probs.copy_(found[0][:rows])
            if correct is not None:
                correct.copy_(found[1][:rows])
            return
    _eager(buffer[:rows], targets, log_probs, correct, wants_gradient, cap)


# ---- plain torch ----
def _eager(
    logits: Tensor,
    targets: Tensor,
    log_probs: Tensor,
    correct: Tensor | None,
    wants_gradient: bool,
    cap: float = 0.0,
) -> None:
    rows, vocabulary = logits.shape
    on_cpu = logits.device.type == "cpu"
    buffers = 2 if cap else 1
    step = max(1, CACHE_ELEMENTS // (buffers * vocabulary)) if on_cpu else rows
    size = (buffers, min(step, rows), vocabulary)
    work = torch.empty(size, dtype=torch.float32, device=logits.device)
    for part in pieces(rows, step):
        x = logits[part]
        target = targets[part, None]
        y = work[0, : part.stop - part.start]
        if correct is not None:
            correct[part] = x.argmax(-1) == target[:, 0]
        seen = x if x.dtype == y.dtype else y.copy_(x)
        if cap:
            share = work[1, : part.stop - part.start]
            torch.div(seen, cap, out=share).tanh_()
            seen = torch.mul(share, cap, out=y)
        torch.log_softmax(seen, -1, out=y)
        log_prob = y.gather(1, target)
        log_probs[part] = log_prob[:, 0]
        if wants_gradient:
            y.exp_().scatter_(1, target, log_prob.exp() - 1)
            if cap:  # times the derivative, 1 - share^2
                y.addcmul_(y, share.square_(), value=-1)
            x.copy_(y)


# ---- compiled ----
def _fused(logits: Tensor, targets: Tensor, wants_correct: bool, wants_gradient: bool, cap: float):
    """logits [R, V], targets [R] -> log_probs [R] and, if wanted, correct [R]."""
    correct = logits.argmax(-1) == targets if wants_correct else None
    seen = logits.float()
    slope = 1.0
    if cap:
        share = torch.tanh(seen / cap)
        seen = cap * share
        slope = 1 - share * share
    log_probs = seen.log_softmax(-1)
    log_prob = log_probs.gather(1, targets[:, None])
    if wants_gradient:
        is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
        logits.copy_(slope * torch.where(is_target, log_prob.exp() - 1, log_probs.exp()))
    return log_prob[:, 0], correct


def _compiled(
    buffer: Tensor, targets: Tensor, wants_correct: bool, wants_gradient: bool, cap: float
):
    """As `_fused`, over all rows of the buffer: its shape is that of every chunk, so that kernels
    do not depend on what a process saw first, and a resumed run takes the same ones. None where
    they could not be compiled, which is told once; a compiler fails before anything is run, so that
    the logits are then untouched."""
    padded = targets.new_zeros(len(buffer))
    padded[: len(targets)] = targets
    try:
        return _kernels()(buffer, padded, wants_correct, wants_gradient, cap)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # compilers have many
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _failed.append(reason)
        voice.say(f"the softmax of the head is not compiled, which costs speed: {reason[:300]}")
        return None


@functools.cache
def _kernels():
    # a sum that wins a race on the card may be another one after a resume, in another order:
    # "deterministic" lets none race. No fullgraph: where torch does not compile (under a dispatch
    # mode), it would run the function, which writes into the logits, and fail after that
    return torch.compile(_fused, dynamic=False, options={"deterministic": True})


@functools.cache
def _pays() -> bool:
    return device.compile_pays()
