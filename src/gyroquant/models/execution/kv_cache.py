"""A KV cache that holds packed codes, for ``model.generate(..., past_key_values=PackedKVCache(model))``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.grids import IntegerGrid, RealZeroGrid
from gyroquant.models.execution.exact_tokens import ALL_ROUNDED, ExactTokens, Pair, View
from gyroquant.models.execution.online import AttentionState, mark_ready
from gyroquant.models.execution.packed_rows import PackedRows

_STATE = "_gyroquant_attention"
_GRIDS = (IntegerGrid, RealZeroGrid)


def _joined(pairs: list[Pair]) -> Pair:
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@dataclass
class _Read:
    """The tokens of a layer as the queries of one call read them.

    - first: those at the start that stay exact.
    - keys, values: those that are rounded.
    - recent: those that are exact for some query of this call. With several queries, the first of them may be rounded
      for others, and are among `keys` and `values` too.
    """

    first: Pair
    keys: PackedRows
    values: PackedRows
    mean: Tensor | None
    recent: Pair
    exact: ExactTokens
    dtype: torch.dtype

    def attend(self, base: str, query: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """As `CachedTokens.attend`: for one query a sequence, and attention without anything special."""
        special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        plain = base == "sdpa" and query.shape[2] == 1 and not special and not kwargs.get("dropout")
        if not plain or not len(self.keys) or not (self.keys.multiplies and self.values.multiplies):
            return None
        if mask is not None:
            if mask.shape[1] != 1:
                return None
            self._check_start(mask)
        batch, heads, _, size = query.shape
        shared = self.first[0].shape[1]
        scale = kwargs["scaling"] if kwargs.get("scaling") is not None else size**-0.5
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped = query.to(wide).view(batch, shared, heads // shared, size) * scale
        rounded = self.keys.scores(grouped)
        if self.mean is not None:  # the exact keys were not centred
            rounded = rounded + (grouped * self.mean).sum(-1, keepdim=True)
        exact = [grouped @ keys.to(wide).transpose(-1, -2) for keys, _ in (self.first, self.recent)]
        scores = torch.cat([exact[0], rounded, exact[1]], dim=-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1).split([part.shape[-1] for part in (exact[0], rounded, exact[1])], dim=-1)
        first, recent = self.first[1].to(wide), self.recent[1].to(wide)
        out = weights[0] @ first + self.values.mix(weights[1]) + weights[2] @ recent
        return out.to(query.dtype).view(batch, heads, 1, -1).transpose(1, 2).contiguous()

    def read(self, queries: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `CachedTokens.read`."""
        if mask is not None:
            self._check_start(mask)
        if not len(self.keys):
            return (*_joined([self.first, self.recent]), mask)
        keys = self.keys.decode(self.dtype)
        rounded = (keys if self.mean is None else keys + self.mean), self.values.decode(self.dtype)
        key, value = _joined([self.first, rounded, self.recent])
        first, end = self.first[0].shape[2], self.first[0].shape[2] + len(self.keys)
        length = end + self.recent[0].shape[2]
        again = max(0, length - self._length())
        if not again:
            return key, value, mask
        columns = torch.cat([torch.arange(end), torch.arange(end - again, length - again)]).to(key.device)
        view = View.of(queries, length - again, mask, key.device)
        outside = columns <= view.position - self.exact.last
        column = torch.arange(length, device=key.device)
        seen = torch.where(column < end, outside | (column < first), ~outside)
        return key, value, view.restricted(columns, seen)

    def _length(self) -> int:
        """The number of tokens, each counted once."""
        rounded = self.first[0].shape[2] + len(self.keys)
        return rounded + min(self.recent[0].shape[2], self.exact.last)

    def _check_start(self, mask: Tensor) -> None:
        """Raises InputError for sequences with padding on the left, whose first tokens are not those that are exact."""
        if self.exact.first and bool((View.of(mask.shape[-2], mask.shape[-1], mask, mask.device).start > 0).any()):
            raise InputError(
                "the packed KV cache keeps the first tokens of every sequence exact, and these sequences begin with "
                "padding: generate sequences of one length together, or set kv_cache.first_tokens=0"
            )


