"""The bytes that a model's weights take in its files, by part.

Every stored tensor counts: codes, scales, zero points, maps that run with the model, norms, biases. Headers of files,
the tokenizer and the configuration do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gyroquant.models.graph.model_graph import TOKENS, ModelGraph
from gyroquant.models.stores.packed_description import MAPS


class Sized(Protocol):
    """What is counted: a store of weights."""

    @property
    def graph(self) -> ModelGraph: ...

    @property
    def weights(self) -> int: ...

    def stored_sizes(self) -> dict[str, int]: ...


PARTS = ("layers", "embeddings", "head", "rest")
"""The parts of a model.

- layers: linear layers, rounded or not, and the maps that run with them.
- embeddings: tables of embeddings. A head that is tied to one is stored there, once.
- head: a head with a matrix of its own.
- rest: norms, biases, and everything else.
"""

LOGITS = "logits"  # the basis that a head writes


def part_of(graph: ModelGraph, name: str) -> str:
    """The part of a model that a parameter, or a tensor of a map, belongs to: one of PARTS."""
    op = graph.find_op(name)
    if op is None:
        return "layers" if name.startswith(MAPS) else "rest"
    if op.entry.reads == TOKENS:
        return "embeddings"
    return "head" if op.entry.writes == LOGITS else "layers"


def with_total(parts: Mapping[str, int]) -> dict[str, int]:
    """The bytes of all PARTS, with their `total`. Parts that are missing are empty."""
    bytes_ = {part: parts.get(part, 0) for part in PARTS}
    return bytes_ | {"total": sum(bytes_.values())}


def add_up(graph: ModelGraph, sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The bytes of each part and their `total`, from pairs of a parameter's name and its bytes."""
    parts: dict[str, int] = {}
    for name, size in sizes:
        part = part_of(graph, name)
        parts[part] = parts.get(part, 0) + size
    return with_total(parts)


def weight_bytes(store: Sized) -> dict[str, int]:
    """The bytes of a stored model by part, and their `total`."""
    return add_up(store.graph, store.stored_sizes().items())


def whole_model_bits(bytes_: Mapping[str, int], weights: int) -> float:
    """Bits per weight of a whole model: the `total` of its bytes over the number of its weights."""
    return 8 * bytes_["total"] / weights


def sizes(store: Sized) -> dict[str, Any]:
    """`whole_model_bits_per_weight` and `bytes` of a stored model, as results state them."""
    bytes_ = weight_bytes(store)
    return {"whole_model_bits_per_weight": whole_model_bits(bytes_, store.weights), "bytes": bytes_}


__all__ = ["PARTS", "add_up", "part_of", "sizes", "weight_bytes", "whole_model_bits", "with_total"]
