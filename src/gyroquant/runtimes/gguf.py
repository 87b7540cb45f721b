"""A GGUF file as our own reader opens it, run by transformers: instead of llama.cpp where that is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.export.gguf import FILE
from gyroquant.models.gguf import GgufStore
from gyroquant.runtimes.base import Runtime


class GgufRuntime(Runtime):
    """The model of a GGUF file in fp32, each tensor as the file holds it. transformers' own reader loses the scaling of
    RoPE, some biases and types.
    """

    formats = ()
    title = "gyroquant's reader of GGUF"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._store = GgufStore(folder / FILE)
        self._model: Any = self._store.load()
        self._past: Any = None

    def tokenizer(self) -> Any:
        return self._store.tokenizer()

    def start(self) -> None:
        self._past = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        return out.logits[0].float()
