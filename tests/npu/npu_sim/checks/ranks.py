"""Two ranks over hccl. The checks run in the same order on both; the last ones break communicators."""

import os
import time

import torch
import torch.distributed as dist
from support import refused

RANK = int(os.environ["RANK"])
OTHER = 1 - RANK
torch.npu.set_device(RANK)
dist.init_process_group("hccl")


def here(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=f"npu:{RANK}")


def check_the_backend_is_hccl():
    assert dist.get_backend() == "hccl" and dist.get_world_size() == 2
    assert "HCCL" in type(dist.group.WORLD._get_backend(torch.device("npu"))).__name__


def check_all_reduce():
    kinds = {
        dist.ReduceOp.SUM: 4,
        dist.ReduceOp.PRODUCT: 3,
        dist.ReduceOp.MAX: 3,
        dist.ReduceOp.MIN: 1,
    }
    for dtype in (torch.float32, torch.float16, torch.int32, torch.int64, torch.int8):
        for kind, expected in kinds.items():
            x = here([1 + 2 * RANK] * 3, dtype)
            dist.all_reduce(x, kind)
            assert x.tolist() == [expected] * 3, (dtype, kind, x)
    x = here([True, RANK == 0], torch.bool)
    dist.all_reduce(x, dist.ReduceOp.MIN)
    assert x.tolist() == [True, False]
    x = here([1.0 + 2 * RANK], torch.bfloat16)
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert x.tolist() == [2]


def check_all_reduce_in_many_pieces():
    x = torch.arange(700_001, dtype=torch.float32, device=f"npu:{RANK}") * (1 + RANK)
    dist.all_reduce(x)
    assert torch.equal(x.cpu(), torch.arange(700_001, dtype=torch.float32) * 3)


def check_broadcast_and_reduce():
    x = here([5.0, 6.0] if RANK == 1 else [0.0, 0.0])
    dist.broadcast(x, 1)
    assert x.tolist() == [5, 6]
    x = here([1.0 + RANK])
    dist.reduce(x, 0)
    assert RANK == 1 or x.tolist() == [3]
    wide = here([1.5 if RANK == 0 else 0.0], torch.float64)
    dist.broadcast(wide, 0)
    assert wide.tolist() == [1.5], "copies take float64"


def check_all_gather_and_scatter():
    parts = [here([0.0, 0.0]) for _ in range(2)]
    dist.all_gather(parts, here([1.0 + RANK, 7.0]))
    assert [p.tolist() for p in parts] == [[1, 7], [2, 7]]
    out = here([0.0] * 4)
    dist.all_gather_into_tensor(out, here([1.0 + RANK, 7.0]))
    assert out.tolist() == [1, 7, 2, 7]
    x = here([0.0])
    dist.scatter(x, [here([3.0]), here([4.0])] if RANK == 0 else None, src=0)
    assert x.tolist() == [3 + RANK]
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": RANK})
    assert objects == [{"rank": 0}, {"rank": 1}]


def check_reduce_scatter():
    out = here([0.0, 0.0], torch.float16)
    dist.reduce_scatter_tensor(out, here([0, 1, 2, 3], torch.float16) * (1 + RANK))
    assert out.tolist() == [[0, 3], [6, 9]][RANK]


def check_all_to_all():
    out = here([0.0, 0.0])
    dist.all_to_all_single(out, here([10.0 * RANK, 10.0 * RANK + 1]))
    assert out.tolist() == [RANK, 10 + RANK]
    out = here([0.0] * (1 + 2 * RANK))
    sizes = [1, 2] if RANK == 0 else [1, 1]
    received = [1, 1] if RANK == 0 else [2, 1]
    out = here([0.0] * sum(received))
    dist.all_to_all_single(
        out, here([float(10 * RANK + i) for i in range(sum(sizes))]), received, sizes
    )
    assert out.tolist() == [[0, 10], [1, 2, 11]][RANK]


def check_send_and_receive():
    x = here([1.0, 2.0]) if RANK == 0 else here([0.0, 0.0])
    dist.send(x, 1) if RANK == 0 else dist.recv(x, 0)
    assert x.tolist() == [1, 2]
    large = torch.full((600_000,), float(RANK), device=f"npu:{RANK}")
    got = torch.empty_like(large)
    both = [dist.P2POp(dist.isend, large, OTHER), dist.P2POp(dist.irecv, got, OTHER)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    assert (got == OTHER).all()


def check_barrier():
    begin = time.monotonic()
    if RANK == 1:
        time.sleep(0.5)
    dist.barrier()
    assert RANK == 1 or time.monotonic() - begin > 0.4


def check_data_parallel_training():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2).npu()
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[RANK])
    model(here([[1.0 + RANK] * 4])).sum().backward()
    assert torch.equal(model.module.weight.grad.cpu(), torch.full((2, 4), 1.5))


def check_types_that_cannot_be_reduced():
    refused("float64|kDouble|Double", lambda: dist.all_reduce(here([1.0], torch.float64)))
    refused(
        "does not take bfloat16",
        lambda: dist.all_reduce(here([1.0], torch.bfloat16), dist.ReduceOp.PRODUCT),
    )


def check_ranks_that_do_not_do_the_same():
    group = dist.new_group([0, 1])
    refused("EI0005.*inconsistent", lambda: dist.all_reduce(here([1.0] * (3 + RANK)), group=group))
    refused("failed before", lambda: dist.all_reduce(here([1.0]), group=group))


def check_two_ranks_on_one_card():
    group = dist.new_group([0, 1])
    torch.npu.set_device(0)
    try:
        refused(
            "both on device 0", lambda: dist.all_reduce(torch.ones(1, device="npu:0"), group=group)
        )
    finally:
        torch.npu.set_device(RANK)


def check_a_rank_that_is_gone():
    """Comes last: the second rank ends, and the first one's wait must end too."""
    group = dist.new_group([0, 1])
    dist.all_reduce(here([1.0]), group=group)
    if RANK == 1:
        return
    begin = time.monotonic()
    refused("HCCL timeout: rank 0 of 2", lambda: dist.all_reduce(here([1.0]), group=group))
    assert time.monotonic() - begin < 60
