"""Linear layers for the few rows of a step of generation, on a CPU.

oneDNN and MKL copy the second factor of a product into blocks before they multiply. Where that is
the weight, as torch.nn.Linear has it, the copy takes about as long as the product with some dozen
rows. Here the weight is the first factor and the rows are the second.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F

MOST = 160  # rows; with more of them the copy does not count
STEP = 16  # rows are a multiple: oneDNN compiles a kernel for every new shape in half precision


class WeightFirst(nn.Module):
    """What a Linear computes, with the same parameters."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inner] -> [..., outer]."""
        rows = x.flatten(0, -2)
        count = len(rows)
        if not 1 < count <= MOST:
            return F.linear(x, self.weight, self.bias)
        rows = F.pad(rows, (0, 0, 0, -count % STEP))
        out = (self.weight @ rows.t()).t()[:count]
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1])


def weight_first(model: nn.Module) -> nn.Module:
    """A copy of the model with such layers and with the parameters of the model itself, so that it
    computes with them as they are at any time."""
    parameters = {id(p): p for p in model.parameters()}
    made = copy.deepcopy(model, parameters)
    for module in [*made.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) is nn.Linear:
                setattr(module, name, WeightFirst(child))
    return made
