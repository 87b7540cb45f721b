"""The places of a model whose basis may change, and what may be folded there.

R1 to R4 are numbered as SpinQuant (arXiv 2405.16406) and QuaRot number them: R1 the residual stream, R2 the value
heads, R3 queries and keys after RoPE, R4 the input of down_proj. `attn_out` is the input of o_proj with all its heads,
`qk` are queries and keys as their projections write them, `attn_in` and `mlp_in` the outputs of the norms, `linear` the
input of every single linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.maps import Map
from gyroquant.models.graph import Group, LinearOp, ModelGraph, NormOp, Port
from gyroquant.models.rope import Rope, rope_of

Point = Literal["input", "output", "qk", "experts_in", "experts_act"]
Structure = Literal["any", "orthogonal", "diagonal", "permutation", "pairs"]
"""What is known of a map before it is chosen; `pairs`: a rotation of each pair that RoPE turns."""


@dataclass(frozen=True)
class Insertion:
    """Where an online map is applied while the model runs.

    `input` and `output` of a module; `qk`: queries and keys of an attention module, after RoPE; `experts_in` and
    `experts_act`: the input of stacked experts and the input of their down projection.
    """

    point: Point
    module: str


@dataclass(frozen=True)
class Span:
    """The coordinates from `start` up to `stop` of a vector of `size`."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Site:
    """One place of one model: the ports that write and read its basis, and what a map there must satisfy.

    A port longer than `n` takes the map block by block, as heads do. `heads` is how many of them make a vector of
    the site. `rope` is what queries and keys pass behind the site. `behind` are the places, and the coordinates there,
    where the inverse of an online map runs when it is the output of layers that is changed: readers are then multiplied
    with the map itself.
    """

    name: str
    block: int | None
    label: str
    n: int
    writers: tuple[Port, ...] = ()
    readers: tuple[Port, ...] = ()
    absorbs: tuple[tuple[NormOp, tuple[Port, ...]], ...] = ()
    insertions: tuple[Insertion, ...] = ()
    behind: tuple[tuple[Insertion, Span], ...] = ()
    admits: Literal["any", "orthogonal", "diagonal", "permutation", "rope", "nothing"] = "any"
    admits_online: Literal["any", "orthogonal"] = "any"
    keeps_mean: bool = False
    heads: int = 1
    blocked: str = ""
    rope: Rope | None = None

    def fused_problem(self, m: Map) -> str:
        """Why this map cannot be fused here; empty when it can."""
        if self.blocked:
            return self.blocked
        if self.admits == "rope" and self.rope is not None and not self.rope.commutes(m):
            return (
                f"{self.label} lies in front of RoPE, which this map does not commute with: it may only turn each pair "
                "that RoPE turns (reflections and mixings of pairs do not commute with RoPE)"
            )
        fits = {
            "any": True,
            "rope": True,
            "orthogonal": m.orthogonal,
            "diagonal": m.diagonal,
            "permutation": m.permuting,
            "nothing": False,
        }
        return (
            ""
            if fits[self.admits]
            else f"{self.label} can only take a map that is {self.admits} without running it online"
        )


def _r1(graph: ModelGraph) -> Iterator[Site]:
    groups = (*graph.blocks, graph.outer)
    writers: list[Port] = []
    readers: list[Port] = []
    absorbs: list[tuple[NormOp, tuple[Port, ...]]] = []
    blocked, layer_norm = "", False
    for group in groups:
        writers += group.writers("residual")
        readers += [op.read_port() for op in group.readers("residual")]
        for norm in group.norms:
            if norm.entry.writes == "residual":
                blocked = blocked or (
                    f"{norm.module} multiplies what is added to the residual stream by a gain, and a rotation of the "
                    "stream cannot pass it"
                )
            elif norm.entry.reads == "residual":
                behind = tuple(op.read_port() for op in group.readers(norm.entry.writes))
                absorbs.append((norm, behind))
                readers += behind
                writers += group.writers(norm.entry.writes)  # a norm's bias
                layer_norm |= norm.entry.kind == "layer"
    yield Site(
        name="R1",
        block=None,
        label="R1",
        n=graph.hidden,
        writers=tuple(writers),
        readers=tuple(readers),
        absorbs=tuple(absorbs),
        admits="orthogonal",
        keeps_mean=layer_norm,
        blocked=blocked or graph.r1_blocked,
    )


