"""Two ranks on chips of the first generation (Ascend910A)."""

import os

import torch
import torch.distributed as dist
from support import refused

RANK = int(os.environ["RANK"])
torch.npu.set_device(RANK)
dist.init_process_group("hccl")


def here(values, dtype):
    return torch.tensor(values, dtype=dtype).to(f"npu:{RANK}")


def check_types_that_these_chips_do_not_send():
    for call in (dist.all_reduce, lambda x: dist.broadcast(x, 0)):
        refused("bfloat16|kBFloat16", lambda call=call: call(here([1.0], torch.bfloat16)))
    refused("does not take int16", lambda: dist.all_reduce(here([1], torch.int16)))
    x = here([1], torch.int16)
    dist.broadcast(x, 0)
    assert x.tolist() == [1], "a copy is no reduction"


def check_a_sum_that_overflows_is_the_largest_number():
    x = here([60000.0, -60000.0, float("inf"), 1.0], torch.float16)
    dist.all_reduce(x)
    assert x.tolist() == [65504, -65504, float("inf"), 2]
    x = here([3e38], torch.float32)
    dist.all_reduce(x)
    assert x.isfinite().all()
