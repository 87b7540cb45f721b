"""RoPE as data: which coordinates of a head it turns together, and which maps commute with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Map, PairRotation
from gyroquant.models.graph import ModelGraph

COMMUTES = 1e-9


@dataclass(frozen=True)
class Rope:
    """Rotary positions turn `pairs` pairs of a head, each by an angle of its own that grows with the position.

    Pairs are those of `maps.PairRotation`; coordinates behind them are left alone.
    """

    pairs: int
    interleaved: bool = False

    def commutes(self, m: Map) -> bool:
        """Whether a map of a head commutes with RoPE at every position: checked in fp64 at one random position."""
        angles = torch.rand(self.pairs, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 0.05
        turn, dense = PairRotation(m.n, angles, self.interleaved), m.dense()
        difference = turn.apply(dense) - turn.transpose().apply(dense, 0)
        return bool(difference.abs().max() <= COMMUTES * dense.abs().max().clamp_min(1))


def rope_of(graph: ModelGraph) -> Rope | None:
    """The RoPE of a model, or None when it has none. Raises UnsupportedModelError when its layers differ in it.

    Layers of a model that leave RoPE out (Cohere-2, SmolLM3) are treated like the others: a map that commutes with it
    is right there too.
    """
    layout = graph.architecture.rope
    if layout == "none":
        return None
    settings = getattr(graph.config, "rope_parameters", None) or {}
    per_layer = [value for value in settings.values() if isinstance(value, Mapping)] or [settings]
    factors = {one.get("partial_rotary_factor") or 1.0 for one in per_layer}
    if len(factors) > 1:
        raise UnsupportedModelError(
            f"{graph.config.model_type}: its layers rotate different shares of a head ({sorted(factors)}), which is "
            "not described; leave qk out"
        )
    return Rope(int(graph.head_dim * factors.pop()) // 2, layout == "interleaved")
