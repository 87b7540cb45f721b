"""RoPE: the pairs of coordinates of a head that it turns, and the maps that commute with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Map, PairRotation
from gyroquant.models.graph.model_graph import ModelGraph

COMMUTES = 1e-9


@dataclass(frozen=True)
class Rope:
    """RoPE turns `pairs` pairs of coordinates of a head. Each pair has its own angle, which grows with the position.

    The pairs are those of `maps.PairRotation`. RoPE does not change the coordinates after them.
    """

    pairs: int
    interleaved: bool = False

    def commutes(self, m: Map) -> bool:
        """Whether a map of a head commutes with RoPE at every position; checked in fp64 at one random position."""
        angles = torch.rand(self.pairs, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 0.05
        turn, dense = PairRotation(m.n, angles, self.interleaved), m.dense()
        difference = turn.apply(dense) - turn.transpose().apply(dense, 0)
        return bool(difference.abs().max() <= COMMUTES * dense.abs().max().clamp_min(1))


def rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """The RoPE settings of a configuration, one entry for each kind of layer. One empty entry if there are none."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [value for value in settings.values() if isinstance(value, Mapping)] or [settings]


def rope_of(graph: ModelGraph, size: int | None = None) -> Rope | None:
    """The RoPE of a model, for heads of `size` coordinates (default: the model's). None if it does not use RoPE.

    Some layers of Cohere-2 and SmolLM3 do not use RoPE. They are treated like the others, because a map that commutes
    with RoPE is exact there too. Raises UnsupportedModelError if layers rotate different shares of a head.
    """
    layout = graph.architecture.rope
    if layout in ("none", "unknown"):
        return None
    factors = {settings.get("partial_rotary_factor") or 1.0 for settings in rope_settings(graph.config)}
    if len(factors) > 1:
        raise UnsupportedModelError(
            f"{graph.config.model_type}: its layers rotate different shares of a head ({sorted(factors)}), which is "
            "not supported; leave the site qk out"
        )
    return Rope(int((size or graph.head_dim) * factors.pop()) // 2, layout == "interleaved")
