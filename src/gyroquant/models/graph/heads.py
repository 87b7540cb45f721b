"""The number and the size of the heads of attention, read from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Heads:
    """The heads of attention.

    - queries: the number of query heads.
    - shared: the number of key and value heads, each shared by a group of query heads.
    - size: the number of coordinates of a query or a key.
    - values: the number of coordinates of a value.
    """

    queries: int
    shared: int
    size: int
    values: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values or self.size)


def heads_of(config: Any) -> Heads:
    """The heads of a decoder's configuration. Without `num_key_value_heads`, every query head has its own key head.

    A model without attention has one head of the width of the model.
    """
    config = layer_config(config, 0)
    queries = getattr(config, "num_attention_heads", None) or 1
    shared = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, shared, getattr(config, "head_dim", None) or config.hidden_size // queries)


def setting(config: Any, formula: str, block: int) -> int:
    """The number that a formula gives for one block: a setting, or a quotient of two.

    A setting may be a list of one number for each block, or differ for one block (`per_layer_config`). Raises
    ValueError if the configuration does not have it.
    """
    numbers = [_number(config, name, block) for name in formula.split("/")]
    return numbers[0] if len(numbers) == 1 else numbers[0] // numbers[1]


def _number(config: Any, name: str, block: int) -> int:
    try:
        value = getattr(layer_config(config, block), name)
    except AttributeError as error:
        raise ValueError(f"{config.model_type} has no setting {name} for block {block}") from error
    if isinstance(value, (list, tuple)) and block < len(value):
        value = value[block]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{config.model_type}: the setting {name} is {value!r}, not a whole number")
    return value


def layer_config(config: Any, block: int) -> Any:
    """The configuration of one block. In some models blocks have settings of their own."""
    try:
        return config.per_layer_config[block]
    except (AttributeError, IndexError, KeyError, TypeError):
        return config
