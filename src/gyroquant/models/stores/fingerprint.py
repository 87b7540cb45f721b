"""The identity of a model, independent of its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from torch import Tensor

from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance

_EXCLUDED = ("_name_or_path", "transformers_version", "quantization_config", "dtype", "architectures")
_PIECE = 1 << 24  # values that are converted to fp32 at once


def fingerprint(
    store: WeightStore, progress: Advance = lambda: None, look: Callable[[str, Tensor], None] = lambda name, piece: None
) -> str:
    """The sha256 of a model's parameters and configuration. It does not depend on the file or its format.

    progress: called once for each parameter.
    look: called with the name of a parameter and each fp32 piece of it, as it is read.
    """
    total = hashlib.sha256()
    config = store.config.to_dict()
    for key in _EXCLUDED:
        config.pop(key, None)
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(store.shapes):
        tensor = store.read([name])[name]
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE].float().cpu()
            look(name, piece)
            total.update(piece.numpy().data)
        progress()
    return total.hexdigest()
