"""Descriptions of architectures, as data: which parameter reads and writes which basis.

A *basis* is the coordinate system of the vectors that flow between two operations. The names have a fixed meaning:

    residual        the residual stream                       attn_in, mlp_in  outputs of norms before attention, MLP
    q, k, v         per-head queries, keys, values            attn_out         the heads' mixed values, input of o_proj
    gate, up, act   of the feed-forward network               final            the output of the last norm
    latent...       between two linear layers with nothing, or only a norm, between them
    logits, fixed   never changed                             image            output of an encoder of images or sound

If a block has several feed-forward networks, a prefix distinguishes their bases: ``experts.act``, ``shared.act``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gyroquant.errors import UnsupportedModelError
from gyroquant.registry import Registry


@dataclass(frozen=True)
class Linear:
    """A linear layer, or several that share one weight.

    - name: its path in the block. '{e}' stands for an expert's number.
    - reads: the basis of its inputs.
    - writes: the basis of its outputs. With several, consecutive rows write them in this order.
    - per_head: the rows of several bases alternate head by head instead.
    - alternating: the rows of several bases alternate row by row instead.
    - sizes: the settings that state the numbers of rows of all bases but the last. Default: as the bases' names imply.
    - transposed: the weight is stored as (in, out).
    - stacked: the weight is a bare parameter of shape (expert, out, in), or (out, in) without experts.
    - intercepted: no module and no experts' function of transformers multiplies by the weight, so that its products are
      intercepted.
    - quantize: False for layers that are never rounded, such as routers.
    - when: the entry applies only to blocks that have this parameter. Empty: to all.
    """

    name: str
    reads: str
    writes: str | tuple[str, ...]
    per_head: bool = False
    alternating: bool = False
    sizes: tuple[str, ...] = ()
    transposed: bool = False
    stacked: bool = False
    intercepted: bool = False
    quantize: bool = True
    when: str = ""


@dataclass(frozen=True)
class Norm:
    """A norm from basis `reads` to basis `writes`. The two are equal for query and key norms.

    - offset: the number that the module adds to its stored weight to get the gain (1 for Gemma).
    - optional: models without this norm fit the description too.
    - when: as for `Linear`.
    """

    name: str
    reads: str
    writes: str
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    optional: bool = False
    when: str = ""


@dataclass(frozen=True)
class Embedding:
    """A table of vectors, one in each row, that are written to a basis."""

    name: str
    writes: str = "residual"


@dataclass(frozen=True)
class Bias:
    """A vector that is added to a basis, as a parameter of its own. `name` is that of the parameter."""

    name: str
    writes: str = "residual"


@dataclass(frozen=True)
class Attention:
    """The attention module of a block, and its heads: each the name of a setting, or a quotient such as ``a/b``.

    Without this entry, the heads are those of `gyroquant.models.graph.heads.heads_of`.

    - queries, shared: the numbers of query heads and of key and value heads.
    - size, values: the numbers of coordinates of a key and of a value.
    - normed_values: values pass a norm without a gain, head by head, so that only rotations of a head are exact.
    - hooked: False if maps and rounding do not reach its queries and keys.
    - when: as for `Linear`.
    """

    name: str
    queries: str
    shared: str
    size: str
    values: str
    normed_values: bool = False
    hooked: bool = True
    when: str = ""


@dataclass(frozen=True)
class Kept:
    """A parameter that meets no basis that changes: a convolution, a decay, a gate of a whole head. `name` is its own.

    '{e}' stands for a number.
    """

    name: str


Entry = Linear | Norm | Embedding | Bias | Attention | Kept
RopeLayout = Literal["half", "interleaved", "none", "unknown"]
Part = (
    Entry | tuple[tuple[Entry, ...], ...]
)  # a tuple of groups: alternatives, of which the first that the model has is used


@dataclass(frozen=True)
class Example:
    """A tiny model: a configuration class of transformers, by name, and its settings.

    - values: settings in addition to those that all tiny models share (`gyroquant.testing.models.COMMON`).
    - without: names of shared settings that the class does not accept.
    """

    config: str | type
    values: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def example(config: str | type, without: tuple[str, ...] = (), **values: Any) -> Example:
    """An `Example` with its settings as keyword arguments."""
    return Example(config, values, without)


@dataclass(frozen=True)
class Architecture:
    """One family of decoders.

    - model_types: the model types of transformers that it describes.
    - blocks: the path of the list of blocks.
    - block: the entries of one block, with paths in the block.
    - outer: the entries around the blocks, with full paths.
    - rope: the coordinates of a head that RoPE turns as a pair. `half`: half a head apart. `interleaved`: neighbours.
      `none`: the model has learned positions. `unknown`: a derived description could not tell.
    - derived: the description was derived from the model. Entries without a parameter are left out then.
    - r1_blocked: the reason why the residual stream must not be changed. Empty if it may be changed.
    - keeps_mean: a map of the residual stream must preserve the mean.
    - shares_values: a setting with one entry for each block. A block that writes no values takes those of the last
      block before it that writes some and has the same entry. Empty: blocks do not share values.
    - passed: what a block returns besides its hidden states and the next one takes: the number of the result, and the
      name or position of the argument.
    - batch_axis: the axis of hidden states that counts sequences. It is not the first in models with several streams.
    - returns: the length of the tuple that a block returns. 0: it returns the hidden states alone.
    - facts: how the deriver knows each fact, by the name of an entry or of a site.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    block: tuple[Part, ...]
    outer: tuple[Part, ...]
    rope: RopeLayout
    derived: bool = False
    r1_blocked: str = ""
    keeps_mean: bool = False
    shares_values: str = ""
    batch_axis: int = 0
    passed: tuple[tuple[int, str | int], ...] = ()
    returns: int = 0
    facts: Mapping[str, str] = field(default_factory=dict, compare=False)
    refuse: Callable[[Any], str | None] = lambda config: None
    """Takes a configuration. Returns the reason why this variant of the architecture is not supported, or None."""
    examples: Mapping[str, Example] = field(default_factory=dict, compare=False)
    """Tiny models by name. `gyroquant.testing.check_architecture` proves every site on them."""

    def block_prefix(self, index: int) -> str:
        """The prefix of the names of all modules and parameters of one block."""
        return f"{self.blocks}.{index}."

    def in_blocks(self, name: str) -> bool:
        """Whether a module or parameter belongs to a block."""
        return name.startswith(f"{self.blocks}.")

    def inside(self, decoder: str) -> Architecture:
        """This description for a decoder that is the module `decoder` of a larger model."""
        base = self.blocks.rpartition(".")[0]

        def moved(name: str) -> str:
            return decoder + name.removeprefix(base) if name.startswith(f"{base}.") else name

        def relocated(part: Part) -> Part:
            if isinstance(part, tuple):
                return tuple(tuple(replace(entry, name=moved(entry.name)) for entry in group) for group in part)
            return replace(part, name=moved(part.name))

        return replace(self, blocks=moved(self.blocks), outer=tuple(relocated(part) for part in self.outer))

    def linears(self) -> Iterator[Linear]:
        """Every linear layer in the description, including those of alternatives."""
        for part in (*self.block, *self.outer):
            groups = part if isinstance(part, tuple) else ((part,),)
            yield from (entry for group in groups for entry in group if isinstance(entry, Linear))


ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture", "gyroquant.models.architectures", error=UnsupportedModelError
)
"""Every description, by the model types of transformers that it describes."""
WRAPPERS: Registry[tuple[Linear, ...]] = Registry("wrapper", "gyroquant.models.architectures")
"""A wrapper's linear layers that write to its decoder's residual stream, by the wrapper's model type."""


