"""What a runtime pays for a result: tokens a second of our own folder in transformers, beside those of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.evaluation.speed import generation_rates
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.stores.base import WeightStore, checked_skeleton
from gyroquant.models.stores.source import open_model
from gyroquant.system.environment import available_memory, size

RUNTIME = "transformers, fp32"
"""The runtime in which results are measured. Our folders are decoded when they are opened, so that what remains of
their cost are the maps that run with the model.
"""
_PROMPT, _TOKENS = 64, 32
_BYTES = 4 * 2.5  # of a weight, for the two models in fp32 and what opening them takes


class _Original(TransformersRuntime):
    """The original as transformers runs it in fp32."""

    def __init__(self, store: WeightStore):
        self._store = store
        super().__init__(Path(), exact=True)

    def open_model(self) -> Any:
        store = self._store
        model = checked_skeleton(store.config, store.label)
        weights = {name: tensor.float() for name, tensor in store.read(store.shapes).items()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        return model.eval()


def writing_speed(folder: Path, original: WeightStore, tokens: Tensor) -> dict[str, Any]:
    """The tokens a second that a folder of ours writes in transformers, and those of the original, measured in turns.

    tokens: calibration windows, shape (samples, length); the first begins the text.

    - runtime: RUNTIME.
    - decode_tokens_per_second, prefill_tokens_per_second: of the folder.
    - original_decode_tokens_per_second: of the original, in the same process.
    - online_maps: the number of maps that run with the model.
    - prompt, written: tokens read and written.

    Raises InputError if the memory does not hold both models in fp32, or transformers cannot open one.
    """
    needed, free = original.weights * _BYTES, available_memory()
    if needed > free:
        raise InputError(f"two models in fp32 take {size(needed)}, and {size(free)} of memory are free")
    prompt, written = tokens[0, :_PROMPT], _TOKENS
    longest = getattr(original.text_config, "max_position_embeddings", None)
    if longest is not None:
        prompt = prompt[: max(1, longest - written)]
    ours, theirs = generation_rates([TransformersRuntime(folder, exact=True), _Original(original)], prompt, written)
    return {
        "runtime": RUNTIME,
        **ours,
        "original_decode_tokens_per_second": theirs["decode_tokens_per_second"],
        "online_maps": sum(isinstance(op, OnlineMap) for op in open_model(folder).online),
        "prompt": len(prompt),
        "written": written,
    }


__all__ = ["RUNTIME", "writing_speed"]
