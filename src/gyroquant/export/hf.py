"""Lets transformers load what gyroquant saves: ``AutoModelForCausalLM.from_pretrained(folder)`` after ``import
gyroquant``.

Rounded weights are decoded while they are loaded, into the modules of the original architecture; what runs with them
(maps, rounding of activations and of the KV cache) is attached afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from gyroquant.errors import GyroquantError
from gyroquant.integrity import check_files
from gyroquant.models.description import check_places
from gyroquant.models.online import attach
from gyroquant.models.packed import MAPS, METHOD, PARTS, attachments, check_version, decode


class GyroquantConfig(QuantizationConfigMixin):
    """The description of a saved model as transformers keeps it; see `gyroquant.models.packed`."""

    def __init__(self, **description: Any):
        super().__init__(quant_method=METHOD)
        self.dequantize = True
        self.description = {"quant_method": METHOD} | description

    def to_dict(self) -> dict[str, Any]:
        return dict(self.description)


class _Decode(ConversionOps):
    """Turns the stored parts of one parameter into the parameter."""

    def __init__(self, hf_quantizer: HfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        arrays = {pattern.rpartition("_")[2]: value[0] for pattern, value in input_dict.items()}
        wanted = model.get_parameter(name)
        description = self.hf_quantizer.quantization_config.description
        self.hf_quantizer.decoded.add(name)
        return {target_patterns[0]: decode(description, name, arrays, tuple(wanted.shape)).to(wanted.dtype)}


class _Names(set[str]):
    """Names that are noted here from copies too: transformers copies a conversion for every parameter."""

    def __deepcopy__(self, memo: Any) -> _Names:
        return self


class GyroquantHfQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads a model."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **options: Any):
        super().__init__(quantization_config, **options)
        self.decoded = _Names()

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        kinds = {name.rpartition(".")[2] for name in self.quantization_config.description["tensors"]}
        return {kind: [f"{kind}_{part}" for part in PARTS] for kind in sorted(kinds)}

    def update_attn_implementation(self, config: Any) -> Any:
        """Lets transformers look for the weights under their usual names again, which `IMPORT_FIRST` keeps others from.
        No other hook is given the configuration before files are looked for.
        """
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return super().update_attn_implementation(config)

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": _Decode}

    def get_weight_conversions(self) -> list[Any]:
        """What newer versions of transformers make of the two above, and older ones ask for."""
        return [WeightConverter(names, kind, [_Decode(self)]) for kind, names in self.serialized_names.items()]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        description = self.quantization_config.description
        check_version(description, "the saved model")
        files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        for file in files:
            check_files(file.parent, [file.name])
        self._online = attachments(description, files)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            MAPS.replace(".", r"\."),
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        lost = [name for name in self.quantization_config.description["tensors"] if name not in self.decoded]
        if lost:
            raise GyroquantError(
                f"transformers {transformers.__version__} left {len(lost)} of the rounded parameters at random "
                f"numbers, {lost[0]} for one: open the folder with a version that gyroquant is "
                "tested with, 5.20 to 5.24"
            )
        model._weight_conversions = None  # saving finds the architecture's own again; decoding has no way back
        check_places(model, self._online, "the saved model")
        keep_online(model, self._online)
        return model

    def is_serializable(self) -> bool:
        return not self._online

    @property
    def is_trainable(self) -> bool:
        return False


def keep_online(model: Any, online: Any) -> None:
    """Attaches what runs with a model for good. A plain checkpoint could not hold it, so saving the model is refused
    from then on.
    """
    online = tuple(online)
    if not online:
        return
    attach(model, online)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise GyroquantError(
            "this model runs maps or rounding online that a plain checkpoint cannot hold: what save_pretrained writes "
            "would be another model. Copy the folder that gyroquant wrote instead"
        )

    model.save_pretrained = refuse


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(GyroquantConfig)
    register_quantizer(METHOD)(GyroquantHfQuantizer)
