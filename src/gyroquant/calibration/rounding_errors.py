"""Second moments of what rounding changes in the inputs of layers, for steps that correct that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import input_key, modules_with_own_map
from gyroquant.models.execution.online import InputQuantizer, OnlineOp, observing_rounding
from gyroquant.models.graph.model_graph import Group
from gyroquant.models.graph.sites import hook_point


class RoundingErrors:
    """Sums over tokens for an input u of n numbers that is rounded to x.

    - `cross`: the sum of ``(u - x)^T x``, shape (n, n), fp32. Rows are features of u - x.
    - `second_moments`: the sum of ``(u - x)^T (u - x)``, shape (n, n), fp32.
    """

    def __init__(self, n: int):
        self.cross, self.second_moments = torch.zeros(n, n), torch.zeros(n, n)

    def __call__(self, unrounded: Tensor, rounded: Tensor) -> None:
        """Adds inputs of shape (..., n)."""
        x = rounded.detach().reshape(-1, rounded.shape[-1]).float()
        error = unrounded.detach().reshape(x.shape).float() - x
        self.cross, self.second_moments = self.cross.to(x.device), self.second_moments.to(x.device)
        self.cross.addmm_(error.T, x)
        self.second_moments.addmm_(error.T, error)


@contextmanager
def observing_rounding_errors(
    model: Any, group: Group, online: Sequence[OnlineOp], only: Collection[str]
) -> Iterator[dict[str, RoundingErrors]]:
    """Observes the rounding of a group's inputs for the duration of a with block.

    - online: the online operations. They must be attached, before or within the with block.
    - only: the input keys to observe (`observers.input_key`).

    Yields the sums by key. Inputs that are not rounded have none, and neither do stacked experts.
    """
    own, found = modules_with_own_map(online), dict[str, RoundingErrors]()
    rounded = {quantizer.hook_point for quantizer in online if isinstance(quantizer, InputQuantizer)}
    with ExitStack() as watching:
        for op in group.linears:
            key = input_key(op, own)
            if key in only and key not in found and hook_point(op) in rounded and hook_point(op).point == "input":
                found[key] = RoundingErrors(op.in_features)
                watching.enter_context(observing_rounding(model.get_submodule(op.module), found[key]))
        yield found


__all__ = ["RoundingErrors", "observing_rounding_errors"]
