"""A GGUF file as our own reader opens it, run by transformers: instead of llama.cpp where that is not installed."""

from __future__ import annotations

from typing import Any, ClassVar

from gyroquant.export.gguf import FILE
from gyroquant.models.gguf import GgufStore
from gyroquant.runtimes.transformers import TransformersRuntime


class GgufRuntime(TransformersRuntime):
    """The model of a GGUF file in fp32, each tensor as the file holds it. transformers' own reader loses the scaling of
    RoPE, some biases and types.
    """

    formats: ClassVar[tuple[str, ...]] = ()
    title = "gyroquant's reader of GGUF"

    def _opened(self) -> Any:
        self._store = GgufStore(self.folder / FILE)
        return self._store.load()

    def tokenizer(self) -> Any:
        return self._store.tokenizer()
