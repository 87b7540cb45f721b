"""Intel's auto-round package as a solver: it gets the transformed model and returns codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.rounding.base import ExternalSolver


class AutoRound(ExternalSolver):
    """auto-round (arXiv 2309.05516, https://github.com/intel/auto-round), extra ``gyroquant[auto-round]``.

    - `iters`, `batch_size`, `lr`, `minmax_lr`: auto-round's options of the same names.
    - `options`: further options of auto-round.

    The recipe's `calibration` sets the number and length of samples. Memory holds the whole model. `SignRound` is the
    same algorithm, block by block.
    """

    name: Literal["auto_round"] = "auto_round"
    iters: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0)] | None = None
    minmax_lr: Annotated[float, Field(gt=0)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(iters=0)]

    def check(self) -> None:
        if find_spec("auto_round") is None:
            raise InputError("the solver auto_round needs auto-round: pip install 'gyroquant[auto-round]'")

    def quantize_model(
        self, model: Any, layers: Mapping[str, Grid], tokens: Tensor, tokenizer: Any, seed: int
    ) -> dict[str, QuantizedWeight]:
        import auto_round

        schemes = {name: _scheme(grid) for name, grid in layers.items()}
        schemes |= {name: {"bits": 16} for name, m in model.named_modules() if _is_linear(m) and name not in layers}
        first = next(iter(layers.values()))
        settings = {
            "scheme": f"W{first.bits}A16",
            **_scheme(first),
            "layer_config": schemes,
            "iters": self.iters,
            "batch_size": min(self.batch_size, len(tokens)),
            "lr": self.lr,
            "minmax_lr": self.minmax_lr,
            "nsamples": len(tokens),
            "seqlen": tokens.shape[1],
            "dataset": [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
            "seed": seed,
            "device_map": str(tokens.device),
            "enable_torch_compile": False,
        }
        auto_round.AutoRound(model, tokenizer=tokenizer, **(settings | self.options)).quantize()
        return {name: _read_layer(name, model.get_submodule(name), grid) for name, grid in layers.items()}


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def _scheme(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group_size, "sym": bool(getattr(grid, "symmetric", False))}


@torch.no_grad()
def _read_layer(name: str, layer: Any, grid: Grid) -> QuantizedWeight:
    """Codes and scales of a layer that auto-round has rounded. Raises InputError if they do not match its weight."""
    weight = layer.weight.float()
    groups = weight.view(len(weight), -1, grid.group_of(weight.shape[1], name))
    scale = torch.as_tensor(layer.scale).float().reshape(*groups.shape[:2], 1)
    zero = torch.as_tensor(layer.zp).float()
    params = grid.round_params(scale, zero.reshape(scale.shape) if zero.numel() > 1 else zero.expand(scale.shape))
    codes = grid.encode(groups, params)
    off = (grid.decode(codes, params) - groups).abs() / params.scale.abs()
    if float(off.max()) > 0.25:
        raise InputError(
            f"auto-round's weights of {name} are {float(off.max()):.2f} steps away from the codes that it reports: "
            "use weights.tune instead, the same algorithm"
        )
    return QuantizedWeight(grid, codes.view(weight.shape), params)
