"""What the checks share."""

import re

import torch


def refused(words, call, error=RuntimeError):
    """Assert that `call` raises `error` with `words` (a regular expression) in its text; give back the text."""
    try:
        got = call()
    except error as raised:
        assert re.search(words, str(raised)), f"{words!r} is not in: {raised}"
        return str(raised)
    raise AssertionError(f"not refused, gave {got}")


def ones(*shape, dtype=torch.float32, device="npu"):
    return torch.ones(*shape, dtype=dtype, device=device)


def values(*shape, seed=0, low=-1.0, high=1.0):
    """The same numbers on every device, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * (high - low) + low


def same(name, function, *inputs, rtol=1e-5, atol=1e-6):
    """Assert that `function` gives the same on CPU and NPU: outputs, and gradients of all floating inputs."""
    sides = []
    for device in ("cpu", "npu"):
        moved = [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in inputs]
        out = function(*moved)
        outs = list(out) if isinstance(out, tuple | list) else [out]
        assert all(o.device.type == device for o in outs), (
            f"{name}: an output is on {[o.device for o in outs]}"
        )
        smooth = [o for o in outs if o.requires_grad]
        if smooth:
            sum((o.float() * values(*o.shape, seed=9).to(device)).sum() for o in smooth).backward()
        grads = [x.grad for x in moved if x.grad is not None]
        sides.append([t.detach().cpu() for t in outs + grads])
    assert len(sides[0]) == len(sides[1]), name
    for here, there in zip(*sides, strict=True):
        torch.testing.assert_close(
            there, here, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
        )
