"""Sites: the places of a model whose basis may change, and the maps that they accept.

The numbers of R1 to R4 are those of SpinQuant (arXiv 2405.16406) and QuaRot.

- R1: the residual stream.
- R2: the value heads.
- R3: queries and keys after RoPE.
- R4: the input of down_proj.
- attn_out: the input of o_proj, all heads together.
- qk: queries and keys before RoPE, as their projections write them.
- attn_in, mlp_in: the outputs of the norms.
- latent: what one linear layer writes and another reads, with nothing or only a norm between them.
- embeddings: the rows of a table of embeddings, and of a head that shares them. Maps run after the lookup and before
  the head.
- linear: the input of one linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.models.graph.model_graph import Group, LinearOp, ModelGraph, NormOp, Port
from gyroquant.models.graph.rope import Rope, rope_of
from gyroquant.models.graph.site import SITES, HookPoint, Point, Site, SiteKind, Span, Structure

__all__ = [
    "SITES",
    "SITE_NAMES",
    "SITE_OF_BASIS",
    "HookPoint",
    "Point",
    "Site",
    "SiteKind",
    "Span",
    "Structure",
    "attention_module",
    "find_sites",
    "hook_point",
    "site_key",
]


def _r1(graph: ModelGraph) -> Iterator[Site]:
    writers: list[Port] = []
    readers: list[Port] = []
    absorbs: list[tuple[NormOp, tuple[Port, ...]]] = []
    blocked, layer_norm = "", graph.architecture.keeps_mean
    for group in graph.groups:
        writers += group.writers("residual")
        readers += [op.read_port() for op in group.readers("residual")]
        for norm in group.norms:
            if norm.entry.writes == "residual":
                blocked = blocked or (
                    f"{norm.module} has a gain and writes to the residual stream, and a rotation of the stream cannot "
                    "pass it"
                )
            elif norm.entry.reads == "residual":
                norm_readers = tuple(op.read_port() for op in group.readers(norm.entry.writes))
                absorbs.append((norm, norm_readers))
                readers += norm_readers
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
        writers, attention = group.writers("v"), group.attention
        if not writers and graph.architecture.derived:
            continue
        sharing = [graph.blocks[other] for other in _sharing_values(graph, i)]
        normed = attention is not None and attention.entry.normed_values
        yield Site(
            name="R2",
            block=i,
            label=f"R2 of {group.label}" + (f" and {len(sharing)} more that take its values" if sharing else ""),
            n=graph.heads_in(group).values,
            writers=writers,
            readers=tuple(op.read_port() for one in (group, *sharing) for op in one.readers("attn_out")),
            admits="orthogonal" if normed else "any",
        )


def _sharing_values(graph: ModelGraph, block: int) -> Iterator[int]:
    """The blocks that take the values of a block."""
    kinds = getattr(graph.config, graph.architecture.shares_values or "_", None)
    if kinds is None:
        return
    for other in range(block + 1, len(graph.blocks)):
        if kinds[other] == kinds[block]:
            if graph.blocks[other].writers("v"):
                return
            yield other


def _attn_out(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        for op in group.readers("attn_out"):
            reason = "attention lies between the value projection and o_proj, so a map across heads must run online"
            label = f"the heads' values in {group.label}"
            yield replace(_layer_input("attn_out", i, op, label, reason), heads=graph.heads_in(group).queries)


def _qk(graph: ModelGraph) -> Iterator[Site]:
    """One site for each kv head: its queries and keys before RoPE. Its query heads are writers, its key head a reader.

    A score is the product of a query and a key. If queries are multiplied by a map, keys are multiplied by its
    contragredient. Maps must commute with RoPE, and there must be no norm between the projections and RoPE.
    """
    for i, group in enumerate(graph.blocks):
        heads = graph.heads_in(group)
        if graph.architecture.derived and not (group.writers("q") and group.writers("k")):
            continue
        rope = rope_of(graph, heads.size)
        norms = [norm.module for norm in group.norms if norm.entry.writes in ("q", "k")]
        reason = f"{' and '.join(norms)} stand between the projections and RoPE, and a map cannot pass their gains"
        if graph.architecture.rope == "unknown":
            norms, reason = norms or [group.label], "it is not known which coordinates of a head RoPE turns as a pair"
        for head in range(heads.shared):
            yield _qk_site(graph, i, head, rope, reason if norms else "")


def _qk_online(graph: ModelGraph) -> Iterator[Site]:
    """The same sites, with the inverse of the map directly after the projections. They accept any map."""
    for site in _qk(graph):
        inverse_at = []
        for port in (*site.writers, *site.readers):
            op, rows = graph.find_op(port.param), port.rows
            if op is not None and rows is not None:
                span = Span(int(rows[0]), int(rows[-1]) + 1, op.out_features)
                inverse_at.append((HookPoint("output", op.module), span))
        yield replace(site, inverse_at=tuple(inverse_at), admits="any", blocked="")


def _qk_site(graph: ModelGraph, block: int, head: int, rope: Rope | None, blocked: str) -> Site:
    group = graph.blocks[block]
    heads = graph.heads_in(group)
    shared = heads.queries // heads.shared
    return Site(
        name="qk",
        block=block,
        label=f"qk of {group.label}, kv head {head}",
        n=heads.size,
        writers=_heads(group.writers("q"), range(head * shared, (head + 1) * shared), heads.size),
        readers=_heads(group.writers("k"), range(head, head + 1), heads.size),
        admits="rope",
        blocked=blocked,
        rope=rope,
    )


def _heads(ports: tuple[Port, ...], heads: range, size: int) -> tuple[Port, ...]:
    """The ports, restricted to the rows of the given heads."""
    chosen = torch.arange(heads.start * size, heads.stop * size)
    return tuple(replace(port, rows=chosen if port.rows is None else port.rows[chosen]) for port in ports)


def attention_module(group: Group) -> str | None:
    """The name of the attention module of a block. None if the block has no attention, or none that is described."""
    if group.attention is not None:
        return group.attention.module if group.attention.entry.hooked else None
    return next((op.module.rpartition(".")[0] for op in group.linears if "q" in op.rows), None)


def _r3(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        module = attention_module(group)
        if module is None:
            continue
        yield Site(
            name="R3",
            block=i,
            label=f"R3 of {group.label}",
            n=graph.heads_in(group).size,
            copies=graph.heads_in(group).shared,
            hook_points=(HookPoint("qk", module),),
            admits="nothing",
            admits_online="orthogonal",
            blocked="no parameter writes queries and keys after RoPE, so R3 must run online",
        )


def hook_point(op: LinearOp) -> HookPoint:
    """The hook point at the input of a linear layer, or of a projection of stacked experts."""
    if op.entry.intercepted:
        return HookPoint("parameter", op.weight)
    if not op.entry.stacked:
        return HookPoint("input", op.module)
    return HookPoint("experts_act" if op.weight.endswith(".down_proj") else "experts_in", op.module)


def _layer_input(name: str, block: int | None, op: LinearOp, label: str, reason: str) -> Site:
    """The input of one layer, where a map must run online. `reason` states why."""
    return Site(
        name=name,
        block=block,
        label=label,
        n=op.in_features,
        readers=(op.read_port(),),
        hook_points=(hook_point(op),),
        admits="nothing",
        blocked=reason,
    )


def _down_projections(graph: ModelGraph) -> Iterator[tuple[int, Group, LinearOp, str]]:
    """Every layer that reads the output of a nonlinearity: block, group, layer and the prefix of its bases."""
    for i, group in enumerate(graph.blocks):
        for op in group.linears:
            if op.entry.reads.rpartition(".")[2] == "act" and op.entry.quantize:
                yield i, group, op, op.entry.reads.removesuffix("act")


def _r4_label(group: Group, prefix: str) -> str:
    return f"R4 of {group.label}" + (f" ({prefix.rstrip('.')})" if prefix else "")


_NO_WRITERS = "it is not known which layers write the input of this one, so its map must run online"


def _r4(graph: ModelGraph) -> Iterator[Site]:
    for i, group, op, prefix in _down_projections(graph):
        writers = group.writers(prefix + "gate") + group.writers(prefix + "up")
        yield Site(
            name="R4",
            block=i,
            label=_r4_label(group, prefix),
            n=op.in_features,
            writers=writers,
            readers=(op.read_port(),),
            hook_points=(hook_point(op),),
            admits="permutation",
            blocked="" if writers else _NO_WRITERS,
        )


def _r4_fused(graph: ModelGraph, structure: Structure) -> Iterator[Site]:
    """R4 for maps that pass the nonlinearity: permutations of gate and up, and scales of up alone.

    Every stacked expert has its own site.
    """
    for i, group, op, prefix in _down_projections(graph):
        gate, up = group.writers(prefix + "gate"), group.writers(prefix + "up")
        reason = "there is no gate, so scales of the input of down_proj cannot pass the nonlinearity"
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
                blocked=(reason if structure == "diagonal" and not gate else "") if gate or up else _NO_WRITERS,
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
        hook_points=(HookPoint("output", norm.module),),
        admits="diagonal",
    )


def _norm_output(basis: str) -> Callable[[ModelGraph], Iterator[Site]]:
    def build(graph: ModelGraph) -> Iterator[Site]:
        for i, group in enumerate(graph.blocks):
            for norm in group.norms:
                if norm.entry.writes == basis:
                    yield _norm_site(basis, i, group, norm, graph.hidden)

    return build


def _latent(graph: ModelGraph) -> Iterator[Site]:
    """Latents: any rotation is exact, and any map at all if there is no norm."""
    for i, group in enumerate(graph.blocks):
        norms = {norm.entry.reads: norm for norm in group.norms}
        for basis in sorted(basis for basis in group.bases() if basis.startswith("latent.")):
            norm, writers = norms.get(basis), group.writers(basis)
            ops = group.readers(basis if norm is None else norm.entry.writes)
            if not writers or not ops:
                continue
            readers = tuple(op.read_port() for op in ops)
            bias = () if norm is None else group.writers(norm.entry.writes)
            yield Site(
                name="latent",
                block=i,
                label=f"the latent that {ops[0].module} reads",
                n=ops[0].in_features,
                writers=(*writers, *bias),
                readers=readers,
                absorbs=() if norm is None else ((norm, readers),),
                admits="any" if norm is None else "orthogonal",
                keeps_mean=norm is not None and norm.entry.kind == "layer",
            )


def _embeddings(graph: ModelGraph) -> Iterator[Site]:
    """The rows of each table, together with the heads that are tied to it, and those of each head of its own."""
    for table in graph.tables:
        heads = [op for op in graph.outer.linears if graph.tied.get(op.weight) == table.weight]
        yield Site(
            name="embeddings",
            block=None,
            label=f"the rows of {table.module}",
            n=table.in_features,
            writers=tuple(Port(op.weight, op.in_axis) for op in (table, *heads)),
            hook_points=tuple(hook_point(op) for op in heads),
            inverse_at=((HookPoint("output", table.module), Span(0, table.in_features, table.in_features)),),
            admits="nothing",
            admits_online="orthogonal",
            blocked="the residual stream keeps its basis, so a map of the table's rows must run online",
        )
    for op in graph.outer.linears:
        if op.entry.writes == "logits" and op.weight not in graph.tied:
            yield _layer_input("embeddings", None, op, f"the rows of {op.module}", "the head's map must run online")


def _linear(graph: ModelGraph) -> Iterator[Site]:
    for i, group in enumerate(graph.blocks):
        for op in group.linears:
            if op.entry.quantize:
                reason = "other layers read the same input, so a map for a single layer must run online"
                yield _layer_input("linear", i, op, f"the input of {op.module}", reason)


def _r1_online(graph: ModelGraph) -> Iterator[Site]:
    """R1 online: the map runs at the input of every reader of the residual stream. The stream does not change."""
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
                hook_points=tuple(hook_point(op) for op in direct),
                admits="nothing",
            )


_KINDS = (
    SiteKind("R1", _r1, build_online=_r1_online, basis="residual", learnable=True, stored_rotation=True),
    SiteKind("R2", _r2, basis="attn_out", learnable=True, stored_rotation=True),
    SiteKind("attn_out", _attn_out, inside=("R2",), online_unasked=True),
    SiteKind("qk", _qk, build_online=_qk_online),
    SiteKind("R3", _r3, online_unasked=True),
    SiteKind("attn_in", _norm_output("attn_in"), inside=("R1",), basis="attn_in", learnable=True),
    SiteKind("mlp_in", _norm_output("mlp_in"), inside=("R1",), basis="mlp_in", learnable=True),
    SiteKind("R4", _r4, build_fused=_r4_fused, online_unasked=True, basis="act", learnable=True),
    SiteKind("latent", _latent),
    SiteKind("embeddings", _embeddings, inside=("R1",), online_unasked=True, turned_by="R1"),
    SiteKind(
        "linear",
        _linear,
        inside=("R1", "R2", "attn_out", "qk", "R3", "attn_in", "mlp_in", "R4", "latent"),
        online_unasked=True,
    ),
)

SITES.update({kind.name: kind for kind in _KINDS})

SITE_NAMES = tuple(SITES)

SITE_OF_BASIS = {kind.basis: kind.name for kind in _KINDS if kind.basis is not None}
"""The site at which a layer's input is observed, by the basis that the layer reads."""


def site_key(site: Site) -> str:
    """The key of a site, the same for every recipe: `R1`, `lm_head.embeddings`, `model.layers.0.self_attn.R2`."""
    if site.block is None and site.name == "R1":
        return site.name
    if site.block is None:
        return f"{(*site.readers, *site.writers)[0].param.rpartition('.')[0]}.{site.name}"
    module = site.readers[0].param.rpartition(".")[0] if site.readers else site.hook_points[0].module
    if site.readers and site.name != "latent":  # a module may read several latents
        module = module.rpartition(".")[0]
    return f"{module}.{site.name}"


def find_sites(graph: ModelGraph, name: str, online: bool = False, structure: Structure = "orthogonal") -> list[Site]:
    """The sites of one name in a model, for maps of a structure.

    Raises RecipeError for an unknown name, UnsupportedModelError if the model does not have such a site.
    """
    if name not in SITES:
        raise RecipeError(f"unknown site {name!r}; use {', '.join(SITE_NAMES)}")
    sites = SITES[name].find(graph, online, structure)
    if not sites:
        raise UnsupportedModelError(
            f"{graph.config.model_type} has no site {name}: nothing in its description matches it; leave {name} out"
        )
    return sites
