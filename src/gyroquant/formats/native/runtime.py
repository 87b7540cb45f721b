"""The runtime transformers, which reads several formats and our own folders."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.runtime import Runtime
from gyroquant.models.execution.runner import auto_class


class TransformersRuntime(Runtime):
    """transformers, with the packages that it needs for a format. For the folders of gyroquant, that is gyroquant."""

    title = "transformers"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._model = self.open_model()
        self._takes_positions = "position_ids" in signature(self._model.forward).parameters
        self._past: Any = None

    def open_model(self) -> Any:
        """The model of the folder as transformers runs it. Subclasses with another reader override this. Raises
        InputError if the model cannot be opened.
        """
        from transformers import AutoConfig

        options: dict[str, Any] = {"dtype": torch.float32 if self.exact else "auto", "trust_remote_code": False}
        options["use_safetensors"] = True  # never a pickle
        try:
            kind = auto_class(AutoConfig.from_pretrained(self.folder, trust_remote_code=False))
            return kind.from_pretrained(self.folder, **options).eval()
        except (OSError, ImportError, ValueError, KeyError) as error:
            raise InputError(f"transformers cannot open {self.folder}: {error}") from error

    def start(self) -> None:
        self._past = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        return out.logits[0].float()

    @torch.no_grad()
    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        options = {"position_ids": positions} if self._takes_positions else {}
        return self._model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits.float()
