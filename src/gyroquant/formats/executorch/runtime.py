"""ExecuTorch's model of a checkpoint, run by torch."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.runtime import Runtime


class ExecuTorchRuntime(Runtime):
    """ExecuTorch's model of a checkpoint, run by torch, with its KV cache. `export_llm` makes a program from it.

    By default, the inputs of rounded layers are rounded to 8 bits, with a scale for each token. With `exact`, they are
    not rounded: ExecuTorch's weight-only layers run. The weights are those of the checkpoint in both cases.
    """

    title = "ExecuTorch"
    unpadded = "its model reads one text at a time"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        try:
            from gyroquant.formats.executorch.loader import load_model

            with redirect_stdout(StringIO()):  # the loader prints
                self._model, self._capacity = load_model(folder, exact)
        except (ImportError, OSError) as error:
            raise InputError(
                f'ExecuTorch cannot open {folder}: {error}; install it with pip install "gyroquant[executorch]"'
            ) from error
        self.longest, self._length = self._capacity, 0

    def start(self) -> None:
        self._length = 0

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        if self._length + ids.shape[1] > self._capacity:
            raise InputError(
                f"{self.folder} is made for {self._capacity} tokens; give a shorter text, or raise "
                "export.max_context_length"
            )
        logits = self._model(ids, {"input_pos": torch.tensor([self._length])})
        self._length += ids.shape[1]
        return logits[0].float()
