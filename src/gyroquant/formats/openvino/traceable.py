"""Whether an architecture can be a traced graph: its cache has keys and values only. Does not need OpenVINO."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from gyroquant.errors import UnsupportedModelError

CachedSizes = tuple[tuple[int, int], ...]
"""The heads and the width of the keys of a layer, then those of its values. Empty for a layer without a cache."""


@torch.no_grad()
def cached_sizes(model: Any) -> list[CachedSizes]:
    """What each layer of the cache of a model holds.

    Raises UnsupportedModelError if a layer holds something other than keys and values, or if there is no cache.
    """
    model_type = model.config.model_type
    out = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(out, "past_key_values", None), "layers", None)
    if layers is None:
        raise UnsupportedModelError(f"{model_type} has no cache of keys and values")
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            raise UnsupportedModelError(f"the cache of {model_type} has recurrent states, not only keys and values")
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedModelError(
                f"the cache of {model_type} has more than keys and values ({type(layer).__name__})"
            )
    return [_sizes(layer) for layer in layers]


def _sizes(layer: Any) -> CachedSizes:
    if getattr(layer, "keys", None) is None:
        return ()
    return tuple((x.shape[1], x.shape[3]) for x in (layer.keys, layer.values))
