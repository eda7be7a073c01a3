"""Token losses that never build the full [tokens, vocabulary] logits.

`use_chunked_loss(model)` patches one causal language model so that `model(..., labels=...)`
computes its loss inside the output head, only at positions that have a label and a few hundred of
them at a time. The gradient is computed in the same pass (torch's `linear_cross_entropy` does the
same, but runs bf16 on CPUs in fp32 and rounds the loss). Calls without labels (generation, logits)
are untouched.

What surprises: in a call with labels the head returns no logits but a few numbers, the loss among
them, and the output's `logits` are these numbers. `loss_counts` reads them. The stock forward only
hands them on: from the head to its loss function, which takes the loss out again.

B rows, T tokens, N positions with a label, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.data.counts import label_index
from common.data.spelling import IGNORE
from common.fast import softmax
from common.fast.softmax import pieces

CPU_ROWS = 512  # fewer rows make the weight-gradient product slow, more only cost memory
ACCELERATOR_LOGITS = 2**27  # elements of one chunk of logits on an accelerator (256 MiB in bf16)
FEWEST_ROWS = 256  # of a chunk there, whatever the vocabulary ...
MOST_ROWS = 2**14


# ---- chunks of logits ----
def _chunk_rows(device: torch.device, vocab: int) -> int:
    if device.type == "cpu":
        return CPU_ROWS
    return min(MOST_ROWS, max(FEWEST_ROWS, ACCELERATOR_LOGITS // vocab))


def _loss_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_probs: Tensor,
    correct: Tensor | None = None,
    wants_gradient: bool = True,
    cap: float = 0.0,
):
    """Yields (slice, d(sum of losses)/d(logits) [n, V]; the logits themselves where no gradient is
    wanted) and fills log_probs [N] and, if given, correct [N]. The chunks share one buffer."""
    rows = len(hidden)
    vocab = len(weight)
    size = _chunk_rows(hidden.device, vocab)
    same_size = softmax.is_compiled(hidden.device.type, vocab)
    buffer = hidden.new_empty(size if same_size else min(size, rows), vocab)
    for part in pieces(rows, size):
        logits = buffer[: part.stop - part.start]
        torch.mm(hidden[part], weight.t(), out=logits)
        if bias is not None:
            logits += bias
        right = None if correct is None else correct[part]
        softmax.loss_of_chunk_(buffer, targets[part], log_probs[part], right, wants_gradient, cap)
        yield part, logits


def _add_weight_grad_(
    grad: Tensor, grad_logits: Tensor, hidden: Tensor, scale: float, first: bool
) -> None:
    """grad [V, D] += scale * grad_logits [n, V]^T @ hidden [n, D]; `first` overwrites instead.

    An fp32 gradient of half-precision products is summed in fp32, in blocks that stay in the cache.
    """
    if grad.dtype == hidden.dtype:
        torch.addmm(grad, grad_logits.t(), hidden, beta=0 if first else 1, alpha=scale, out=grad)
        return
    for part in pieces(len(grad), 4096 if grad.device.type == "cpu" else len(grad)):
        product = grad_logits[:, part].t() @ hidden
        if first:
            grad[part].copy_(product).mul_(scale)
        else:
            grad[part].add_(product, alpha=scale)


# ---- a head that is a Linear ----
def _cap_of(head: nn.Module) -> float | None:
    """0 of a plain Linear, `logit_cap` of one that caps its logits softly: logit_cap *
    tanh(x / logit_cap). None of any other head."""
    if type(head) is nn.Linear:
        return 0.0
    return vars(head).get("logit_cap") if isinstance(head, nn.Linear) else None


class _HeadLoss(torch.autograd.Function):
    """hidden [N, D], weight [V, D], bias [V] | None, targets [N] -> scaled loss sum, log_probs [N],
    correct [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, scale, count, cap):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = len(hidden)
        h = hidden.to(dtype)
        w = weight.to(dtype)
        log_probs = torch.zeros(rows, dtype=torch.float32, device=h.device)
        correct = torch.zeros(rows, dtype=torch.bool, device=h.device)
        ctx.hidden = torch.empty_like(h) if need_hidden else None
        ctx.weight = torch.empty_like(weight) if need_weight and rows else None
        ctx.bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        counted = correct if count else None
        wanted = any(ctx.needs_input_grad)
        for part, logits in _loss_chunks(h, w, bias, targets, log_probs, counted, wanted, cap):
            if need_hidden:
                torch.mm(logits, w, out=ctx.hidden[part])
            if ctx.weight is not None:
                _add_weight_grad_(ctx.weight, logits, h[part], scale, part.start == 0)
            if need_bias:
                ctx.bias += logits.sum(0, dtype=torch.float32)
        ctx.scale = scale
        ctx.hidden_dtype = hidden.dtype
        ctx.weight_like = weight.shape, weight.dtype
        ctx.mark_non_differentiable(log_probs, correct)
        return log_probs.sum() * -scale, log_probs, correct

    @staticmethod
    def backward(ctx, grad, *_):
        factor = grad * ctx.scale
        hidden = None if ctx.hidden is None else (ctx.hidden * factor).to(ctx.hidden_dtype)
        bias = None if ctx.bias is None else ctx.bias * factor
        weight = ctx.weight
        ctx.hidden = ctx.weight = None
        if weight is None and ctx.needs_input_grad[1]:
            shape, dtype = ctx.weight_like
            weight = torch.zeros(shape, dtype=dtype, device=grad.device)
        elif weight is not None and not (grad.device.type == "cpu" and grad == 1):
            weight.mul_(grad)  # usually 1 on CPU: the scale is already in
        return hidden, weight, bias, None, None, None, None, None


