"""The number and the size of the heads of attention, read from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Heads:
    """The heads of attention.

    - queries: the number of query heads.
    - shared: the number of key and value heads, each shared by a group of query heads.
    - size: the number of coordinates of a head.
    """

    queries: int
    shared: int
    size: int


def heads_of(config: Any) -> Heads:
    """The heads of a decoder's configuration. Without `num_key_value_heads`, every query head has its own key head."""
    queries = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, shared, getattr(config, "head_dim", None) or config.hidden_size // queries)