def _r2(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        yield Site(
            name="R2",
            block=i,
            label=f"R2 of {group.label}",
            n=graph.head_dim,
            writers=group.writers("v"),
            readers=tuple(op.read_port() for op in group.readers("attn_out")),
        )


def _attn_out(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        for op in group.readers("attn_out"):
            why = "attention stands between the heads and what writes them, so a map across heads only exists online"
            yield replace(_in_front("attn_out", i, op, f"the heads' values in {group.label}", why), heads=graph.heads)


def _qk(graph: ModelGraph) -> Iterator[Site]:
    """The queries and keys of every kv head as they enter RoPE: the query heads of its group write, the key head reads.

    A score is the product of a query and a key, so what one takes the other takes contragrediently. Maps must commute
    with RoPE, and no norm may stand in between.
    """
    rope = rope_of(graph)
    for i, group in enumerate(graph.blocks):
        norms = [norm.module for norm in group.norms if norm.entry.writes in ("q", "k")]
        why = f"{' and '.join(norms)} stand between the projections and RoPE, and a map cannot pass their gains"
        for head in range(graph.kv_heads):
            yield _qk_site(graph, i, head, rope, why if norms else "")


def _qk_online(graph: ModelGraph) -> Iterator[Site]:
    """The same, with the inverse of the map right behind the projections: any map, whatever stands in between."""
    for site in _qk(graph):
        assert site.block is not None
        group = graph.blocks[site.block]
        behind = []
        for port in (*site.writers, *site.readers):
            op = next((op for op in group.linears if op.weight == port.param), None)
            if op is not None and port.rows is not None:
                rows = port.rows
                behind.append((Insertion("output", op.module), Span(int(rows[0]), int(rows[-1]) + 1, op.out_features)))
        yield replace(site, behind=tuple(behind), admits="any", blocked="")


def _qk_site(graph: ModelGraph, block: int, head: int, rope: Rope | None, blocked: str) -> Site:
    group, shared = graph.blocks[block], graph.heads // graph.kv_heads
    return Site(
        name="qk",
        block=block,
        label=f"qk of {group.label}, kv head {head}",
        n=graph.head_dim,
        writers=_heads(group.writers("q"), range(head * shared, (head + 1) * shared), graph.head_dim),
        readers=_heads(group.writers("k"), range(head, head + 1), graph.head_dim),
        admits="rope",
        blocked=blocked,
        rope=rope,
    )


def _heads(ports: tuple[Port, ...], heads: range, size: int) -> tuple[Port, ...]:
    """The ports, restricted to the rows of some heads."""
    chosen = torch.arange(heads.start * size, heads.stop * size)
    return tuple(replace(port, rows=chosen if port.rows is None else port.rows[chosen]) for port in ports)


def attention_module(group: Group) -> str:
    """The name of the attention module of a block."""
    return next(op for op in group.linears if "q" in op.rows).module.rpartition(".")[0]


def _r3(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        yield Site(
            name="R3",
            block=i,
            label=f"R3 of {group.label}",
            n=graph.head_dim,
            insertions=(Insertion("qk", attention_module(group)),),
            admits="nothing",
            admits_online="orthogonal",
            blocked="queries and keys after RoPE are written by no parameter, R3 only exists online",
        )


def insertion(op: LinearOp) -> Insertion:
    """The place in front of a linear layer, or of one of the projections of stacked experts."""
    if not op.entry.stacked:
        return Insertion("input", op.module)
    return Insertion("experts_act" if op.entry.reads.endswith("act") else "experts_in", op.module)


def _in_front(name: str, block: int, op: LinearOp, label: str, why: str) -> Site:
    """The input of one layer, where a map can only run online, for the reason given."""
    return Site(
        name=name,
        block=block,
        label=label,
        n=op.in_features,
        readers=(op.read_port(),),
        insertions=(insertion(op),),
        admits="nothing",
        blocked=why,
    )


def _down_projections(graph: ModelGraph) -> Iterator[tuple[int, Group, LinearOp, str]]:
    """Every layer that reads what leaves a nonlinearity: block, group, layer and the prefix of its bases."""
    for i, group in enumerate(graph.blocks):
        for op in group.linears:
            if op.entry.reads.rpartition(".")[2] == "act":
                yield i, group, op, op.entry.reads.removesuffix("act")


def _r4_label(group: Group, prefix: str) -> str:
    return f"R4 of {group.label}" + (f" ({prefix.rstrip('.')})" if prefix else "")


def _r4(graph: ModelGraph) -> Iterator[Site]:
    for i, group, op, prefix in _down_projections(graph):
        yield Site(
            name="R4",
            block=i,
            label=_r4_label(group, prefix),
            n=op.in_features,
            writers=group.writers(prefix + "gate") + group.writers(prefix + "up"),
            readers=(op.read_port(),),
            insertions=(insertion(op),),
            admits="permutation",
        )


def _r4_fused(graph: ModelGraph, structure: Structure) -> Iterator[Site]:
    """R4 for what passes the nonlinearity: permutations of all that enters it, scales of what it is multiplied with.

    Stacked experts have a site each.
    """
    for i, group, op, prefix in _down_projections(graph):
        gate, up = group.writers(prefix + "gate"), group.writers(prefix + "up")
        stuck = "there is no gate: scales of the input of down_proj cannot pass the nonlinearity"
        for expert in range(op.shape[0]) if op.entry.stacked else (None,):
            suffix = "" if expert is None else f", expert {expert}"
            yield Site(
                name="R4",
                block=i,
                label=_r4_label(group, prefix) + suffix,
                n=op.in_features,
                writers=tuple(replace(port, expert=expert) for port in (up if structure == "diagonal" else gate + up)),
                readers=(replace(op.read_port(), expert=expert),),
                admits="diagonal" if structure == "diagonal" else "permutation",
                blocked=stuck if structure == "diagonal" and not gate else "",
            )


def _norm_site(name: str, i: int | None, group: Group, norm: NormOp, n: int) -> Site:
    gain = Port(norm.gain, 0, offset=norm.entry.offset)
    return Site(
        name=name,
        block=i,
        label=f"{norm.entry.writes} of {group.label}",
        n=n,
        writers=(gain, *group.writers(norm.entry.writes)),
        readers=tuple(op.read_port() for op in group.readers(norm.entry.writes)),
        insertions=(Insertion("output", norm.module),),
        admits="diagonal",
    )


def _behind_norm(basis: str) -> Callable[[ModelGraph], Iterator[Site]]:
    def build(graph: ModelGraph) -> Iterator[Site]:
        for i, group in enumerate(graph.blocks):
            for norm in group.norms:
                if norm.entry.writes == basis:
                    yield _norm_site(basis, i, group, norm, graph.hidden)

    return build


def _linear(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        for op in group.linears:
            if op.entry.quantize:
                why = "the input of a single layer is also read by others, so a map there only exists online"
                yield _in_front("linear", i, op, f"the input of {op.module}", why)


def _r1_online(graph: ModelGraph) -> Iterator[Site]:
    """Every reader of the residual stream gets the map in front of it; the stream itself is left alone."""
    for i, group in enumerate(graph.blocks):
        for norm in group.norms:
            if norm.entry.reads == "residual":
                yield _norm_site("R1", i, group, norm, graph.hidden)
        direct = group.readers("residual")
        if direct:
            yield Site(
                name="R1",
                block=i,
                label=f"the residual stream read by {group.label}",
                n=graph.hidden,
                readers=tuple(op.read_port() for op in direct),
                insertions=tuple(insertion(op) for op in direct),
                admits="nothing",
            )


_BUILDERS: dict[str, Callable[[ModelGraph], Iterator[Site]]] = {
    "R1": _r1,
    "R2": _r2,
    "attn_out": _attn_out,
    "qk": _qk,
    "R3": _r3,
    "attn_in": _behind_norm("attn_in"),
    "mlp_in": _behind_norm("mlp_in"),
    "R4": _r4,
    "linear": _linear,
}

SITE_NAMES = tuple(_BUILDERS)
"""Every site name, in the order in which maps are folded."""


def site_key(site: Site) -> str:
    """A name for what is put at a site, the same for every recipe: `R1`, `model.layers.0.self_attn.R2`."""
    if site.block is None:
        return site.name
    module = site.readers[0].param.rpartition(".")[0].rpartition(".")[0] if site.readers else site.insertions[0].module
    return f"{module}.{site.name}"


def find_sites(graph: ModelGraph, name: str, online: bool = False, structure: Structure = "orthogonal") -> list[Site]:
    """The sites of that name in a model, for maps of a structure. Raises UnsupportedModelError when there are none."""
    if name not in _BUILDERS:
        raise RecipeError(f"unknown site {name!r}; sites are {', '.join(SITE_NAMES)}")
    if name == "R1" and online:
        found = list(_r1_online(graph))
    elif name == "qk" and online:
        found = list(_qk_online(graph))
    elif name == "R4" and not online and structure in ("permutation", "diagonal"):
        found = list(_r4_fused(graph, structure))
    else:
        found = list(_BUILDERS[name](graph))
    if not found:
        raise UnsupportedModelError(
            f"{graph.config.model_type} has no site {name}: nothing in its description matches it"
        )
    return found
