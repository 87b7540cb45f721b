"""A GGUF file, opened by our own reader and run by transformers. It replaces llama.cpp if that is not installed."""

from __future__ import annotations

from typing import Any

from gyroquant.formats.gguf.header import GGUF_FILE
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.models.stores.gguf.store import GgufStore


class GgufRuntime(TransformersRuntime):
    """The model of a GGUF file in fp32, with every tensor as in the file. transformers' own reader does not read the
    scaling of RoPE, some biases and some types.
    """

    title = "gyroquant's reader of GGUF"

    def open_model(self) -> Any:
        self._store = GgufStore(self.folder / GGUF_FILE)
        return self._store.load()

    def tokenizer(self) -> Any:
        return self._store.tokenizer()
