"""The operations of a model: entries of its description, matched with its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from gyroquant.models.graph.heads import Heads
from gyroquant.models.graph.spec import Attention, Bias, Embedding, Linear, Norm

Shape = tuple[int, ...]


class InModule(Protocol):
    """An object that belongs to a module. `module` is the module's full name."""

    @property
    def module(self) -> str: ...


@dataclass(frozen=True)
class Port:
    """One parameter that meets a basis.

    - param: the name of the parameter.
    - axis: the axis along which the basis lies.
    - rows: the positions on that axis. None: all.
    - offset: the number that the module adds to the stored values (1 for the gains of Gemma's norms).
    - expert: the only one of the stacked experts that the port covers. None: all.
    """

    param: str
    axis: int
    rows: torch.Tensor | None = None
    offset: float = 0.0
    expert: int | None = None


@dataclass(frozen=True)
class LinearOp:
    """A `Linear` entry in one model. `in_axis` and `out_axis` are the last two axes of its weight, in either order.

    `rows` has the rows that write each basis. None: all rows.
    """

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

    @property
    def name(self) -> str:
        """The name of the layer in recipes and reports."""
        return self.weight if self.entry.stacked else self.module

    @property
    def numel(self) -> int:
        """The number of entries of the weight, all experts together."""
        return prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of `to_matrix`."""
        return self.numel // self.in_features, self.in_features

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, or that of one expert, as a matrix of shape (out, in).

        Stacked experts are concatenated along the rows. Conv1D weights are transposed.
        """
        if self.entry.transposed:
            weight = weight.transpose(-1, -2)
        return weight.reshape(-1, self.in_features)

    def to_param(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_matrix`: the parameter, in its stored shape."""
        shape = self.shape
        if not self.entry.transposed:
            return matrix.reshape(shape)
        return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()

    def write_ports(self, basis: str) -> tuple[Port, ...]:
        if basis not in self.rows:
            return ()
        rows = self.rows[basis]
        ports = [Port(self.weight, self.out_axis, rows)]
        if self.bias:
            ports.append(Port(self.bias, len(self.shape) - 2, rows))
        return tuple(ports)

    def read_port(self) -> Port:
        return Port(self.weight, self.in_axis)


@dataclass(frozen=True)
class NormOp:
    """A `Norm` entry in one model: the names of its gain and of its bias, which only some LayerNorms have."""

    entry: Norm
    module: str
    gain: str
    bias: str | None


@dataclass(frozen=True)
class EmbeddingOp:
    """An `Embedding` entry in one model."""

    entry: Embedding
    weight: str


@dataclass(frozen=True)
class BiasOp:
    """A `Bias` entry in one model."""

    entry: Bias
    param: str


@dataclass(frozen=True)
class AttentionOp:
    """An `Attention` entry in one model: the attention module of a block and its heads."""

    entry: Attention
    module: str
    heads: Heads


@dataclass(frozen=True)
class KeptOp:
    """A `Kept` entry in one model."""

    param: str


Op = LinearOp | NormOp | EmbeddingOp | BiasOp | AttentionOp | KeptOp


@dataclass(frozen=True)
class Group:
    """The operations of one block, or of the part of a model around its blocks, and the parameters that they claim.

    `buffers` are persistent buffers. They are stored like parameters and needed to run, but never folded or rounded.
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

    @property
    def attention(self) -> AttentionOp | None:
        """The attention module, if an entry names it."""
        return next((op for op in self.ops if isinstance(op, AttentionOp)), None)

    def params(self) -> Iterable[str]:
        for op in self.ops:
            if isinstance(op, (KeptOp, BiasOp)):
                yield op.param
            elif isinstance(op, EmbeddingOp):
                yield op.weight
            elif not isinstance(op, AttentionOp):
                yield op.gain if isinstance(op, NormOp) else op.weight
                if op.bias:
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
            elif isinstance(op, (NormOp, EmbeddingOp, BiasOp)) and op.entry.writes == basis:
                if isinstance(op, EmbeddingOp):
                    ports.append(Port(op.weight, 1))
                elif isinstance(op, BiasOp):
                    ports.append(Port(op.param, 0))
                elif op.bias and op.entry.reads != basis:
                    ports.append(Port(op.bias, 0))
        return tuple(ports)

    def bases(self) -> set[str]:
        bases: set[str] = set()
        for op in self.ops:
            if isinstance(op, LinearOp):
                bases |= {op.entry.reads, *op.rows}
            elif isinstance(op, NormOp):
                bases |= {op.entry.reads, op.entry.writes}
            elif isinstance(op, (EmbeddingOp, BiasOp)):
                bases.add(op.entry.writes)
        return bases
