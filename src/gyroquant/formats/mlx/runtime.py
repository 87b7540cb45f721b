"""mlx-lm, which runs MLX's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.runtime import Runtime


class MlxRuntime(Runtime):
    """mlx-lm. On processors without Metal it always runs in fp32: there, MLX sums the products of rounded layers in the
    type of the activations, and sums of thousands of products in 16 bits are off by several percent.
    """

    title = "MLX"
    unpadded = "mlx-lm runs one text at a time"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        try:
            import mlx.core as mx
            from mlx_lm.models.cache import make_prompt_cache
            from mlx_lm.utils import load_model
        except (ImportError, OSError) as error:
            raise InputError(f'MLX cannot be loaded: {error}; install it with pip install "gyroquant[mlx]"') from error
        try:
            self._model, _ = load_model(folder)
        except Exception as error:  # mlx-lm raises many kinds
            raise InputError(f"mlx-lm cannot open {folder}: {error}") from error
        if exact or not mx.metal.is_available():
            self._model.set_dtype(mx.float32)
        self._mx, self._new_cache = mx, make_prompt_cache
        self.start()

    def start(self) -> None:
        self._cache: Any = self._new_cache(self._model)

    def feed(self, ids: Tensor) -> Tensor:
        logits = self._model(self._mx.array(ids.numpy()), cache=self._cache)[0].astype(self._mx.float32)
        return torch.from_numpy(np.array(logits))
