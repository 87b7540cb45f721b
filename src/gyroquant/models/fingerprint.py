"""Which model it is, whatever file it lies in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from torch import Tensor

from gyroquant.models.store import WeightStore
from gyroquant.progress import Advance

_ELSEWHERE = ("_name_or_path", "transformers_version", "quantization_config", "dtype", "architectures")
_VALUES = 1 << 24  # that are made fp32 at once


def fingerprint(
    store: WeightStore, progress: Advance = lambda: None, look: Callable[[str, Tensor], None] = lambda name, piece: None
) -> str:
    """sha256 of a model: of its parameters, whatever file they lie in, and of its configuration. Reports progress once
    a parameter; `look` is shown every piece of each as it is read, fp32.
    """
    total = hashlib.sha256()
    config = store.config.to_dict()
    for key in _ELSEWHERE:
        config.pop(key, None)
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(store.shapes):
        tensor = store.read([name])[name]
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for start in range(0, len(flat), _VALUES):
            piece = flat[start : start + _VALUES].float().cpu()
            look(name, piece)
            total.update(piece.numpy().data)
        progress()
    return total.hexdigest()
