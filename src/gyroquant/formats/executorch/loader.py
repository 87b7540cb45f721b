"""Loads a checkpoint with ExecuTorch's own loader, as a model that torch runs. Importing this needs executorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers llama.fast_hadamard_transform)
import torch
from executorch.examples.models.llama.model import Llama2Model
from executorch.examples.models.llama.source_transformation.pre_quantization import (
    transform_linear_for_pre_quantization,
)
from executorch.examples.models.llama.source_transformation.spin_quant import (
    inject_fast_hadamard_transform_native_for_spin_quant,
)
from executorch.extension.llm.export.config.llm_config import LlmConfig
from omegaconf import OmegaConf

from gyroquant.formats.executorch.layout import CHECKPOINT, PARAMS, SETTINGS


class _WeightOnly(Llama2Model):
    """The loader, with ExecuTorch's weight-only layers, which do not round their inputs."""

    model_: Any

    def _transform_for_pre_quantization(self, checkpoint: Any, model_args: Any) -> None:
        group = model_args.quantization_args["group_size"]
        self.model_ = transform_linear_for_pre_quantization(
            self.model_, checkpoint, group, torch.float32, weight_only=True
        )


def load_model(folder: Path, exact: bool) -> tuple[Any, int]:
    """The model that the settings in a folder describe, which returns logits of every token, and the largest number of
    tokens that it accepts. With `exact`, the inputs of rounded layers are not rounded.
    """
    settings = OmegaConf.merge(OmegaConf.structured(LlmConfig), OmegaConf.load(folder / SETTINGS))
    config: Any = OmegaConf.to_object(settings)
    config.base.checkpoint, config.base.params = str(folder / CHECKPOINT), str(folder / PARAMS)
    config.model.use_sdpa_with_kv_cache = False  # an operator that only exported programs have
    config.debug.generate_full_logits = True
    model = (_WeightOnly if exact else Llama2Model)(llm_config=config).get_eager_model()
    if config.quantization.use_spin_quant:
        model = inject_fast_hadamard_transform_native_for_spin_quant(model)
    return model.to(torch.float32).eval(), config.export.max_context_length
