"""A description resolved against one model: every parameter claimed, every basis with its writers and readers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.spec import (
    Architecture,
    Embedding,
    Entry,
    Linear,
    Norm,
    Part,
    architecture_of,
    wrapper_writers,
)

Shape = tuple[int, ...]


class InModule(Protocol):
    """Something that belongs to a module, by its full name."""

    @property
    def module(self) -> str: ...


Thing = TypeVar("Thing", bound=InModule)


@dataclass(frozen=True)
class Port:
    """Where a basis meets a parameter: the axis along which it lies, and which rows of that axis (None: all).

    `offset` is what the module adds to the stored values (1 for the gains of Gemma's norms). `expert` restricts the
    port to one of the stacked experts of a parameter.
    """

    param: str
    axis: int
    rows: torch.Tensor | None = None
    offset: float = 0.0
    expert: int | None = None


@dataclass(frozen=True)
class LinearOp:
    """A `Linear` entry found in a model. `in_axis` and `out_axis` are axes of its weight, whose last two they are."""

    entry: Linear
    module: str
    weight: str
    bias: str | None
    shape: Shape
    in_axis: int
    out_axis: int
    rows: Mapping[str, torch.Tensor | None]

    @property
    def in_features(self) -> int:
        return self.shape[self.in_axis]

    @property
    def out_features(self) -> int:
        return self.shape[self.out_axis]

    def write_ports(self, basis: str) -> tuple[Port, ...]:
        if basis not in self.rows:
            return ()
        rows = self.rows[basis]
        ports = [Port(self.weight, self.out_axis, rows)]
        if self.bias:
            ports.append(Port(self.bias, 1 if self.entry.stacked else 0, rows))
        return tuple(ports)

    def read_port(self) -> Port:
        return Port(self.weight, self.in_axis)


@dataclass(frozen=True)
class NormOp:
    """A `Norm` entry found in a model: the names of its gain and, for some LayerNorms, its bias."""

    entry: Norm
    module: str
    gain: str
    bias: str | None


@dataclass(frozen=True)
class EmbeddingOp:
    """An `Embedding` entry found in a model."""

    entry: Embedding
    weight: str


Op = LinearOp | NormOp | EmbeddingOp


@dataclass(frozen=True)
class Group:
    """One block of a model, or what lies around the blocks: the operations and the parameters they claim.

    `buffers` are persistent ones: stored like parameters, needed to run, never folded or rounded.
    """

    label: str
    ops: tuple[Op, ...]
    buffers: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[LinearOp, ...]:
        return tuple(op for op in self.ops if isinstance(op, LinearOp))

    @property
    def norms(self) -> tuple[NormOp, ...]:
        return tuple(op for op in self.ops if isinstance(op, NormOp))

    @property
    def last_bias(self) -> str | None:
        """The bias of the last linear layer that adds to the residual stream, if there is one."""
        writers = [op for op in self.linears if op.entry.writes == "residual" and not op.entry.stacked]
        return writers[-1].bias if writers else None

    def params(self) -> Iterable[str]:
        for op in self.ops:
            yield op.gain if isinstance(op, NormOp) else op.weight
            if not isinstance(op, EmbeddingOp) and op.bias:
                yield op.bias
        yield from self.buffers

    def readers(self, basis: str) -> tuple[LinearOp, ...]:
        return tuple(op for op in self.linears if op.entry.reads == basis)

    def writers(self, basis: str) -> tuple[Port, ...]:
        """The ports of linear layers, embeddings and norms' biases that write a basis; norms' gains are not ports."""
        ports: list[Port] = []
        for op in self.ops:
            if isinstance(op, LinearOp):
                ports += op.write_ports(basis)
            elif op.entry.writes == basis:
                if isinstance(op, EmbeddingOp):
                    ports.append(Port(op.weight, 1))
                elif op.bias and op.entry.reads != basis:
                    ports.append(Port(op.bias, 0))
        return tuple(ports)

    def bases(self) -> set[str]:
        found: set[str] = set()
        for op in self.ops:
            found |= set(op.rows) if isinstance(op, LinearOp) else {op.entry.writes}
            if not isinstance(op, EmbeddingOp):
                found.add(op.entry.reads)
        return found


@dataclass(frozen=True)
class ModelGraph:
    """A whole model: its blocks in order, what is around them, its head layout and its tied parameters.

    `config` is that of the decoder, also where the decoder is a part of a larger model (a *wrapper*, which also takes
    images or sound). `carried` are the wrapper's other parameters, which the decoder runs without; `r1_blocked` says
    why the residual stream may not be changed, and is empty where it may.
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

    def block_params(self, index: int) -> tuple[str, ...]:
        return tuple(self.blocks[index].params())

    def in_block(self, index: int, things: Iterable[Thing]) -> list[Thing]:
        """Those of some things that belong to a module of one block."""
        prefix = f"{self.architecture.blocks}.{index}."
        return [one for one in things if one.module.startswith(prefix)]

    def around_blocks(self, things: Iterable[Thing]) -> list[Thing]:
        """Those that belong to no block."""
        return [one for one in things if not one.module.startswith(f"{self.architecture.blocks}.")]

    def outer_params(self) -> tuple[str, ...]:
        """Every parameter outside the blocks, tied ones under the name that is stored."""
        return tuple(dict.fromkeys(self.tied.get(name, name) for name in self.outer.params()))


class _Resolver:
    """Matches entries of a description with the parameters of a model."""

    def __init__(self, architecture: Architecture, config: Any, shapes: Mapping[str, Shape], tied: Mapping[str, str]):
        self.architecture, self.config, self.shapes, self.tied = architecture, config, shapes, tied
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def shape(self, name: str) -> Shape | None:
        return self.shapes.get(self.tied.get(name, name))

    def _rows(self, entry: Linear, out_features: int) -> dict[str, torch.Tensor | None]:
        if isinstance(entry.writes, str):
            return {entry.writes: None}
        if entry.per_head:
            index = torch.arange(out_features).view(self.heads, len(entry.writes), self.head_dim)
            return {basis: index[:, i].reshape(-1) for i, basis in enumerate(entry.writes)}
        known = {
            "q": self.heads * self.head_dim,
            "k": self.kv_heads * self.head_dim,
            "v": self.kv_heads * self.head_dim,
        }
        sizes = [known.get(basis, out_features // len(entry.writes)) for basis in entry.writes]
        if sum(sizes) != out_features:
            raise UnsupportedModelError(f"{entry.name} has {out_features} rows where {sizes} are expected")
        return dict(zip(entry.writes, torch.arange(out_features).split(sizes), strict=True))

    def _linear(self, entry: Linear, prefix: str) -> LinearOp | None:
        module = prefix + entry.name
        weight = module if entry.stacked else f"{module}.weight"
        shape = self.shape(weight)
        if shape is None:
            return None
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

    def _resolve(self, entry: Entry, prefix: str) -> list[Op] | None:
        """The operations of an entry, or None when its parameter is missing."""
        if isinstance(entry, Linear):
            if "{e}" in entry.name:
                return self._listed(entry, prefix)
            linear = self._linear(entry, prefix)
            return None if linear is None else [linear]
        module = prefix + entry.name
        if self.shape(f"{module}.weight") is None:
            return [] if isinstance(entry, Norm) and entry.optional else None
        if isinstance(entry, Embedding):
            return [EmbeddingOp(entry, f"{module}.weight")]
        bias = f"{module}.bias"
        return [NormOp(entry, module, f"{module}.weight", bias if self.shape(bias) is not None else None)]

    def _listed(self, entry: Linear, prefix: str) -> list[Op] | None:
        """One operation for each expert that is there, numbered from 0."""
        found: list[Op] = []
        while True:
            number = str(len(found))
            name, reads, writes = (str(text).replace("{e}", number) for text in (entry.name, entry.reads, entry.writes))
            op = self._linear(replace(entry, name=name, reads=reads, writes=writes), prefix)
            if op is None:
                return found or None
            found.append(op)

    def _alternative(self, groups: tuple[tuple[Entry, ...], ...], prefix: str) -> list[Op] | None:
        for entries in groups:
            resolved = [self._resolve(entry, prefix) for entry in entries]
            if all(ops is not None for ops in resolved):
                return [op for ops in resolved for op in ops or ()]
        return None

    def group(self, label: str, parts: tuple[Part, ...], prefix: str) -> Group:
        ops: list[Op] = []
        for part in parts:
            found = self._alternative(part, prefix) if isinstance(part, tuple) else self._resolve(part, prefix)
            if found is None:
                wanted = part[0][0].name if isinstance(part, tuple) else part.name
                raise UnsupportedModelError(
                    f"{self.config.model_type}: {label} has no parameter for {prefix}{wanted}, which its description "
                    f"({self.architecture.name}) expects"
                )
            ops += found
        return Group(label, tuple(ops))


def build_graph(
    config: Any,
    shapes: Mapping[str, Shape],
    tied: Mapping[str, str] | None = None,
    architecture: Architecture | None = None,
    *,
    decoder: str = "",
    buffers: Collection[str] = (),
) -> ModelGraph:
    """Resolves the description of a configuration's decoder, or another `architecture`, against a model's parameters.

    `shapes` maps every stored parameter to its shape; `tied` maps the name of a tied parameter to the stored one;
    `decoder` is the name of the decoder's module, which matters where the model is a wrapper; `buffers` are the names
    in `shapes` that are persistent buffers.
    Raises UnsupportedModelError for an unknown architecture, a missing parameter, or one that no entry claims.
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
    around = [name for name in buffers if not name.startswith(f"{architecture.blocks}.") and name.startswith(decoder)]
    outer = _with_buffers(resolver.group("the model", architecture.outer, ""), around)
    claimed = {tied.get(name, name) for group in (*blocks, outer) for name in group.params()}
    unclaimed = sorted(set(shapes) - claimed)
    carried = [name for name in unclaimed if wrapped and not name.startswith(f"{decoder}.")]
    _check_claimed([name for name in unclaimed if name not in carried], config, architecture)
    why = f"which parts of {whole.model_type} write into the residual stream of its decoder is not described"
    return ModelGraph(
        config=config,
        architecture=architecture,
        hidden=config.hidden_size,
        heads=resolver.heads,
        kv_heads=resolver.kv_heads,
        head_dim=resolver.head_dim,
        shapes=shapes,
        tied=tied,
        blocks=blocks,
        outer=outer,
        carried=tuple(carried),
        r1_blocked=why if writers is None else "",
    )


def _blocks(resolver: _Resolver, buffers: Collection[str]) -> tuple[Group, ...]:
    """The blocks of a model, each with its persistent buffers."""
    where, architecture = resolver.architecture.blocks, resolver.architecture
    pattern = re.compile(re.escape(where) + r"\.(\d+)\.")
    numbers = {int(match.group(1)) for name in resolver.shapes if (match := pattern.match(name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise UnsupportedModelError(f"{resolver.config.model_type}: expected blocks {where}.0, .1, ... without gaps")
    return tuple(
        _with_buffers(
            resolver.group(f"block {i}", architecture.block, f"{where}.{i}."),
            [name for name in buffers if name.startswith(f"{where}.{i}.")],
        )
        for i in range(len(numbers))
    )


def _check_claimed(unclaimed: list[str], config: Any, architecture: Architecture) -> None:
    """Refuses parameters that no entry of a description claims."""
    if unclaimed:
        raise UnsupportedModelError(
            f"{config.model_type}: the description ({architecture.name}) claims no parameter named "
            f"{', '.join(unclaimed[:4])}{f' and {len(unclaimed) - 4} more' if len(unclaimed) > 4 else ''}; folding "
            "around an unknown parameter could change the model. Describe it, see docs/add-an-architecture.md"
        )


def _with_buffers(group: Group, buffers: Iterable[str]) -> Group:
    return replace(group, buffers=tuple(buffers))
