"""How an architecture is described: which parameter reads which basis and writes which basis. Data, no behaviour.

A *basis* is the coordinate system of the vectors that flow between two operations. The names have a fixed meaning:

    residual        the residual stream                       attn_in, mlp_in  the outputs of the norms in front of them
    q, k, v         per-head queries, keys, values            attn_out         the heads' mixed values, input of o_proj
    gate, up, act   of the feed-forward network               final            the output of the last norm
    logits, fixed   never changed                             image            what an encoder of images or sound gives

A prefix keeps several feed-forward networks in one block apart: ``experts.act``, ``shared.act``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from gyroquant.errors import UnsupportedModelError


@dataclass(frozen=True)
class Linear:
    """A linear layer, or several with one weight.

    `name` is its path below the block ('{e}' stands for an expert's number). Its rows write the bases `writes`, in
    that order; `per_head` says that they alternate head by head instead. `transposed` weights are stored (in, out),
    `stacked` ones are bare parameters (expert, out, in). `quantize` is False for routers and the like.
    """

    name: str
    reads: str
    writes: str | tuple[str, ...]
    per_head: bool = False
    transposed: bool = False
    stacked: bool = False
    quantize: bool = True


@dataclass(frozen=True)
class Norm:
    """A norm from basis `reads` to basis `writes`; the same name twice for one inside a basis (query and key norms).

    `offset` is what the module adds to its stored weight to get the gain (1 for Gemma).
    """

    name: str
    reads: str
    writes: str
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    optional: bool = False


@dataclass(frozen=True)
class Embedding:
    """A table of vectors, one a row, written into a basis."""

    name: str
    writes: str = "residual"


Entry = Linear | Norm | Embedding
RopeLayout = Literal["half", "interleaved", "none"]
Part = Entry | tuple[tuple[Entry, ...], ...]  # a tuple of groups: alternatives, the first that is present counts


@dataclass(frozen=True)
class Architecture:
    """One family of decoders: where its blocks lie, what is in them and around them.

    `rope` says which coordinates of a head RoPE turns together: those half a head apart, neighbours, or none because
    positions are learned.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    block: tuple[Part, ...]
    outer: tuple[Part, ...]
    rope: RopeLayout
    refuse: Callable[[Any], str | None] = lambda config: None
    """Given a configuration, the reason why this variant of the architecture is not supported, or None."""

    def inside(self, decoder: str) -> Architecture:
        """The same description for a decoder that is the module `decoder` of a larger model."""
        base = self.blocks.rpartition(".")[0]

        def moved(name: str) -> str:
            return decoder + name.removeprefix(base) if name.startswith(f"{base}.") else name

        def relocated(part: Part) -> Part:
            if isinstance(part, tuple):
                return tuple(tuple(replace(entry, name=moved(entry.name)) for entry in group) for group in part)
            return replace(part, name=moved(part.name))

        return replace(self, blocks=moved(self.blocks), outer=tuple(relocated(part) for part in self.outer))


_REGISTRY: dict[str, Architecture] = {}
_WRAPPERS: dict[str, tuple[Linear, ...]] = {}


def register_wrapper(model_types: tuple[str, ...], *writers: Linear) -> None:
    """Makes known which linear layers of models around a decoder write into its residual stream: the projections of
    what encoders of images and sound give.
    """
    for model_type in model_types:
        if model_type in _WRAPPERS:
            raise ValueError(f"the wrapper {model_type!r} is described twice")
        _WRAPPERS[model_type] = writers


def wrapper_writers(model_type: str) -> tuple[Linear, ...] | None:
    """What `register_wrapper` was told of a model type, or None."""
    return _WRAPPERS.get(model_type)


def register(architecture: Architecture) -> Architecture:
    """Makes an architecture known under its model types."""
    for model_type in architecture.model_types:
        if model_type in _REGISTRY:
            raise ValueError(f"model type {model_type!r} is described twice")
        _REGISTRY[model_type] = architecture
    return architecture


def model_types() -> tuple[str, ...]:
    """Every model type that is described, sorted."""
    return tuple(sorted(_REGISTRY))


def architectures() -> tuple[Architecture, ...]:
    """Every description, once."""
    return tuple(dict.fromkeys(_REGISTRY.values()))


def architecture_of(config: Any) -> Architecture:
    """The description for a transformers configuration. Raises UnsupportedModelError when there is none."""
    found = _REGISTRY.get(config.model_type)
    if found is None:
        raise UnsupportedModelError(
            f"the architecture {config.model_type!r} is not described; described are {', '.join(model_types())}. "
            "A description is one small file, see docs/add-an-architecture.md"
        )
    reason = found.refuse(config)
    if reason:
        raise UnsupportedModelError(f"{config.model_type}: {reason}")
    return found
