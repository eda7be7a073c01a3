"""The figures of torch_npu's allocator and the end of memory (NPU_SIM_MEM_GB=0.5)."""

import gc

import torch
from support import ones, refused

MIB = 2**20
torch.npu.set_device(
    0
)  # without it, or another call that starts torch.npu, empty_cache() of torch_npu 2.13 does nothing


def check_memory_figures():
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before, (free, total) = torch.npu.memory_allocated(), torch.npu.mem_get_info()
    assert total == 512 * MIB and free <= total
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="npu")
    assert 64 * MIB <= torch.npu.memory_allocated() - before < 65 * MIB
    assert 64 * MIB <= free - torch.npu.mem_get_info()[0] < 90 * MIB
    assert torch.accelerator.memory_allocated() == torch.npu.memory_allocated()
    del x
    assert (
        torch.npu.memory_allocated() == before
        and torch.npu.max_memory_allocated() >= before + 64 * MIB
    )
    torch.npu.empty_cache()
    assert free - torch.npu.mem_get_info()[0] < 3 * MIB, "empty_cache gives it back"


def check_the_other_card_has_memory_of_its_own():
    free = torch.npu.mem_get_info(0)[0]
    x = torch.empty(32 * MIB, dtype=torch.uint8, device="npu:1")
    assert torch.npu.memory_allocated(1) >= 32 * MIB and torch.npu.mem_get_info(0)[0] == free
    del x


def check_the_end_of_memory():
    refused(
        r"NPU out of memory. Tried to allocate 60\d.00 MiB .NPU 0; 512.00 MiB total capacity",
        lambda: torch.empty(600 * MIB, dtype=torch.uint8, device="npu"),
        torch.OutOfMemoryError,
    )
    held = []

    def fill():
        while True:
            held.append(ones(25 * MIB))  # 100 MiB of float32

    refused("out of memory", fill, torch.OutOfMemoryError)
    assert len(held) in (4, 5) and ones(4).sum().item() == 4, "small tensors still fit"
    held.clear()
    gc.collect()
    assert ones(100 * MIB // 4).sum().item() == 100 * MIB // 4, (
        "and so do large ones when memory is free again"
    )
