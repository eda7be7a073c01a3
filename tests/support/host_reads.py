"""Counts where the host waits for a device: what reads a tensor of it, and copies that are not from
pinned memory."""

import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# their results have as many elements as the values of the inputs say
SIZED_BY_VALUES = {
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
COPIES = {aten._to_copy, aten.copy_}
ROOT = Path(__file__).resolve().parents[2]
BESIDE_THE_POINT = ("/torch/", "/tests/support/", "/accelerate/utils/operations.py")


def is_there(value) -> bool:
    """Whether it is a tensor of a device."""
    return torch.is_tensor(value) and value.device.type not in ("cpu", "meta")


# make a tensor of numbers of the host, out of sight of a TorchDispatchMode
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}


class HostReads(TorchDispatchMode):
    """Inside, `found` counts "what in where" for the phase that `phase` names; None: uncounted."""

    def __init__(self):
        super().__init__()
        self.phase = None
        self.found: dict[str, Counter] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if self.waits(op, args, kwargs, out):
            self.count(op.overloadpacket.__name__)
        return out

    def count(self, what: str) -> None:
        if self.phase is not None:
            self.found.setdefault(self.phase, Counter())[f"{what} in {where()}"] += 1

    @staticmethod
    def waits(op, args, kwargs, out) -> bool:
        packet = op.overloadpacket
        if packet is aten._local_scalar_dense or packet in SIZED_BY_VALUES:
            return is_there(args[0])
        if packet is aten.repeat_interleave and op._overloadname == "Tensor":
            return is_there(args[0]) and kwargs.get("output_size") is None
        if packet is aten.index:
            masks = [i for i in args[1] if torch.is_tensor(i) and i.dtype is torch.bool]
            return is_there(args[0]) and bool(masks)
        if packet not in COPIES:
            return False
        source = args[1] if packet is aten.copy_ else args[0]
        if is_there(source) == is_there(out):
            return False
        free = kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:] == (True,))
        return not free or (is_there(out) and not source.is_pinned())

    def total(self, phase: str) -> int:
        return sum(self.found.get(phase, {}).values())


class NumbersSent(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in FROM_NUMBERS and is_there(out) and not is_there(args[0]):
            self.reads.count(function.__name__)
        elif function is torch.Tensor.new_tensor and is_there(out):
            self.reads.count("new_tensor")
        return out


def where() -> str:
    """The innermost line that is no torch's: file.py:function."""
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in BESIDE_THE_POINT):
            return f"{Path(frame.filename).name}:{frame.name}"
    return "torch"


@contextmanager
def watch(trainer, steps: range):
    """Count in these optimizer steps of a trainer that has not begun: phase "micro" inside
    training_step, "step" outside."""
    from transformers import TrainerCallback

    reads = HostReads()
    stock = trainer.training_step

    def training_step(*args, **kwargs):
        phase = reads.phase
        reads.phase = phase and "micro"
        loss = stock(*args, **kwargs)
        reads.phase = phase
        return loss

    class Phases(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            reads.phase = "step" if state.global_step + 1 in steps else None

        def on_save(self, args, state, control, **kwargs):
            reads.phase = None

    trainer.training_step = training_step
    trainer.add_callback(Phases())
    with reads, NumbersSent(reads):
        yield reads
