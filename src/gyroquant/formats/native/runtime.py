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

_CACHES = ("past_key_values", "cache_params")


class TransformersRuntime(Runtime):
    """transformers, with the packages that it needs for a format. For the folders of gyroquant, that is gyroquant."""

    title = "transformers"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._model = self.open_model()
        self._takes_positions = "position_ids" in signature(self._model.forward).parameters
        self._cache = self._cache_name()  # without one, the model reads the whole text in each call
        self.start()

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

    @torch.no_grad()
    def _cache_name(self) -> str | None:
        """The name of the argument and result of the model that holds what it has read. None: it cannot continue."""
        ids = torch.zeros(1, 3, dtype=torch.long)
        for name in _CACHES:
            if name in signature(self._model.forward).parameters:
                try:
                    past = self._model(input_ids=ids[:, :2], use_cache=True).get(name)
                    if past is not None:
                        self._model(input_ids=ids[:, 2:], use_cache=True, **{name: past})
                        return name
                except Exception:  # models that cannot continue a text raise many kinds
                    continue
        return None

    def set_parameter(self, name: str, value: Tensor | None) -> None:
        """Gives a parameter other numbers. None: it keeps its own."""
        if value is not None:
            self._model.get_parameter(name).data.copy_(value)

    def start(self) -> None:
        self._past, self._read = None, torch.empty(1, 0, dtype=torch.long)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        if self._cache is None:
            self._read = torch.cat((self._read, ids), 1)
            return self._model(input_ids=self._read, use_cache=False).logits[0, -ids.shape[1] :].float()
        out = self._model(input_ids=ids, use_cache=True, **{self._cache: self._past})
        self._past = out[self._cache]
        return out.logits[0].float()

    @torch.no_grad()
    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        options = {"position_ids": positions} if self._takes_positions else {}
        return self._model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits.float()
