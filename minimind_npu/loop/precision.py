"""float32 on a CPU, as fast as it goes without rounding."""

import torch

from common import device


def fast_float32() -> bool:
    """On a CPU, let oneDNN compute float32 products where it is exact; returns whether it does.

    On AMD's CPUs MKL leaves AVX-512 unused and oneDNN is twice as fast, but torch wants permission
    to round to bf16 before it hands products over. That permission is kept only where a product
    shows that nothing is rounded.
    """
    if device.kind() != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    sample = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = sample.double() @ sample.double()
    settings.fp32_precision = "bf16"
    error = ((sample @ sample).double() - exact).abs().max()
    if error > 1e-5 * exact.abs().max():
        settings.fp32_precision = before
    return settings.fp32_precision == "bf16"
