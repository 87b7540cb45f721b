"""Lets transformers load the folders of gyroquant: ``AutoModelForCausalLM.from_pretrained(folder)`` after ``import
gyroquant``.

Rounded weights are decoded while they are loaded, into the modules of the original architecture. Online operations
(maps, rounding of activations and of the KV cache) are attached afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from gyroquant.errors import GyroquantError
from gyroquant.models.execution.online import attach
from gyroquant.models.stores.packed import attachments, decode
from gyroquant.models.stores.packed_description import MAPS, METHOD, PARTS, check_places, check_version
from gyroquant.system.checksums import check_files


class GyroquantConfig(QuantizationConfigMixin):
    """The description of a saved model as transformers keeps it; see `gyroquant.models.stores.packed`."""

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
        param = model.get_parameter(name)
        description = self.hf_quantizer.quantization_config.description
        self.hf_quantizer.decoded.add(name)
        return {target_patterns[0]: decode(description, name, arrays, tuple(param.shape)).to(param.dtype)}


class _Names(set[str]):
    """A set of names that all copies share: transformers copies a conversion for every parameter."""

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
        """Removes `IMPORT_FIRST` from the configuration, so that transformers finds the weights under their usual
        names. That entry stops loaders without gyroquant. No other hook gets the configuration before transformers
        looks for files.
        """
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return super().update_attn_implementation(config)

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": _Decode}

    def get_weight_conversions(self) -> list[Any]:
        """The conversions of the rounded parameters. Newer versions of transformers derive them from `serialized_names`
        and `get_load_operations`; older ones call this method.
        """
        return [WeightConverter(names, kind, [_Decode(self)]) for kind, names in self.serialized_names.items()]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        description = self.quantization_config.description
        check_version(description, "the saved model")
        files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        for file in files:
            check_files(file.parent, [file.name])
        self._online = attachments(description, files)
        _without_renaming(model)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            MAPS.replace(".", r"\."),
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        missing = [name for name in self.quantization_config.description["tensors"] if name not in self.decoded]
        if missing:
            raise GyroquantError(
                f"transformers {transformers.__version__} left {len(missing)} of the rounded parameters at random "
                f"numbers, such as {missing[0]}: open the folder with a version that gyroquant is "
                "tested with, 5.20 to 5.24"
            )
        model._weight_conversions = None  # decoding has no inverse; saving then uses the architecture's own conversions
        check_places(model, self._online, "the saved model")
        keep_online(model, self._online)
        return model

    def is_serializable(self) -> bool:
        return not self._online

    @property
    def is_trainable(self) -> bool:
        return False


def _without_renaming(model: Any) -> None:
    """Lets a model read its weights under the names of the model.

    While weights load, the model and the models in it pass as code of a user's own. Then transformers does not rename
    what it reads: some renamings for older checkpoints (of Laguna) would change our names too. This ends before
    transformers fills the buffers that no file holds, because it does not fill all of them for a user's own code.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        part.is_custom_code = lambda: True

    def initialize_weights() -> None:
        for part in parts:
            del part.is_custom_code
        del model.initialize_weights
        model.initialize_weights()

    model.initialize_weights = initialize_weights


def keep_online(model: Any, online: Any) -> None:
    """Attaches online operations to a model permanently. A plain checkpoint cannot hold them, so `save_pretrained` of
    the model raises GyroquantError afterwards.
    """
    online = tuple(online)
    if not online:
        return
    attach(model, online)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise GyroquantError(
            "this model runs maps or rounding online, and a plain checkpoint cannot hold them: save_pretrained would "
            "write another model. Copy the folder that gyroquant wrote instead"
        )

    model.save_pretrained = refuse


# The classes replace the placeholders of `transformers_hook`.
for table in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    table.pop(METHOD, None)
register_quantization_config(METHOD)(GyroquantConfig)
register_quantizer(METHOD)(GyroquantHfQuantizer)
