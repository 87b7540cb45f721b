"""A KV cache that holds packed codes, for ``model.generate(..., past_key_values=PackedKVCache(model))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from gyroquant.errors import UnsupportedModelError
from gyroquant.grids import Grid, GroupParams, IntegerGrid
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.models.execution.online import AttentionState, mark_ready


@dataclass
class _Rows:
    """Rounded vectors of shape (batch, heads, length, n). Each is packed separately, so that more can be appended."""

    grid: Grid
    n: int
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    middle: float = 0.0  # the zero point, if the grid does not store one

    def append(self, x: Tensor) -> None:
        groups = x.float().unflatten(-1, (-1, self.grid.group_of(self.n)))
        params = self.grid.fit(groups)
        codes = pack(self.grid.encode(groups, params), self.grid.bits).view(*x.shape[:-1], -1).to(x.device)
        new = {"codes": codes, "scale": params.scale.squeeze(-1).half()}
        if not getattr(self.grid, "symmetric", True):
            new["zero"] = params.zero.squeeze(-1).to(torch.uint8)
        else:
            self.middle = float(params.zero.flatten()[0])
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, value if old is None else torch.cat([old, value], dim=2))

    def decode(self, dtype: torch.dtype) -> Tensor:
        assert self.codes is not None
        assert self.scale is not None
        shape = (*self.codes.shape[:-1], self.scale.shape[-1], self.n // self.scale.shape[-1])
        codes = unpack(self.codes.reshape(-1), self.grid.bits, shape).to(self.codes.device)
        scale = self.scale.float().unsqueeze(-1)
        zero = torch.full_like(scale, self.middle) if self.zero is None else self.zero.float().unsqueeze(-1)
        return self.grid.decode(codes, GroupParams(scale, zero)).flatten(-2).to(dtype)

    def change(self, function: Any) -> None:
        for name in ("codes", "scale", "zero"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    @property
    def bytes(self) -> int:
        parts = (self.codes, self.scale, self.zero)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class PackedLayer(CacheLayerMixin):
    """The keys and values of one attention module as codes and scales.

    Keys are rotated (R3) before they are rounded. They are marked, so that the attention function does neither again.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, state: AttentionState) -> None:
        super().__init__()
        self._state = state
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self._state.cache is not None
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = _Rows(self._state.cache.keys, key_states.shape[-1])
        self._values = _Rows(self._state.cache.values, value_states.shape[-1])
        self._length = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values of shape (batch, kv heads, length, head_dim). Returns all of them, decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._state.cache is not None
        mean = self._state.cache.key_mean
        offset = None if mean is None else mean[:, None].to(key_states)
        keys = self._state.keys(key_states)
        self._keys.append(keys if offset is None else keys - offset)
        self._values.append(value_states)
        self._length += key_states.shape[-2]
        decoded = self._keys.decode(self.dtype)
        return mark_ready(decoded if offset is None else decoded + offset), self._values.decode(self.dtype)

    @property
    def bytes(self) -> int:
        """The size of the codes and scales in bytes."""
        return self._keys.bytes + self._values.bytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def _change(self, function: Any) -> None:
        if self.is_initialized:
            self._keys.change(function)
            self._values.change(function)

    def reset(self) -> None:
        self.is_initialized, self._length = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens. transformers passes a negative number."""
        if tokens_to_remove < 0:
            self._length += tokens_to_remove
            self._change(lambda t: t[:, :, : self._length])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])


class PackedKVCache(Cache):
    """The KV cache of a loaded model whose recipe has a `kv_cache` section, as packed codes.

    It gives the same tokens as the model's default cache, which keeps unrounded keys and values and rounds them at
    every read. Layers with a sliding window keep all tokens too. Raises UnsupportedModelError for a model without such
    a section, and for grids that are not integer grids.
    """

    def __init__(self, model: nn.Module):
        states = [m.__dict__["_gyroquant_attention"] for m in model.modules() if "_gyroquant_attention" in m.__dict__]
        states = [state for state in states if state.cache is not None]
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        if len(states) != config.num_hidden_layers:
            raise UnsupportedModelError(
                "this model does not round its KV cache: quantize it with kv_cache.bits=4 (or a recipe such as "
                "quarot-w4a4kv4) and load it with gyroquant imported"
            )
        for state in states:
            if not isinstance(state.cache.keys, IntegerGrid) or not isinstance(state.cache.values, IntegerGrid):
                raise UnsupportedModelError(
                    f"the packed cache of {state.cache.module} holds integer grids only; leave kv_cache.grid out"
                )
        super().__init__(layers=[PackedLayer(state) for state in states])

    @property
    def nbytes(self) -> int:
        """The size of the codes and scales of all layers in bytes."""
        return sum(layer.bytes for layer in self.layers)
