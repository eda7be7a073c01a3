"""The most bytes that tensors held at once in forward and backward: a device's allocator counts them,
on a CPU we do.

    python tests/support/live_bytes.py train_qwen/train.py [flags]     the run, then PEAK {json}

Storages are counted from the operator that first shows them until they are freed. What operators
hold inside of themselves (scratch memory of a product) is not seen.
"""

import json
import runpy
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on, `peak` is the most bytes seen alive together; `reset()` begins anew."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def reset(self):
        self.peak = self.now

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        # a storage is an object of Python for as long as tensors share it
        place = storage._cdata
        if place in self.sizes:
            return
        self.sizes[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, place)

    def forget(self, place: int):
        self.now -= self.sizes.pop(place, 0)


class OfAllocator:
    """The same of a device, by its own allocator."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.module.reset_peak_memory_stats()

    @property
    def peak(self):
        return self.module.max_memory_allocated()


def main():
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[:0] = [str(Path(script).resolve().parents[1]), str(Path(script).resolve().parent)]
    from common import device
    from common.trainer import RecipeTrainer

    counted = LiveBytes() if device.kind() == "cpu" else OfAllocator(device.module())
    stock = RecipeTrainer.training_step
    peaks = []

    def training_step(self, *args, **kwargs):
        if not peaks:
            counted.__enter__()  # from now on: the optimizer's states are made between these calls
        loss = stock(self, *args, **kwargs)
        peaks.append(counted.peak)
        return loss

    RecipeTrainer.training_step = training_step
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        print(f"PEAK {json.dumps({'bytes': max(peaks, default=0)})}", flush=True)


if __name__ == "__main__":
    main()
