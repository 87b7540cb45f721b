"""Attention that reads some tokens of a rounded KV cache unrounded: the first ones, and those just before the query.

A query at position t reads the keys and values at positions below `first` and above ``t - last`` unrounded, all others
rounded. Where a model runs on a whole text at once, a token is therefore exact for some queries and rounded for others.
Attention gets both, as two columns of keys, and a mask in which every query sees one of them. The softmax over the
visible columns is then exactly that of generation, where a token is rounded when it leaves the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""Keys and values, each of shape (batch, kv heads, length, head_dim)."""


@dataclass(frozen=True)
class ExactTokens:
    """The tokens that queries read unrounded.

    - first: the number of tokens at the start of the text.
    - last: the number of tokens up to and including the query's own.
    """

    first: int = 0
    last: int = 0

    def __bool__(self) -> bool:
        return bool(self.first or self.last)

    def at(self, module: nn.Module) -> ExactTokens:
        """Those of one attention module. One with a sliding window has no exact first tokens: they leave its window,
        and its cache does not know their positions any more.
        """
        return ExactTokens(0, self.last) if has_sliding_window(module) else self


ALL_ROUNDED = ExactTokens()


def has_sliding_window(module: Any) -> bool:
    """Whether an attention module sees a window of the text only, as transformers' modules say it."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window is not None
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and index is not None:
        return kinds[index] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


@dataclass
class View:
    """What the queries of one call see.

    - position: of each query among the keys, shape (batch or 1, 1, queries, 1).
    - start: of the text among the keys, which padding on the left moves, shape (batch or 1, 1, 1, 1).
    - visible: whether a query sees a key, shape (batch or 1, heads or 1, queries, keys).
    - mask: the mask that attention was given.
    """

    position: Tensor
    start: Tensor
    visible: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, queries: int, keys: int, mask: Tensor | None, device: torch.device) -> View:
        """The view of a call. Without a mask, queries are the first positions, or a single one is the last."""
        index = torch.arange(keys, device=device)
        if mask is None:
            position = torch.full((1,), keys - 1, device=device) if queries == 1 else index[:queries]
            position = position.view(1, 1, -1, 1)
            return cls(position, position.new_zeros(1, 1, 1, 1), index <= position, None)
        mask = mask[..., :keys]
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        position = torch.where(visible, index, 0).amax(-1, keepdim=True)[:, :1]
        start = torch.where(visible[..., -1:, :], index, keys - 1).amin(-1, keepdim=True)[:, :1]
        return cls(position, start, visible, mask)

    def restricted(self, columns: Tensor, seen: Tensor) -> Tensor:
        """The mask for columns that repeat keys, where `seen` says which column a query reads.

        `columns` are indices of keys, shape (columns,). `seen` has shape (batch or 1, 1, queries, columns).
        """
        if self.mask is None or self.mask.dtype == torch.bool:
            return self.visible[..., columns] & seen
        return self.mask[..., columns].masked_fill(~seen, torch.finfo(self.mask.dtype).min)


def read_both(
    queries: int, exact: Pair, rounded: Pair, mask: Tensor | None, tokens: ExactTokens
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and the mask with which attention reads each token exact or rounded, as the query demands.

    `exact` and `rounded` hold the same tokens. `mask` is transformers': boolean, additive, or None for causal attention
    from the first key on.
    """
    length = exact[0].shape[2]
    view = View.of(queries, length, mask, exact[0].device)
    index = torch.arange(length, device=exact[0].device)
    is_exact = (index > view.position - tokens.last) | ((index >= view.start) & (index < view.start + tokens.first))
    if queries == 1:
        chosen = is_exact.transpose(-1, -2)  # (batch or 1, 1, keys, 1)
        key, value = (torch.where(chosen, one, other) for one, other in zip(exact, rounded, strict=True))
        return key, value, mask
    key, value = (torch.cat(parts, dim=2) for parts in zip(rounded, exact, strict=True))
    return key, value, view.restricted(torch.cat([index, index]), torch.cat([~is_exact, is_exact], dim=-1))