class _HeadLogProbs(torch.autograd.Function):
    """hidden [N, D], weight [V, D], bias [V] | None, targets [N] -> log_probs [N], each with a
    gradient of its own.

    A frozen head needs no second product in backward: d(log_prob)/d(hidden) is kept, [N, D]. For a
    head that trains the logits are computed again, chunk by chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, cap):
        need_hidden, *need_head = ctx.needs_input_grad[:3]
        h = hidden.to(dtype)
        w = weight.to(dtype)
        log_probs = torch.zeros(len(hidden), dtype=torch.float32, device=h.device)
        ctx.slope = torch.empty_like(h) if need_hidden and not any(need_head) else None
        has_slope = ctx.slope is not None
        chunks = _loss_chunks(h, w, bias, targets, log_probs, None, has_slope, cap)
        for part, logits in chunks:
            if has_slope:
                torch.mm(logits, w, out=ctx.slope[part])
        ctx.inputs = (hidden, weight, bias, targets, dtype, cap) if any(need_head) else None
        ctx.hidden_dtype = hidden.dtype
        return log_probs

    @staticmethod
    def backward(ctx, grad):
        if ctx.inputs is None:
            return (ctx.slope * -grad[:, None]).to(ctx.hidden_dtype), None, None, None, None, None
        hidden, weight, bias, targets, dtype, cap = ctx.inputs
        h = hidden.to(dtype)
        w = weight.to(dtype)
        scratch = torch.empty_like(grad)
        d_hidden = torch.empty_like(h)
        d_weight = torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for part, logits in _loss_chunks(h, w, bias, targets, scratch, cap=cap):
            logits *= -grad[part, None]
            torch.mm(logits, w, out=d_hidden[part])
            _add_weight_grad_(d_weight, logits, h[part], 1.0, part.start == 0)
            if bias is not None:
                d_bias += logits.sum(0, dtype=torch.float32)
        if bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


# ---- the patched model ----
class _Call:
    """What the patched model, its head and its loss function share during one call with labels;
    `index` is None outside such a call."""

    def __init__(self):
        self.per_token = False  # answer_logprobs wants a log-prob of each label, not their sum
        self.reset()

    def reset(self):
        self.head: nn.Module | None = None
        self.positions: int | None = None  # B * T
        self.index: Tensor | None = None  # [N] positions with a label
        self.targets: Tensor | None = None  # [N] the labels
        self.num_items: Tensor | int | None = None  # that the loss is divided by
        self.loss: Tensor | None = None
        self.token_loss: Tensor | None = None  # the same as it came out behind the head
        self.said: Tensor | None = None  # what the head returned instead of logits
        self.used = False  # the loss function was reached


def _note_labels(call: _Call, head: nn.Module, kwargs: dict) -> None:
    """Note the positions whose next token has a label (or whose entry in shift_labels is one); a
    batch that brings them as `label_index` need not be searched, which waits for the device."""
    index = kwargs.pop("label_index", None)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(kwargs["labels"][..., 1:], (0, 1), value=IGNORE)
    targets = targets.flatten()
    if index is None or kwargs.get("shift_labels") is not None:
        index = (targets != IGNORE).nonzero().squeeze(1)
    call.head = head
    call.positions = targets.numel()
    call.index = index
    call.targets = targets[index]
    call.num_items = kwargs.get("num_items_in_batch")


def _model_forward(self, *args, **kwargs):
    call = self._chunked
    if kwargs.get("labels") is None:
        kwargs.pop("label_index", None)
        return self._stock_forward(*args, **kwargs)
    head = self.get_output_embeddings()
    if "_chunked" not in head.__dict__:  # replaced since (an adapter on the head)
        _patch(head, _head_forward, call)
    try:
        _note_labels(call, head, kwargs)
        output = self._stock_forward(*args, **kwargs)
        if not call.used:
            _refuse(self, "does not use its loss_function")
        config = self.config.get_text_config()
        if getattr(output, "router_logits", None) and hasattr(config, "router_aux_loss_coef"):
            balance = _weighted_balance(output.router_logits, config, call, kwargs)
            output.loss = call.token_loss + balance.to(call.token_loss.device)
        return output
    except (IndexError, RuntimeError, ValueError) as error:
        if call.said is None or call.used:
            raise
        # behind the head, where it took what the head said for logits
        first_line = str(error).partition("\n")[0]
        _refuse(self, f"computes its loss itself ({first_line})")
    finally:
        call.reset()


def _head_forward(self, hidden, *args, **kwargs):
    call = self._chunked
    if call.head is not self:
        return self._stock_forward(hidden, *args, **kwargs)
    positions = hidden.shape[:-1].numel()
    if positions != call.positions:
        raise ValueError(f"the head got {positions} positions for {call.positions} labels")
    call.targets = call.targets.to(hidden.device)
    rows = hidden.flatten(0, -2).index_select(0, call.index.to(hidden.device))
    log_probs, correct = _head_loss(self, rows, call)
    if call.per_token:
        call.said = log_probs
        return call.said
    # filled on the device: a number that is copied there waits for it
    right = correct.sum() if correct is not None else log_probs.new_full((), float("nan"))
    labels = log_probs.new_full((), len(rows))
    counts = torch.stack([-log_probs.detach().sum(), right, labels])
    # the loss leaves the head as part of its output, where logits are expected: only so do ZeRO-3's
    # hooks on the head see its backward; _loss_function takes it out again
    call.said = torch.cat([counts.float(), call.loss.float()[None]])
    return call.said


def _loss_function(self, logits, labels, *args, **kwargs):
    """What the stock forward calls with the head's output."""
    call = self._chunked
    if call.index is None:
        return self._stock_loss(logits, labels, *args, **kwargs)
    # hooks may have made an alias of what the head returned (the same memory), but anything
    # computed from it would be no loss any more
    if logits.data_ptr() != call.said.data_ptr():
        _refuse(self, "changes its logits after the head")
    call.used = True
    call.token_loss = call.loss if call.per_token else logits[-1]
    return call.token_loss.clone()  # some models add to it in place


