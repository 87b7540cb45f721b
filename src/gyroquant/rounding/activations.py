"""What is rounded while the model runs: the inputs of linear layers, and the keys and values of the KV cache."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny
from torch import Tensor

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Grid, IntegerGrid
from gyroquant.models.graph import LinearOp, ModelGraph
from gyroquant.models.online import CacheQuantizer, InputQuantizer
from gyroquant.models.sites import attention_module, insertion
from gyroquant.rounding.stage import is_ignored


def _names(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError("ignore is a list of names and 're:' patterns")
    return tuple(value)


Ignore = Annotated[tuple[str, ...], BeforeValidator(_names)]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class Activations(BaseModel):
    """Inputs of linear layers, rounded dynamically: the scales of a token are found when it arrives.

    A group size of -1 is one scale a token. `per_head` gives the input of o_proj one scale a head instead, as
    SpinQuant's code does. `ignore` is as for weights. With `calibrate`, solvers see the rounded inputs.
    """

    model_config = _STRICT
    grid: SerializeAsAny[Grid]
    per_head: bool = True
    ignore: Ignore = ("lm_head",)
    calibrate: bool = True

    def quantizers(self, graph: ModelGraph) -> list[InputQuantizer]:
        """One for every layer that is not ignored. Raises RecipeError when a group size does not fit."""
        found = []
        for group in (*graph.blocks, graph.outer):
            for op in group.linears:
                name = op.weight if op.entry.stacked else op.module
                if op.entry.quantize and not is_ignored(name, self.ignore):
                    found.append(InputQuantizer(insertion(op), self._grid(op, name, graph)))
        if not found:
            raise RecipeError("activations.ignore leaves no input to round")
        return found

    def _grid(self, op: LinearOp, name: str, graph: ModelGraph) -> Grid:
        if self.per_head and self.grid.group_size == -1 and op.entry.reads == "attn_out":
            return type(self.grid)(**self.grid.model_dump() | {"group_size": graph.head_dim})
        self.grid.group_of(op.in_features, f"the input of {name}")
        return self.grid


class KvCache(BaseModel):
    """Keys and values, rounded per token and head: keys after RoPE and R3, values as v_proj gives them.

    `center_keys` takes the mean of every channel of the keys over the calibration tokens away before rounding and adds
    it afterwards. It is taken after RoPE, the only place where one offset serves all positions.
    """

    model_config = _STRICT
    grid: IntegerGrid
    center_keys: bool = False

    def quantizers(self, graph: ModelGraph) -> list[CacheQuantizer]:
        """One for every attention module. Raises RecipeError when the group size does not divide the heads."""
        self.grid.group_of(graph.head_dim, "the heads of the KV cache")
        return [CacheQuantizer(attention_module(group), self.grid, self.grid) for group in graph.blocks]


class KeyMean:
    """Mean over tokens of keys of shape (batch, kv heads, length, head_dim); shape (kv heads, head_dim), fp16."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def __call__(self, keys: Tensor) -> None:
        self._sum = self._sum + keys.double().sum((0, 2)).cpu()
        self._count += keys.shape[0] * keys.shape[2]

    def result(self) -> Tensor:
        mean = (torch.as_tensor(self._sum) / max(1, self._count)).half()
        if not bool(mean.isfinite().all()):
            raise InputError("keys are too large for their mean to be stored as fp16: set kv_cache.center_keys=false")
        return mean
