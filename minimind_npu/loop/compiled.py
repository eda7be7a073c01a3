"""torch.compile for the steps of training alone, so that a step's kernels follow from its data and
not from what the process has done before.

torch compiles a function for the shapes and numbers that it meets first, then anew for others, and
leaves it uncompiled after the eighth time. A run that goes on from a checkpoint has met less than
one that was never interrupted (it answers no questions before its first step), and would compute
the same step by other kernels, with other last digits. So only functions with one shape in all
steps are compiled, for this shape, and called in training only; evaluation and generation run
without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from common import cli

# deterministic: no kernel is chosen by a stopwatch; the other one: rounding does not depend on what
# is fused
OPTIONS = {"deterministic": True, "emulate_precision_casts": True}


class Compiled:
    """A method of a module: compiled where it trains, as it is elsewhere, and where the compiler
    fails."""

    has_failed = False  # of all: a compiler that is missing is so for every function

    def __init__(self, module: nn.Module, plain: Callable, compiled: Callable):
        self.module = module
        self.plain = plain
        self.compiled = compiled

    def __call__(self, *args):
        trains = self.module.training and torch.is_grad_enabled()
        if not trains or Compiled.has_failed:
            return self.plain(self.module, *args)
        try:
            return self.compiled(self.module, *args)
        except TorchDynamoException as error:
            Compiled.has_failed = True
            reason = str(error).strip().partition("\n")[0]
            cli.say(f"warning: --torch_compile: the layers run uncompiled, since {reason}")
            return self.plain(self.module, *args)


def compile_methods(modules: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Compile these methods of modules of one class: each once, for all of them."""
    torch._dynamo.config.optimize_ddp = False  # it cuts what is larger than a bucket of gradients
    # a compiler that fails does so in the forward pass
    torch._functorch.config.force_non_lazy_backward_lowering = True
    for name in names:
        plain = getattr(type(modules[0]), name)
        compiled = torch.compile(plain, dynamic=False, options=OPTIONS)
        for module in modules:
            setattr(module, name, Compiled(module, plain, compiled))
