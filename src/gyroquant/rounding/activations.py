"""What is rounded while the model runs: the inputs of linear layers, and the keys and values of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator
from torch import Tensor

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Grid, LeadingOrder
from gyroquant.models.execution.exact_tokens import ExactTokens
from gyroquant.models.execution.online import CacheQuantizer, InputQuantizer
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.graph.sites import attention_module, hook_point
from gyroquant.rounding.layers import is_ignored


def _tuple_of_names(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError("ignore must be a list of module names and 're:' patterns")
    return tuple(value)


Ignore = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_names)]

_Clip = Annotated[float, Field(gt=0, le=1)]
_Tokens = Annotated[int, Field(ge=0, strict=True)]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class Activations(BaseModel):
    """Rounds inputs of linear layers dynamically: the scales of a token are fitted when the token is processed.

    - `grid`: the numbers to round to. A group size of -1 means one scale per token.
    - `per_head`: whether the input of o_proj has one scale per head instead, as in SpinQuant's code. Default true.
    - `ignore`: layers whose inputs are not rounded, named as for weights. Default lm_head.
    - `calibrate`: whether solvers see the rounded inputs. Default true.
    """

    model_config = _STRICT
    grid: SerializeAsAny[Grid]
    per_head: bool = True
    ignore: Ignore = ("lm_head",)
    calibrate: bool = True

    @model_validator(mode="after")
    def _grid_codes_single_numbers(self) -> Activations:
        if self.grid.tile_rows > 1:
            raise ValueError(f"the grid {self.grid.grid} codes rows of a weight together: it is not for activations")
        if self.grid.has_codebooks:
            raise ValueError(f"the grid {self.grid.grid} has codebooks of a whole weight: it is not for activations")
        return self

    def quantizers(self, graph: ModelGraph, orders: Mapping[str, LeadingOrder] | None = None) -> list[InputQuantizer]:
        """One quantizer for each layer that is not ignored.

        `orders` says, by the name of a layer's weight, where the method `leading` has put the leading directions of its
        inputs. Raises RecipeError if a group size does not fit or every layer is ignored.
        """
        ops = [op for op in graph.linears if op.entry.quantize and not is_ignored(op.name, self.ignore)]
        if not ops:
            raise RecipeError("activations.ignore leaves no input to round: shorten it, or set activations=null")
        return [InputQuantizer(hook_point(op), self._grid(op, graph, (orders or {}).get(op.weight))) for op in ops]

    def _grid(self, op: LinearOp, graph: ModelGraph, order: LeadingOrder | None) -> Grid:
        grid = self.grid.for_input(order)
        if self.per_head and grid.group_size == -1 and op.entry.reads == "attn_out" and not grid.leads:
            return type(grid)(**grid.model_dump() | {"group_size": graph.head_dim})
        grid.group_of(op.in_features, f"the input of {op.name}")
        return grid


class KvCache(BaseModel):
    """Rounds keys and values per token and head: keys after RoPE and R3, values as v_proj returns them.

    - `grid`: the numbers to round to.
    - `center_keys`: whether the mean of each channel of the keys, over the calibration tokens, is subtracted before
      rounding and added afterwards. Default false. The mean is measured after RoPE, the only place where one offset
      is right for all positions.
    - `key_clip`, `value_clip`: the factor of both ends of the range of a token's keys or values. Default None: that of
      the grid. OSCAR (arXiv 2605.17757) takes 0.96 and 0.92 at 2 bits.
    - `first_tokens`: how many tokens at the start of the text are not rounded. Default 0. Models put much of their
      attention on the first tokens, which OSCAR and KIVI (arXiv 2402.02750) keep in 16 bits. In layers with a sliding
      window it has no effect.
    - `last_tokens`: how many tokens up to and including a query's own are not rounded for this query. Default 0.
    """

    model_config = _STRICT
    grid: SerializeAsAny[Grid]
    center_keys: bool = False
    key_clip: _Clip | None = None
    value_clip: _Clip | None = None
    first_tokens: _Tokens = 0
    last_tokens: _Tokens = 0

    @model_validator(mode="after")
    def _cache_holds_integers(self) -> KvCache:
        if not self.grid.plain_integers and not self.grid.real_zeros:
            raise ValueError(
                f"the KV cache takes integer grids only, not {self.grid.grid}: leave grid out, or set it to real_zero"
            )
        if (self.key_clip or self.value_clip) and getattr(self.grid, "scale", "minmax") != "minmax":
            raise ValueError("scale: mse searches for the clipping itself: key_clip and value_clip need scale: minmax")
        return self

    def _clipped(self, clip: float | None) -> Grid:
        return self.grid if clip is None else type(self.grid)(**self.grid.model_dump() | {"clip": clip})

    def quantizers(self, graph: ModelGraph) -> list[CacheQuantizer]:
        """One quantizer for each attention module.

        Raises RecipeError if the group size does not divide the size of a head.
        """
        modules = {attention_module(group): graph.heads_in(group) for group in graph.blocks}
        modules.pop(None, None)
        if not modules:
            raise RecipeError(f"{graph.config.model_type} has no attention with a KV cache; remove kv_cache")
        for heads in modules.values():
            self.grid.group_of(heads.size, "the heads of the KV cache")
            self.grid.group_of(heads.values, "the heads of the KV cache")
        keys, values = self._clipped(self.key_clip), self._clipped(self.value_clip)
        exact = ExactTokens(self.first_tokens, self.last_tokens)
        return [CacheQuantizer(module, keys, values, exact=exact) for module in modules if module is not None]


class KeyMean:
    """The mean over tokens of keys of shape (batch, kv heads, length, head_dim).

    The result has shape (kv heads, head_dim), fp16.
    """

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
