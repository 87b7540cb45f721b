"""The low-rank branch of a rounded layer, which runs with the model: the layer's output becomes ``Q x + L (R x)``.

The branch reads the input of the layer after its online maps and before its rounding, as in SVDQuant (arXiv 2411.05007)
and ARHQ (arXiv 2605.00140).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gyroquant.grids import LowRankFactors
from gyroquant.models.execution.switches import Switch
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.models.graph.sites import HookPoint


@dataclass(frozen=True)
class LowRankBranch:
    """The low-rank branch of a linear layer that is a module of its own."""

    hook_point: HookPoint
    factors: LowRankFactors

    @property
    def module(self) -> str:
        return self.hook_point.module

    def __call__(self, x: Tensor) -> Tensor:
        """What the branch adds to the output, for inputs of shape (..., in). 16-bit inputs are multiplied in fp32."""
        left, right = self.factors.left.to(x.device), self.factors.right.to(x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            return ((x.float() @ right.T) @ left.T).to(x.dtype)
        return (x @ right.T.to(x.dtype)) @ left.T.to(x.dtype)


class _Branch:
    """Two hooks of a module: one keeps the input, one adds the product to the output."""

    def __init__(self, branch: LowRankBranch):
        self.branch = branch
        self.input: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.input = args[0] if Switch.rounding else None

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, self.input = self.input, None
        return output if x is None else output + self.branch(x)


def attach_branch(module: nn.Module, branch: LowRankBranch) -> list[Callable[[], None]]:
    """Attaches a branch to its module. Returns functions that detach it.

    Hooks of maps at the input must be attached before, those that round the input afterwards. A map at the output runs
    after the branch in any case.
    """
    hooks = _Branch(branch)
    before, after = module.register_forward_pre_hook(hooks.keep), module.register_forward_hook(hooks.add, prepend=True)
    return [before.remove, after.remove]


def branches(layers: Iterable[RoundedLayer]) -> list[LowRankBranch]:
    """The low-rank branches of rounded layers; none for layers without factors."""
    return [
        LowRankBranch(HookPoint("input", layer.op.module), layer.weight.low_rank)
        for layer in layers
        if layer.weight.low_rank is not None
    ]


__all__ = ["LowRankBranch", "attach_branch", "branches"]