def _weighted_balance(router_logits: tuple, config, call: _Call, kwargs: dict) -> Tensor:
    """The auxiliary loss of a mixture of experts in a step: each document's own, weighted by its
    share of the step's label tokens, so that accumulation, ranks and packing do not change it (the
    stock one is that of a micro-batch, and counts once for each of them)."""
    shape = kwargs["labels"].shape
    where = router_logits[0].device
    place = torch.arange(shape.numel(), device=where)
    ends = kwargs.get("cu_seq_lens_q")
    if ends is None:
        ends = torch.arange(0, shape.numel() + 1, shape[-1], device=where)
    documents = len(ends) - 1
    owner = torch.bucketize(place, ends[1:].to(place), right=True)
    mask = kwargs.get("attention_mask")
    mask = torch.ones(shape, device=where) if mask is None else mask
    mask = mask.flatten().to(where, torch.float32)
    labels = count_by_owner(owner[call.index.to(where)], documents)
    picks = config.num_experts_per_tok
    balances = balance_of_documents(router_logits, owner, mask, documents, picks)
    return config.router_aux_loss_coef * (labels / _num_items(call) * balances).sum()


def balance_of_documents(
    router_logits: tuple[Tensor, ...], owner: Tensor, mask: Tensor, documents: int, picks: int
) -> Tensor:
    """E * sum over experts of (share of the document's tokens sent to it) * (its mean probability),
    all layers together (Fedus et al. 2021): [documents], 0 for one without tokens.

    Args:
        router_logits: [tokens, E] of each layer.
        owner, mask: [tokens], the document of each token, and 0 at padding.
        picks: experts a token goes to.
    """
    experts = router_logits[0].shape[-1]
    sent = mask.new_zeros(documents * experts)
    likely = mask.new_zeros(documents, experts)
    for logits in router_logits:
        probs = logits.flatten(0, -2).to(mask.device).float().softmax(-1)
        chosen = probs.detach().topk(picks, dim=-1).indices
        slots = owner[:, None] * experts + chosen
        sent.index_add_(0, slots.flatten(), mask.repeat_interleave(picks))
        likely = likely.index_add(0, owner, probs * mask[:, None])
    tokens = mask.new_zeros(documents).index_add_(0, owner, mask) * len(router_logits)
    tokens = tokens.clamp(min=1)[:, None]
    return experts * (sent.view(documents, experts) / tokens * (likely / tokens)).sum(-1)


