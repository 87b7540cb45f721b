"""ExecuTorch's model of a checkpoint, run by torch."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.runtimes.base import Runtime


class ExecuTorchRuntime(Runtime):
    """ExecuTorch's model of a checkpoint, run by torch, with its KV cache: what `export_llm` makes a program of.

    By default what enters rounded layers is rounded to 8 bits a token; `exact` leaves it alone, by the layers that
    ExecuTorch has for programs that do. Weights are those of the checkpoint either way.
    """

    formats = ("executorch",)
    title = "ExecuTorch"
    unpadded = "its model reads one text"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        try:
            from gyroquant.runtimes.executorch_loader import load_model

            with redirect_stdout(StringIO()):  # the loader prints
                self._model, self._room = load_model(folder, exact)
        except (ImportError, OSError) as error:
            raise InputError(
                f'ExecuTorch does not open {folder} here: {error}; install it by pip install "gyroquant[executorch]"'
            ) from error
        self.longest, self._length = self._room, 0

    def start(self) -> None:
        self._length = 0

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        if self._length + ids.shape[1] > self._room:
            raise InputError(f"{self.folder} is made for {self._room} tokens (export.max_context_length), no more")
        logits = self._model(ids, {"input_pos": torch.tensor([self._length])})
        self._length += ids.shape[1]
        return logits[0].float()
