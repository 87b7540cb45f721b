"""A site: a place of a model whose basis may change, with its ports and the maps that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from gyroquant.maps import Map
from gyroquant.models.graph.model_graph import ModelGraph, NormOp, Port
from gyroquant.models.graph.rope import Rope

Point = Literal["input", "output", "qk", "experts_in", "experts_act", "parameter"]
Structure = Literal["any", "orthogonal", "diagonal", "permutation", "pairs"]
"""The structure of a map before the map is chosen. `pairs`: a rotation of each pair that RoPE turns."""


@dataclass(frozen=True)
class HookPoint:
    """The module, and the place in it, where an online map runs.

    - input, output: of the module.
    - qk: queries and keys of an attention module, after RoPE.
    - experts_in: the input of stacked experts.
    - experts_act: the input of the down projection of stacked experts.
    - parameter: the input of a parameter; `module` is then the parameter's name.
    """

    point: Point
    module: str


@dataclass(frozen=True)
class Span:
    """The coordinates `start` to `stop` - 1 of a vector of `size` coordinates."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Site:
    """One site of one model: the ports that write and read its basis, and the condition that a map must meet.

    - n: the size of the map. A longer port takes the map block by block, as the heads do.
    - absorbs: norms whose gain goes into their readers before the map is folded, and these readers.
    - hook_points: where an online map runs.
    - inverse_at: where the inverse of an online map runs, and on which coordinates, for maps that change the outputs
      of layers. Readers are then multiplied by the map itself, and its contragredient runs at the hook points.
    - admits, admits_online: the maps that can be fused, and those that can run online.
    - keeps_mean: the map must preserve the mean, because the site has LayerNorms.
    - heads: the number of heads in one vector of the site.
    - copies: how many heads may each have their own map of order n, which are then one map of all their coordinates.
    - blocked: the reason why no map can be fused here. Empty if maps can be fused.
    - rope: the RoPE that queries and keys pass after the site.
    """

    name: str
    block: int | None
    label: str
    n: int
    writers: tuple[Port, ...] = ()
    readers: tuple[Port, ...] = ()
    absorbs: tuple[tuple[NormOp, tuple[Port, ...]], ...] = ()
    hook_points: tuple[HookPoint, ...] = ()
    inverse_at: tuple[tuple[HookPoint, Span], ...] = ()
    admits: Literal["any", "orthogonal", "diagonal", "permutation", "rope", "nothing"] = "any"
    admits_online: Literal["any", "orthogonal"] = "any"
    keeps_mean: bool = False
    heads: int = 1
    copies: int = 1
    blocked: str = ""
    rope: Rope | None = None

    @property
    def kind(self) -> SiteKind:
        """The properties that all sites of this name share."""
        return SITES[self.name]

    @property
    def online_unasked(self) -> bool:
        """Whether a map that cannot be fused here runs online without an explicit `online`."""
        return self.kind.online_unasked and bool(self.hook_points or self.inverse_at)

    def fused_problem(self, m: Map) -> str:
        """The reason why this map cannot be fused here. Empty if it can."""
        if self.blocked:
            return self.blocked
        if self.admits == "rope" and self.rope is not None and not self.rope.commutes(m):
            return (
                f"{self.label} comes before RoPE, and this map does not commute with RoPE: it may only rotate each "
                "pair that RoPE turns (reflections and mixtures of pairs do not commute with RoPE)"
            )
        fits = {
            "any": True,
            "rope": True,
            "orthogonal": m.orthogonal,
            "diagonal": m.diagonal,
            "permutation": m.is_permutation,
            "nothing": False,
        }
        return (
            ""
            if fits[self.admits]
            else f"{self.label} can only fuse {self.admits} maps, and this map is not one of them"
        )


Builder = Callable[[ModelGraph], Iterator[Site]]


@dataclass(frozen=True)
class SiteKind:
    """The properties that all sites of one name share.

    - build: finds the sites in a model.
    - build_online: finds them for online maps, if these need other ports.
    - build_fused: finds them for fused permutations and diagonal maps, if these can pass operations that others cannot.
    - inside: the sites whose maps change the basis in which this site is measured and folded.
    - online_unasked: a map that cannot be fused runs online without an explicit `online`, because no parameter writes
      the basis linearly.
    - basis: the basis, as layers read it, in which the site's vectors are observed. None if no layer reads one.
    - learnable: maps at this site can be learned.
    - stored_rotation: a file of rotations holds the rotation of this site.
    - turned_by: the site whose fused maps change these ports already, so that another map here is one too many.
    """

    name: str
    build: Builder
    build_online: Builder | None = None
    build_fused: Callable[[ModelGraph, Structure], Iterator[Site]] | None = None
    inside: tuple[str, ...] = ()
    online_unasked: bool = False
    basis: str | None = None
    learnable: bool = False
    stored_rotation: bool = False
    turned_by: str = ""

    def find(self, graph: ModelGraph, online: bool, structure: Structure) -> list[Site]:
        """The sites of a model for maps of a structure, online or fused."""
        if online:
            return list((self.build_online or self.build)(graph))
        if self.build_fused is not None and structure in ("permutation", "diagonal"):
            return list(self.build_fused(graph, structure))
        return list(self.build(graph))

    def lies_in(self, other: str) -> bool:
        """Whether a map at the site `other` changes what is measured and folded here."""
        return other == self.name or other in self.inside


SITES: dict[str, SiteKind] = {}
"""Every kind of site by name, in the order in which maps are folded. `gyroquant.models.graph.sites` fills it."""