def _head_loss(head: nn.Module, rows: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
    """Sets call.loss; returns the targets' log-probabilities and (in eval mode) which were the
    most likely token."""
    cap = _cap_of(head)
    if cap is None:
        return _loss_of_any_head(head, rows, call)
    num_items = _num_items(call)
    if call.per_token:
        log_probs = head_logprobs(head, rows, call.targets)
        call.loss = -log_probs.sum() / num_items
        return log_probs, None
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    weight = head.weight
    bias = head.bias
    if not torch.is_grad_enabled():  # a trained weight asks for its gradient even then
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
    # on CPU reading the count is free, and a gradient that is scaled while computed saves a pass
    # over [V, D]
    scale = 1 / max(1, float(num_items)) if kind == "cpu" else 1.0
    with torch.autocast(kind, enabled=False):
        call.loss, log_probs, correct = _HeadLoss.apply(
            rows, weight, bias, call.targets, dtype, scale, not head.training, cap
        )
    if kind != "cpu":
        call.loss = call.loss / num_items
    return log_probs, None if head.training else correct


def _loss_of_any_head(head: nn.Module, rows: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
    """As _head_loss, for a head that is no Linear (an adapter on it, say)."""
    log_probs, correct = _of_any_head(head, rows, call.targets)
    call.loss = -log_probs.sum() / _num_items(call)
    return log_probs, None if head.training else correct


def _of_any_head(head: nn.Module, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and correctness of all targets, chunk by chunk."""
    parts = [
        _chunk_of_any_head(head, rows[part], targets[part])
        for part in pieces(len(rows), _chunk_rows(rows.device, 2**18))
    ]
    if not parts:  # keeps the graph
        parts = [(rows.sum(-1).float(), targets == IGNORE)]
    log_probs, correct = (torch.cat(list(x)) for x in zip(*parts, strict=True))
    return log_probs, correct


def _chunk_of_any_head(head: nn.Module, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and correctness of one chunk; its logits are computed again in backward."""
    forward = getattr(head, "_stock_forward", head.forward)  # of a head that is not patched

    def run(rows):
        logits = forward(rows)
        log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
        return log_probs, logits.argmax(-1) == targets

    return checkpoint(run, rows, use_reentrant=False)


def _num_items(call: _Call) -> Tensor | float:
    """What the loss is divided by: the labels of this batch unless the caller says otherwise."""
    return (len(call.targets) or 1) if call.num_items is None else call.num_items


def _refuse(model: nn.Module, why: str):
    raise SystemExit(
        f"{type(model).__name__} {why}, so its loss cannot be computed in chunks; train it without "
        "use_chunked_loss"
    )


def _patch(module: nn.Module, forward, call: _Call) -> None:
    # bound methods and attributes, so that copy.deepcopy(model) gives a patched copy that stands
    # alone
    @functools.wraps(type(module).forward)  # keeps the signature, which Trainer and generate read
    def patched(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    module._chunked = call
    module._stock_forward = module.forward
    module.forward = MethodType(patched, module)


# ---- for recipes ----
def use_chunked_loss(model: nn.Module) -> nn.Module:
    """Patch a causal language model (before or after peft wraps it); returns the model it was
    given.

    From then on `model(input_ids, labels=labels, num_items_in_batch=None, label_index=None, ...)`,
    labels [B, T] by keyword and label_index as in counts.Counted, gives
        loss    sum over label tokens / num_items_in_batch (default: the number of label tokens; a
                batch without any label gives 0 with a graph), plus the auxiliary loss of a mixture
                of experts where its config asks for router logits: that of each document, weighted
                by its share of num_items_in_batch
        logits  no logits but fp32 [4]: loss sum, correct argmax tokens (NaN in training mode) and
                label tokens of this batch, and the loss; see loss_counts
    Heads that are no Linear, plain or with a `logit_cap` (logit_cap * tanh(x / logit_cap)), work at
    the price of one more product. Models that change their logits after the head, or that compute
    the loss themselves, end with SystemExit at the first call.
    """
    if is_chunked(model):
        return model
    inner = without_adapter(model)
    head = inner.get_output_embeddings()
    if head is None:
        _refuse(inner, "has no output head (get_output_embeddings() is None)")
    call = _Call()
    _patch(inner, _model_forward, call)
    _patch(head, _head_forward, call)
    inner._stock_loss = inner.loss_function
    inner.loss_function = MethodType(_loss_function, inner)
    return model


def is_chunked(model: nn.Module) -> bool:
    """Whether this model, or the base of its adapter, is under use_chunked_loss."""
    return "_chunked" in without_adapter(model).__dict__


def without_adapter(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def loss_counts(output) -> Tensor:
    """What a model under use_chunked_loss counted over a batch with labels, fp32 [3] without graph:
    loss sum, tokens whose most likely continuation was right (NaN in training mode), label tokens.

    output: what the model returned; its `logits` hold these instead of logits.
    """
    return output.logits[:3].detach()


def head_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target [N] from the hidden states before it [N, D]: fp32 [N], each
    with a gradient, without full logits; for losses that need more of a model than its labels.

    head: the output head of a causal language model; of a Linear (see _cap_of) no logits are kept.
    """
    cap = _cap_of(head)
    if cap is None:
        return _of_any_head(head, hidden, targets)[0]
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    weight = head.weight
    bias = head.bias
    if not torch.is_grad_enabled():  # a trained weight asks for its gradient even then
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
    with torch.autocast(kind, enabled=False):
        return _HeadLogProbs.apply(hidden, weight, bias, targets, dtype, cap)


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
    call = next(module for module in model.modules() if "_stock_loss" in module.__dict__)._chunked
    call.per_token = True
    try:
        log_probs = model(input_ids=input_ids, labels=labels, **inputs).logits
    finally:
        call.per_token = False
    index = inputs.get("label_index")
    index = label_index(labels) if index is None else index
    cu_seqlens = inputs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        batch, length = labels.shape
        cu_seqlens = torch.arange(0, batch * length + 1, length, device=index.device)
    owner = torch.bucketize(index, cu_seqlens.to(index)[1:], right=True)
    return log_probs, owner, len(cu_seqlens) - 1


def sequence_logprobs(model: nn.Module, input_ids: Tensor, labels: Tensor, **inputs) -> Tensor:
    """Sum of the log-probabilities of each sequence's label tokens, as `answer_logprobs` gives
    them: [B], or [n]."""
    return sum_by_owner(*answer_logprobs(model, input_ids, labels, **inputs))


def sum_by_owner(values: Tensor, owner: Tensor, count: int, most: int | None = None) -> Tensor:
    """values [N] of the sequences in `owner` [N], ascending -> their sums [count], with a graph.

    most: values that a sequence may have; unset, the device is asked. Added pairwise: one after
    another, 800 log-probs would lose 1e-3 in float32.
    """
    lengths = count_by_owner(owner, count)
    place = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
    if most is None:
        most = int(lengths.max()) if count else 0
    grid = values.new_zeros(count, most)
    return grid.index_put((owner, place), values).sum(1)


def count_by_owner(owner: Tensor, count: int) -> Tensor:
    """How often each of range(count) stands in `owner`, int64 [count]; bincount would wait for the
    device."""
    return owner.new_zeros(count).index_add_(0, owner, torch.ones_like(owner))
