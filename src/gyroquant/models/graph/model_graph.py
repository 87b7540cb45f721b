"""A description matched with one model.

Every stored parameter belongs to one entry of the description. Every basis has the parameters that write and read it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.graph.heads import Heads, heads_of, setting
from gyroquant.models.graph.operations import (
    AttentionOp,
    BiasOp,
    EmbeddingOp,
    Group,
    InModule,
    KeptOp,
    LinearOp,
    NormOp,
    Op,
    Port,
    Shape,
)
from gyroquant.models.graph.spec import (
    Architecture,
    Attention,
    Bias,
    Embedding,
    Entry,
    Kept,
    Linear,
    Norm,
    Part,
    architecture_of,
    wrapper_writers,
)

__all__ = [
    "AttentionOp",
    "BiasOp",
    "EmbeddingOp",
    "Group",
    "KeptOp",
    "LinearOp",
    "ModelGraph",
    "NormOp",
    "Op",
    "Port",
    "Shape",
    "build_graph",
]

Item = TypeVar("Item", bound=InModule)
TOKENS = "tokens"
"""The basis that a table of embeddings reads: one coordinate for each token."""


@dataclass(frozen=True)
class ModelGraph:
    """A whole model: its blocks in order, the operations around them, its heads and its tied parameters.

    - config: the configuration of the decoder, even if the decoder is part of a larger model. Such a model is called a
      *wrapper*: it also takes images or sound.
    - hidden: the width of the residual stream.
    - tied: the stored name of every tied parameter.
    - carried: the wrapper's other parameters. The decoder runs without them.
    - r1_blocked: the reason why the residual stream must not be changed. Empty if it may be changed.
    """

    config: Any
    architecture: Architecture
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    blocks: tuple[Group, ...]
    outer: Group
    carried: tuple[str, ...] = ()
    r1_blocked: str = ""

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups: the blocks in order, then the operations around them."""
        return (*self.blocks, self.outer)

    def block_params(self, index: int) -> tuple[str, ...]:
        """The parameters of one block."""
        return tuple(self.blocks[index].params())

    @property
    def params(self) -> tuple[tuple[str, ...], ...]:
        """The stored parameters, group by group: those of each block in order, then those around the blocks."""
        return (*(self.block_params(index) for index in range(len(self.blocks))), self.outer_params())

    @property
    def block_linears(self) -> tuple[LinearOp, ...]:
        """The linear layers of all blocks, in order."""
        return tuple(op for group in self.blocks for op in group.linears)

    @property
    def linears(self) -> tuple[LinearOp, ...]:
        """Every linear layer: those of the blocks, then those around the blocks."""
        return (*self.block_linears, *self.outer.linears)

    @cached_property
    def tables(self) -> tuple[LinearOp, ...]:
        """The tables of embeddings that write to the residual stream, as layers of shape (tokens, hidden)."""
        return tuple(
            LinearOp(
                entry=Linear(op.weight.removesuffix(".weight"), TOKENS, op.entry.writes),
                module=op.weight.removesuffix(".weight"),
                weight=op.weight,
                bias=None,
                shape=self.shapes[op.weight],
                in_axis=1,
                out_axis=0,
                rows={op.entry.writes: None},
            )
            for op in self.outer.ops
            if isinstance(op, EmbeddingOp) and op.weight in self.shapes
        )

    @cached_property
    def _ops(self) -> dict[str, LinearOp]:
        return {op.weight: op for op in (*self.linears, *self.tables)}

    def op(self, weight: str) -> LinearOp:
        """The linear layer with this weight. Raises KeyError if no linear layer has it."""
        return self._ops[weight]

    def find_op(self, param: str) -> LinearOp | None:
        """The linear layer with this weight. None for other parameters, such as a bias."""
        return self._ops.get(param)

    @property
    def max_positions(self) -> int | None:
        """The number of positions that the model supports. None: no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def residual_multiplier(self) -> float:
        """The factor of the outputs of attention and feed-forward network before they are added to the residual stream.

        It is 1 unless the configuration has another one (Granite).
        """
        return float(getattr(self.config, "residual_multiplier", 1.0))

    def heads_in(self, group: Group) -> Heads:
        """The heads of attention in one block."""
        attention = group.attention
        return Heads(self.heads, self.kv_heads, self.head_dim) if attention is None else attention.heads

    def block_of(self, name: str) -> int | None:
        """The number of the block that has a module or parameter. None if it is outside the blocks."""
        if not self.architecture.in_blocks(name):
            return None
        return int(name.removeprefix(f"{self.architecture.blocks}.").partition(".")[0])

    def in_block(self, index: int, items: Iterable[Item]) -> list[Item]:
        """The items that belong to a module of one block."""
        prefix = self.architecture.block_prefix(index)
        return [item for item in items if item.module.startswith(prefix)]

    def around_blocks(self, items: Iterable[Item]) -> list[Item]:
        """The items that do not belong to a block."""
        return [item for item in items if not self.architecture.in_blocks(item.module)]

    def outer_params(self) -> tuple[str, ...]:
        """Every parameter outside the blocks. Tied ones have their stored name."""
        return tuple(dict.fromkeys(self.tied.get(name, name) for name in self.outer.params()))


class _Resolver:
    """Matches the entries of a description with the parameters of a model."""

    def __init__(self, architecture: Architecture, config: Any, shapes: Mapping[str, Shape], tied: Mapping[str, str]):
        self.architecture, self.config, self.shapes, self.tied = architecture, config, shapes, tied
        self.heads = heads_of(config)
        self.block: int | None = None

    def shape(self, name: str) -> Shape | None:
        return self.shapes.get(self.tied.get(name, name))

    def _rows(self, entry: Linear, out_features: int) -> dict[str, torch.Tensor | None]:
        if isinstance(entry.writes, str):
            return {entry.writes: None}
        heads = self.heads
        if entry.sizes:
            sizes = [setting(self.config, formula, self.block or 0) for formula in entry.sizes]
            parts = torch.arange(out_features).split([*sizes, out_features - sum(sizes)])
            return dict(zip(entry.writes, parts, strict=True))
        if entry.alternating:
            return {basis: torch.arange(out_features)[i :: len(entry.writes)] for i, basis in enumerate(entry.writes)}
        if entry.per_head:
            index = torch.arange(out_features).view(heads.shared if self.architecture.derived else heads.queries, -1)
            last = index.shape[1] - heads.values  # the first basis has what the others leave of a head
            sizes = [last - (len(entry.writes) - 2) * heads.size, *[heads.size] * (len(entry.writes) - 2), heads.values]
            parts = index.split(sizes, 1)
            return {basis: part.reshape(-1) for basis, part in zip(entry.writes, parts, strict=True)}
        widths = {"q": heads.queries * heads.size, "k": heads.shared * heads.size, "v": heads.shared * heads.values}
        sizes = [widths.get(basis, out_features // len(entry.writes)) for basis in entry.writes]
        if sum(sizes) != out_features:
            raise UnsupportedModelError(
                f"{self.config.model_type}: {entry.name} has {out_features} rows, but config.json gives "
                f"{' + '.join(map(str, sizes))}; correct the numbers of heads and head_dim there"
            )
        return dict(zip(entry.writes, torch.arange(out_features).split(sizes), strict=True))

    def _linear(self, entry: Linear, prefix: str) -> LinearOp | None:
        module = prefix + entry.name
        weight = module if entry.stacked else f"{module}.weight"
        shape = self.shape(weight)
        if shape is None:
            return None
        if len(shape) < 2:
            raise UnsupportedModelError(f"{self.config.model_type}: {weight} has shape {shape}, which is not a matrix")
        axes = (len(shape) - 1, len(shape) - 2)
        in_axis, out_axis = axes[::-1] if entry.transposed else axes
        bias = f"{module}_bias" if entry.stacked else f"{module}.bias"
        return LinearOp(
            entry=entry,
            module=module.rpartition(".")[0] if entry.stacked else module,
            weight=weight,
            bias=bias if self.shape(bias) is not None else None,
            shape=shape,
            in_axis=in_axis,
            out_axis=out_axis,
            rows=self._rows(entry, shape[out_axis]),
        )

    def _applies(self, entry: Entry, prefix: str) -> bool:
        """Whether an entry describes this block."""
        when = getattr(entry, "when", "")
        return not when or self.shape(prefix + when) is not None

    def _resolve(self, entry: Entry, prefix: str) -> list[Op] | None:
        """The operations of an entry. None if its parameter is missing."""
        if not self._applies(entry, prefix):
            return None
        if isinstance(entry, Linear):
            if "{e}" in entry.name:
                return self._listed(entry, prefix)
            linear = self._linear(entry, prefix)
            return None if linear is None else [linear]
        if isinstance(entry, Kept):
            return list(self._kept(entry, prefix))
        module = prefix + entry.name
        if isinstance(entry, Bias):
            return None if self.shape(module) is None else [BiasOp(entry, module)]
        if isinstance(entry, Attention):
            return [AttentionOp(entry, module, self.heads)] if self._is_attention(entry, prefix) else []
        if self.shape(f"{module}.weight") is None:
            return [] if isinstance(entry, Norm) and entry.optional else None
        if isinstance(entry, Embedding):
            return [EmbeddingOp(entry, f"{module}.weight")]
        bias = f"{module}.bias"
        return [NormOp(entry, module, f"{module}.weight", bias if self.shape(bias) is not None else None)]

    def _listed(self, entry: Linear, prefix: str) -> list[Op] | None:
        """One operation for each expert of the model, numbered from 0. None if there are no experts."""
        experts: list[Op] = []
        while True:
            number = str(len(experts))
            name, reads, writes = (str(text).replace("{e}", number) for text in (entry.name, entry.reads, entry.writes))
            op = self._linear(replace(entry, name=name, reads=reads, writes=writes), prefix)
            if op is None:
                return experts or None
            experts.append(op)

    def _is_attention(self, entry: Attention, prefix: str) -> bool:
        module = f"{prefix}{entry.name}."
        return self._applies(entry, prefix) and any(name.startswith(module) for name in self.shapes)

    def _kept(self, entry: Kept, prefix: str) -> Iterable[KeptOp]:
        """The parameters of an entry; '{e}' counts up to the first number that is missing."""
        if "{e}" not in entry.name:
            if prefix + entry.name in self.shapes:
                yield KeptOp(prefix + entry.name)
            return
        number = 0
        while prefix + entry.name.replace("{e}", str(number)) in self.shapes:
            yield KeptOp(prefix + entry.name.replace("{e}", str(number)))
            number += 1

    def _alternative(self, groups: tuple[tuple[Entry, ...], ...], prefix: str) -> list[Op] | None:
        """The operations of the first group of entries of which no parameter is missing. None if there is none."""
        for entries in groups:
            resolved = [self._resolve(entry, prefix) for entry in entries]
            if all(ops is not None for ops in resolved):
                return [op for ops in resolved for op in ops or ()]
        return None

    def group(self, label: str, parts: tuple[Part, ...], prefix: str, block: int | None = None) -> Group:
        ops: list[Op] = []
        self.block, self.heads = block, self._heads(parts, prefix, block)
        for part in parts:
            resolved = self._alternative(part, prefix) if isinstance(part, tuple) else self._resolve(part, prefix)
            if resolved is None and self.architecture.derived:
                continue
            if resolved is None:
                expected = part[0][0].name if isinstance(part, tuple) else part.name
                raise UnsupportedModelError(
                    f"{self.config.model_type}: {label} has no parameter for {prefix}{expected}, which the description "
                    f"{self.architecture.name} expects; check that the folder has all files of the model"
                )
            ops += resolved
        return Group(label, tuple(ops))

    def _heads(self, parts: tuple[Part, ...], prefix: str, block: int | None) -> Heads:
        """The heads of a block: those of its `Attention` entry, or those of the configuration."""
        entry = next((e for e in parts if isinstance(e, Attention) and self._is_attention(e, prefix)), None)
        if entry is None or block is None:
            return heads_of(self.config)
        numbers = (entry.queries, entry.shared, entry.size, entry.values)
        try:
            return Heads(*(setting(self.config, formula, block) for formula in numbers))
        except ValueError as error:
            raise UnsupportedModelError(f"{error}, which the heads of {prefix}{entry.name} are derived from") from error


def build_graph(
    config: Any,
    shapes: Mapping[str, Shape],
    tied: Mapping[str, str] | None = None,
    architecture: Architecture | None = None,
    *,
    decoder: str = "",
    buffers: Collection[str] = (),
) -> ModelGraph:
    """Matches the description of a configuration's decoder with a model's parameters.

    - shapes: the shape of every stored parameter.
    - tied: the stored name of every tied parameter.
    - architecture: the description. Default: the one for the decoder's model type.
    - decoder: the name of the decoder's module in a wrapper.
    - buffers: the names in `shapes` that are persistent buffers.

    Raises UnsupportedModelError for an unknown architecture, a missing parameter, or a parameter that no entry claims.
    """
    whole, config, tied = config, config.get_text_config(decoder=True), dict(tied or {})
    architecture = architecture or architecture_of(config)
    wrapped = whole is not config and bool(decoder)
    writers = wrapper_writers(whole.model_type) if wrapped else ()
    if wrapped:
        architecture = architecture.inside(decoder)
        architecture = replace(architecture, outer=(*architecture.outer, *(writers or ())))
    resolver = _Resolver(architecture, config, shapes, tied)
    blocks = _blocks(resolver, buffers)
    around = [name for name in buffers if not architecture.in_blocks(name) and name.startswith(decoder)]
    outer = _with_buffers(resolver.group("the model", architecture.outer, ""), around)
    claimed = {tied.get(name, name) for group in (*blocks, outer) for name in group.params()}
    unclaimed = sorted(set(shapes) - claimed)
    carried = [name for name in unclaimed if wrapped and not name.startswith(f"{decoder}.")]
    _check_claimed([name for name in unclaimed if name not in carried], config, architecture)
    heads = heads_of(config)
    reason = f"the parts of {whole.model_type} that write into the residual stream of its decoder are not described"
    return ModelGraph(
        config=config,
        architecture=architecture,
        hidden=config.hidden_size,
        heads=heads.queries,
        kv_heads=heads.shared,
        head_dim=heads.size,
        shapes=shapes,
        tied=tied,
        blocks=blocks,
        outer=outer,
        carried=tuple(carried),
        r1_blocked=reason if writers is None else architecture.r1_blocked,
    )


def _blocks(resolver: _Resolver, buffers: Collection[str]) -> tuple[Group, ...]:
    """The blocks of a model, each with its persistent buffers."""
    path, architecture = resolver.architecture.blocks, resolver.architecture
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    numbers = {int(match.group(1)) for name in resolver.shapes if (match := pattern.match(name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise UnsupportedModelError(
            f"{resolver.config.model_type}: the blocks {path}.0, {path}.1, ... must be numbered without gaps; check "
            "that the folder has all files of the model"
        )
    return tuple(
        _with_buffers(
            resolver.group(f"block {i}", architecture.block, architecture.block_prefix(i), i),
            [name for name in buffers if name.startswith(architecture.block_prefix(i))],
        )
        for i in range(len(numbers))
    )


def _check_claimed(unclaimed: list[str], config: Any, architecture: Architecture) -> None:
    """Raises UnsupportedModelError if there are parameters that no entry of a description claims."""
    if unclaimed:
        raise UnsupportedModelError(
            f"{config.model_type}: the description ({architecture.name}) claims no parameter named "
            f"{', '.join(unclaimed[:4])}{f' and {len(unclaimed) - 4} more' if len(unclaimed) > 4 else ''}; folding "
            "around an unknown parameter could change the model. Describe it, see docs/extend.md"
        )


def _with_buffers(group: Group, buffers: Iterable[str]) -> Group:
    return replace(group, buffers=tuple(buffers))