def register_wrapper(model_types: tuple[str, ...], *writers: Linear) -> None:
    """Registers wrappers by model type, with their linear layers that write to the decoder's residual stream.

    These layers project the outputs of encoders of images and sound.
    """
    for model_type in model_types:
        WRAPPERS.add(model_type, writers, _caller())


def wrapper_writers(model_type: str) -> tuple[Linear, ...] | None:
    """The layers that `register_wrapper` registered for a model type, or None."""
    return WRAPPERS.get(model_type)


def register(architecture: Architecture) -> Architecture:
    """Registers an architecture under its model types and returns it."""
    for model_type in architecture.model_types:
        ARCHITECTURES.add(model_type, architecture, _caller())
    return architecture


def _caller() -> str:
    """The name of the module that called a function of this module. The registry's errors contain it."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def model_types() -> tuple[str, ...]:
    """Every model type that has a description, sorted."""
    return tuple(ARCHITECTURES)


def architectures() -> tuple[Architecture, ...]:
    """Every description, once."""
    return ARCHITECTURES.registered()


def described(model_type: str) -> Architecture | None:
    """The description of a model type, or None."""
    return ARCHITECTURES.get(model_type)


def architecture_of(config: Any) -> Architecture:
    """The description for a transformers configuration.

    Raises UnsupportedModelError if there is no description, or if the description excludes this variant.
    """
    architecture = described(config.model_type)
    if architecture is None:
        raise UnsupportedModelError(
            f"the architecture {config.model_type!r} is not described; described are {', '.join(model_types())}. "
            "To describe it, add one small file, see docs/extend.md"
        )
    reason = architecture.refuse(config)
    if reason:
        raise UnsupportedModelError(f"{config.model_type}: {reason}")
    return architecture