class PackedLayer(CacheLayerMixin):
    """The keys and values of one attention module as codes and scales, with those of some tokens as they are.

    Keys are rotated (R3) before they are rounded. They are marked, so that the attention function does neither again.
    A token is rounded when it is no longer among the `last` ones.
    """

    is_sliding = False

    def __init__(self, state: AttentionState, exact: ExactTokens = ALL_ROUNDED) -> None:
        super().__init__()
        self._state, self._exact = state, exact
        self._length = 0

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be removed again. Tokens that were rounded do not become exact again."""
        return not self._exact.last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self._state.cache is not None
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = PackedRows(self._state.cache.keys, key_states.shape[-1])
        self._values = PackedRows(self._state.cache.values, value_states.shape[-1])
        # new tensors, because slices would keep the whole prompt in memory
        empty = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states)]
        self._first: Pair = empty[0], empty[1]
        self._recent: Pair = self._first
        self._length = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values of shape (batch, kv heads, length, head_dim).

        Returns keys and values of the shape of all tokens that stand for them. Attention reads the cache itself; other
        code finds NaN in them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._state.cache is not None
        mean = self._state.cache.key_mean
        offset = None if mean is None else mean[:, None].to(key_states)
        new: Pair = self._state.keys(key_states), value_states
        missing = max(0, self._exact.first - self._length)
        self._length += key_states.shape[-2]
        if missing:
            self._first = _joined([self._first, (new[0][:, :, :missing], new[1][:, :, :missing])])
            new = new[0][:, :, missing:], new[1][:, :, missing:]
        exact = _joined([self._recent, new])
        leaving = max(0, exact[0].shape[2] - self._exact.last)
        keys, values = (part[:, :, :leaving] for part in exact)
        self._keys.append(keys if offset is None else keys - offset)
        self._values.append(values)
        # copies, for the same reason
        self._recent = exact[0][:, :, leaving:].clone(), exact[1][:, :, leaving:].clone()
        seen = self._recent if key_states.shape[-2] == 1 or not self._exact.last else exact
        read = _Read(self._first, self._keys, self._values, offset, seen, self._exact, self.dtype)
        stand_in = [x.new_full((), torch.nan).expand(*x.shape[:2], self._length, x.shape[3]) for x in new]
        return mark_ready(stand_in[0], read), stand_in[1]

    @property
    def bytes(self) -> int:
        """The size of codes, scales, zero points and exact tokens in bytes."""
        if not self.is_initialized:
            return 0
        exact = sum(part.numel() * part.element_size() for part in (*self._first, *self._recent))
        return self._keys.bytes + self._values.bytes + exact

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._keys.change(function)
            self._values.change(function)
            self._first = function(self._first[0]), function(self._first[1])
            self._recent = function(self._recent[0]), function(self._recent[1])

    def reset(self) -> None:
        self.is_initialized, self._length = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens. transformers passes a negative number.

        Raises UnsupportedModelError if tokens would have to become exact again.
        """
        if tokens_to_remove >= 0 or not self.is_initialized:
            return
        if self._exact.last and len(self._keys):
            raise UnsupportedModelError(
                "a packed KV cache with exact last tokens cannot go back, because tokens that have left the window are "
                "rounded: set kv_cache.last_tokens=0, or generate without an assistant model"
            )
        self._length = max(0, self._length + tokens_to_remove)
        first = min(self._length, self._first[0].shape[2])
        rounded = min(self._length - first, len(self._keys))
        recent = self._length - first - rounded
        self._keys.change(lambda t: t[:, :, :rounded])
        self._values.change(lambda t: t[:, :, :rounded])
        self._first = self._first[0][:, :, :first], self._first[1][:, :, :first]
        self._recent = self._recent[0][:, :, :recent], self._recent[1][:, :, :recent]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])


class PackedKVCache(Cache):
    """The KV cache of a loaded model whose recipe has a `kv_cache` section, as packed codes.

    Exact first and last tokens are kept as they are. It gives the same tokens as the model's default cache, which keeps
    unrounded keys and values and rounds them at every read. (In 16 bits, the order of additions may decide between two
    tokens that are about as likely.) Layers with a sliding window keep all tokens too. Raises UnsupportedModelError for
    a model without such a section, and for grids that are not integer grids or `real_zero`.
    """

    def __init__(self, model: nn.Module):
        modules = [(m, m.__dict__[_STATE]) for m in model.modules() if _STATE in m.__dict__]
        modules = [(module, state) for module, state in modules if state.cache is not None]
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        if len(modules) != config.num_hidden_layers:
            raise UnsupportedModelError(
                "this model does not round its KV cache: quantize it with kv_cache.bits=4 (or a recipe such as "
                "quarot-w4a4kv4) and load it with gyroquant imported"
            )
        for _, state in modules:
            if not isinstance(state.cache.keys, _GRIDS) or not isinstance(state.cache.values, _GRIDS):
                raise UnsupportedModelError(
                    f"the packed cache of {state.cache.module} holds integer grids only: leave kv_cache.grid out, or "
                    "set it to real_zero"
                )
        super().__init__(layers=[PackedLayer(state, state.cache.exact.at(module)) for module, state in modules])

    @property
    def nbytes(self) -> int:
        """The size of codes, scales, zero points and exact tokens of all layers in bytes."""
        return sum(layer.bytes for layer in self.layers)
