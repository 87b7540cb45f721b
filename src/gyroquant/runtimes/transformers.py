"""transformers, which reads several formats and our own folders."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.runner import auto_class
from gyroquant.runtimes.base import Runtime


class TransformersRuntime(Runtime):
    """transformers, with whatever it needs for a format; with gyroquant for the folders that gyroquant wrote."""

    formats: ClassVar[tuple[str, ...]] = ("dense", "compressed-tensors", "gptq")
    title = "transformers"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._model = self._opened()
        self._takes_positions = "position_ids" in signature(self._model.forward).parameters
        self._past: Any = None

    def _opened(self) -> Any:
        """The model, ready to run. Raises InputError where it cannot be opened."""
        from transformers import AutoConfig

        options: dict[str, Any] = {"dtype": torch.float32 if self.exact else "auto", "trust_remote_code": False}
        options["use_safetensors"] = True  # never a pickle
        try:
            kind = auto_class(AutoConfig.from_pretrained(self.folder, trust_remote_code=False))
            return kind.from_pretrained(self.folder, **options).eval()
        except (OSError, ImportError, ValueError, KeyError) as error:
            raise InputError(f"transformers does not open {self.folder} here: {error}") from error

    def start(self) -> None:
        self._past = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        return out.logits[0].float()

    @torch.no_grad()
    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        given = {"position_ids": positions} if self._takes_positions else {}
        return self._model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits.float()
