"""Token losses that never build the full [tokens, vocabulary] logits.

`use_chunked_loss(model)` patches one causal language model so that `model(..., labels=...)`
computes its loss inside the output head, only at positions that have a label and a few hundred of
them at a time. The gradient is computed in the same pass (torch's `linear_cross_entropy` does the
same, but runs bf16 on CPUs in fp32 and rounds the loss). Calls without labels (generation, logits)
are untouched.
"""

from __future__ import annotations

import functools
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a token that is not trained, in every library used here
CPU_ROWS = 512  # fewer rows make the weight-gradient product slow, more only cost memory
ACCELERATOR_LOGITS = 2**27  # elements of one chunk of logits on an accelerator (256 MiB in bf16)
CACHE_ELEMENTS = 2**19  # fp32 elements that stay in a CPU core's L2 cache during the softmax


def _pieces(total: int, size: int) -> list[slice]:
    """Equal slices of at most `size` covering range(total)."""
    count = -(-total // size)
    edges = [total * i // count for i in range(count + 1)] if count else [0]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _chunk_rows(device: torch.device, vocab: int) -> int:
    return CPU_ROWS if device.type == "cpu" else max(256, ACCELERATOR_LOGITS // vocab)


def _softmax_loss_(
    logits: Tensor, targets: Tensor, log_probs: Tensor, correct: Tensor | None
) -> None:
    """[n, V] logits -> d(sum of losses)/d(logits) in place; fills log_probs [n] and, if given,
    correct [n].

    fp32 inside; on CPU a few rows at a time, so that the passes over fp32 values stay in the cache.
    """
    rows, vocab = logits.shape
    step = max(1, CACHE_ELEMENTS // vocab) if logits.device.type == "cpu" else rows
    work = torch.empty(min(step, rows), vocab, dtype=torch.float32, device=logits.device)
    for part in _pieces(rows, step):
        x, target, y = logits[part], targets[part, None], work[: part.stop - part.start]
        if correct is not None:
            correct[part] = x.argmax(-1) == target[:, 0]
        torch.log_softmax(x if x.dtype == y.dtype else y.copy_(x), -1, out=y)
        log_prob = y.gather(1, target)
        log_probs[part] = log_prob[:, 0]
        y.exp_().scatter_(1, target, log_prob.exp() - 1)
        x.copy_(y)


def _add_weight_grad_(
    grad: Tensor, grad_logits: Tensor, hidden: Tensor, scale: float, first: bool
) -> None:
    """grad [V, D] += scale * grad_logits [n, V]^T @ hidden [n, D]; `first` overwrites instead.

    An fp32 gradient of half-precision products is summed in fp32, in blocks that stay in the cache.
    """
    if grad.dtype == hidden.dtype:
        torch.addmm(grad, grad_logits.t(), hidden, beta=0 if first else 1, alpha=scale, out=grad)
        return
    for part in _pieces(len(grad), 4096 if grad.device.type == "cpu" else len(grad)):
        product = grad_logits[:, part].t() @ hidden
        grad[part].copy_(product).mul_(scale) if first else grad[part].add_(product, alpha=scale)


class _HeadLoss(torch.autograd.Function):
    """hidden [N, D], weight [V, D], bias [V] | None, targets [N] -> scaled loss sum, log_probs [N],
    correct [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, scale, count):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, h, w = len(hidden), hidden.to(dtype), weight.to(dtype)
        log_probs = torch.zeros(rows, dtype=torch.float32, device=h.device)
        correct = torch.zeros(rows, dtype=torch.bool, device=h.device)
        ctx.hidden = torch.empty_like(h) if need_hidden else None
        ctx.weight = torch.empty_like(weight) if need_weight and rows else None
        ctx.bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for part, logits in _logit_chunks(h, w, bias):
            _softmax_loss_(logits, targets[part], log_probs[part], correct[part] if count else None)
            if need_hidden:
                torch.mm(logits, w, out=ctx.hidden[part])
            if ctx.weight is not None:
                _add_weight_grad_(ctx.weight, logits, h[part], scale, part.start == 0)
            if need_bias:
                ctx.bias += logits.sum(0, dtype=torch.float32)
        ctx.scale, ctx.dtypes = scale, (hidden.dtype, weight.shape, weight.dtype)
        ctx.mark_non_differentiable(log_probs, correct)
        return log_probs.sum() * -scale, log_probs, correct

    @staticmethod
    def backward(ctx, grad, *_):
        (hidden_dtype, shape, weight_dtype), factor = ctx.dtypes, grad * ctx.scale
        hidden = None if ctx.hidden is None else (ctx.hidden * factor).to(hidden_dtype)
        bias = None if ctx.bias is None else ctx.bias * factor
        weight, ctx.weight, ctx.hidden = ctx.weight, None, None
        if weight is None and ctx.needs_input_grad[1]:
            weight = torch.zeros(shape, dtype=weight_dtype, device=grad.device)
        elif weight is not None and not (grad.device.type == "cpu" and grad == 1):
            weight.mul_(grad)  # usually 1 on CPU: the scale is already in
        return hidden, weight, bias, None, None, None, None


class _HeadLogProbs(torch.autograd.Function):
    """hidden [N, D], weight [V, D], bias [V] | None, targets [N] -> log_probs [N], each with a
    gradient of its own.

    A frozen head needs no second product in backward: d(log_prob)/d(hidden) is kept, [N, D]. For a
    head that trains the logits are computed again, chunk by chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype):
        need_hidden, *need_head = ctx.needs_input_grad[:3]
        h, w = hidden.to(dtype), weight.to(dtype)
        log_probs = torch.zeros(len(hidden), dtype=torch.float32, device=h.device)
        ctx.slope = torch.empty_like(h) if need_hidden and not any(need_head) else None
        for part, logits in _logit_chunks(h, w, bias):
            _softmax_loss_(logits, targets[part], log_probs[part], None)
            if ctx.slope is not None:
                torch.mm(logits, w, out=ctx.slope[part])
        ctx.inputs = (hidden, weight, bias, targets, dtype) if any(need_head) else None
        ctx.hidden_dtype = hidden.dtype
        return log_probs

    @staticmethod
    def backward(ctx, grad):
        if ctx.inputs is None:
            return (ctx.slope * -grad[:, None]).to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, bias, targets, dtype = ctx.inputs
        h, w, scratch = hidden.to(dtype), weight.to(dtype), torch.empty_like(grad)
        d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for part, logits in _logit_chunks(h, w, bias):
            _softmax_loss_(logits, targets[part], scratch[part], None)
            logits *= -grad[part, None]
            torch.mm(logits, w, out=d_hidden[part])
            _add_weight_grad_(d_weight, logits, h[part], 1.0, part.start == 0)
            if bias is not None:
                d_bias += logits.sum(0, dtype=torch.float32)
        return (
            d_hidden.to(hidden.dtype),
            d_weight,
            None if bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _logit_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """Yields (slice, logits [n, V]); the logits share one buffer."""
    rows, size = len(hidden), _chunk_rows(hidden.device, len(weight))
    buffer = torch.empty(min(size, rows), len(weight), dtype=hidden.dtype, device=hidden.device)
    for part in _pieces(rows, size):
        logits = buffer[: part.stop - part.start]
        torch.mm(hidden[part], weight.t(), out=logits)
        if bias is not None:
            logits += bias
        yield part, logits


class _State:
    """What the patched model, head and loss function of one call share; `index` is None outside
    such a call."""

    def __init__(self):
        self.per_token = False
        self.reset()

    def reset(self):
        self.head = self.positions = self.index = self.targets = self.items = self.loss = (
            self.stats
        ) = None
        self.used = False


def _note_labels(state: _State, head: nn.Module, kwargs: dict) -> None:
    """Find the positions whose next token has a label (or whose entry in shift_labels is one)."""
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(kwargs["labels"][..., 1:], (0, 1), value=IGNORE)
    targets = targets.flatten()
    state.positions, state.index = targets.numel(), (targets != IGNORE).nonzero().squeeze(1)
    state.targets = targets[state.index]
    state.head, state.items = head, kwargs.get("num_items_in_batch")


def _model_forward(self, *args, **kwargs):
    state = self._chunked
    if kwargs.get("labels") is None:
        return self._stock_forward(*args, **kwargs)
    head = self.get_output_embeddings()
    if "_chunked" not in head.__dict__:  # replaced since (an adapter on the head)
        _patch(head, _head_forward, state)
    try:
        _note_labels(state, head, kwargs)
        output = self._stock_forward(*args, **kwargs)
        if not state.used:
            _refuse(self, "does not use its loss_function")
        return output
    finally:
        state.reset()


def _head_forward(self, hidden, *args, **kwargs):
    state = self._chunked
    if state.head is not self:
        return self._stock_forward(hidden, *args, **kwargs)
    if hidden.shape[:-1].numel() != state.positions:
        raise ValueError(
            f"the head got {hidden.shape[:-1].numel()} positions for {state.positions} labels"
        )
    state.targets = state.targets.to(hidden.device)
    rows = hidden.flatten(0, -2).index_select(0, state.index.to(hidden.device))
    log_probs, correct = _head_loss(self, rows, state)
    if state.per_token:
        state.stats = log_probs
    else:
        counted = correct.sum() if correct is not None else log_probs.new_tensor(float("nan"))
        stats = torch.stack(
            [-log_probs.detach().sum(), counted, log_probs.new_tensor(len(rows))]
        ).float()
        # the loss leaves through the head's output, so that ZeRO-3's hooks on the head see its
        # backward
        state.stats = torch.cat([stats, state.loss.float()[None]])
    return state.stats


def _head_loss(head: nn.Module, rows: Tensor, state: _State) -> tuple[Tensor, Tensor | None]:
    """Sets state.loss; returns the targets' log-probabilities and (in eval mode) which were the
    most likely token."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    if type(head) is nn.Linear and state.per_token:
        with torch.autocast(kind, enabled=False):
            log_probs = _HeadLogProbs.apply(rows, head.weight, head.bias, state.targets, dtype)
        state.loss = -log_probs.sum() / _items(state)
        return log_probs, None
    if type(head) is nn.Linear:
        # on CPU reading the count is free, and a gradient that is scaled while computed saves a
        # pass over [V, D]
        scale = 1 / max(1, float(_items(state))) if kind == "cpu" else 1.0
        with torch.autocast(kind, enabled=False):
            state.loss, log_probs, correct = _HeadLoss.apply(
                rows, head.weight, head.bias, state.targets, dtype, scale, not head.training
            )
        if kind != "cpu":
            state.loss = state.loss / _items(state)
        return log_probs, None if head.training else correct
    parts = [
        _generic(head, rows[p], state.targets[p])
        for p in _pieces(len(rows), _chunk_rows(rows.device, 2**18))
    ]
    if not parts:  # keeps the graph
        parts = [(rows.sum(-1).float(), state.targets == IGNORE)]
    log_probs, correct = (torch.cat(list(x)) for x in zip(*parts, strict=True))
    state.loss = -log_probs.sum() / _items(state)
    return log_probs, None if head.training else correct


def _generic(head: nn.Module, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk through any head (an adapter on it, say); its logits are computed again in
    backward."""

    def run(rows):
        logits = head._stock_forward(rows)
        return -F.cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(
            -1
        ) == targets

    return checkpoint(run, rows, use_reentrant=False)


def _items(state: _State) -> Tensor | float:
    return len(state.targets) or 1 if state.items is None else state.items


def _loss_function(self, logits, labels, *args, **kwargs):
    state = self._chunked
    if state.index is None:
        return self._stock_loss(logits, labels, *args, **kwargs)
    if (
        logits.data_ptr() != state.stats.data_ptr()
    ):  # hooks may hand on an alias, but nothing computed from it
        _refuse(self, "changes its logits after the head")
    state.used = True
    return state.loss if state.per_token else logits[-1]


def _refuse(model: nn.Module, why: str):
    raise SystemExit(
        f"{type(model).__name__} {why}, so its loss cannot be computed in chunks; train it without use_chunked_loss"
    )


def _patch(module: nn.Module, forward, state: _State) -> None:
    # bound methods and attributes, so that copy.deepcopy(model) gives a patched copy that stands
    # alone
    @functools.wraps(type(module).forward)  # keeps the signature, which Trainer and generate read
    def patched(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    module._chunked, module._stock_forward = state, module.forward
    module.forward = MethodType(patched, module)


def use_chunked_loss(model: nn.Module) -> nn.Module:
    """Patch a causal language model (before or after peft wraps it); returns the model it was
    given.

    From then on `model(input_ids, labels=labels, num_items_in_batch=None, ...)`, labels [B, T] by keyword, gives
      loss    sum over label tokens / num_items_in_batch (default: the number of label tokens; a batch without any
              label gives 0 with a graph), plus what the stock forward adds (the auxiliary loss of a
              mixture of experts)
      logits  not logits but the fp32 tensor [loss sum, correct argmax tokens (NaN in training mode), label tokens,
              loss], counted over this batch
    Heads that are no plain Linear work at the price of one more product. Models that change their
    logits after the head, or that compute the loss themselves, end with SystemExit at the first
    call: see `check_chunked_loss`.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "_chunked" in inner.__dict__:
        return model
    head = inner.get_output_embeddings()
    if head is None:
        _refuse(inner, "has no output head (get_output_embeddings() is None)")
    state = _State()
    _patch(inner, _model_forward, state)
    _patch(head, _head_forward, state)
    inner._stock_loss, inner.loss_function = inner.loss_function, MethodType(_loss_function, inner)
    return model


@torch.no_grad()
def check_chunked_loss(model: nn.Module, tolerance: float = 1e-2) -> None:
    """SystemExit unless a patched model's loss on a small random batch equals that of its full
    logits.

    The model must be whole (not ZeRO-3 partitioned). The tolerance (relative) allows for half
    precision.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = inner.training
    inner.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(inner.config.get_text_config().vocab_size, (2, 8), generator=generator).to(
        inner.device
    )
    try:
        chunked = inner(input_ids=ids, labels=ids, use_cache=False).logits
        logits = inner(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        stock = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    except (RuntimeError, ValueError, IndexError) as error:
        _refuse(inner, f"fails when its loss is computed in chunks ({str(error).splitlines()[0]})")
    finally:
        inner.train(was_training)
    if abs(chunked[0] - stock) > tolerance * abs(stock):
        _refuse(
            inner,
            f"has another loss in chunks ({chunked[0]:.4f}) than from full logits ({stock:.4f})",
        )


def answer_logprobs(
    model: nn.Module, input_ids: Tensor, labels: Tensor, **inputs
) -> tuple[Tensor, Tensor, int]:
    """Log-probability of each label token, in fp32 and with a graph, without full logits.

    Args:
        model: under `use_chunked_loss`; may be wrapped (peft, DDP, DeepSpeed).
        input_ids, labels: [B, T] padded rows, or one packed row [1, T] with cu_seq_lens_q [n + 1].
    Returns:
        log_probs [N] in the order of the labels, the sequence each belongs to [N], and the number
        of sequences.
    """
    inner = next(m for m in model.modules() if "_stock_loss" in m.__dict__)
    state, batch, length = inner._chunked, *labels.shape
    state.per_token = True
    try:
        log_probs = model(input_ids=input_ids, labels=labels, **inputs).logits
    finally:
        state.per_token = False
    index = (F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten() != IGNORE).nonzero().squeeze(1)
    starts = inputs.get("cu_seq_lens_q")
    starts = torch.arange(0, batch * length + 1, length) if starts is None else starts
    return log_probs, torch.bucketize(index, starts.to(index)[1:], right=True), len(starts) - 1


def sequence_logprobs(model: nn.Module, input_ids: Tensor, labels: Tensor, **inputs) -> Tensor:
    """Sum of the log-probabilities of each sequence's label tokens, as `answer_logprobs` gives
    them: [B], or [n]."""
    return sum_by_owner(*answer_logprobs(model, input_ids, labels, **inputs))


def sum_by_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """values [N] of the sequences in `owner` [N], ascending -> their sums [count], with a graph.

    Added pairwise: one after another, 800 log-probs would lose 1e-3 in float32.
    """
    lengths = torch.bincount(owner, minlength=count)
    place = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
    grid = values.new_zeros(count, int(lengths.max()) if count else 0)
    return grid.index_put((owner, place), values).sum(1)
