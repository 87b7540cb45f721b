"""The settings of a GGUF file's architecture. Every setting must be used, or must be known to have no effect."""

from __future__ import annotations

from math import isclose
from typing import Any

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.check import StringArray
from gyroquant.models.stores.gguf.file import GgufFile

# Settings without an effect on what the described architectures compute.
_HARMLESS = (
    "vocab_size",  # the embedding decides
    "tensor_data_layout",
    "rope.scaling.finetuned",  # only Granite reads it
    "expert_shared_count",
    "interleave_moe_layer_step",
)
# Settings that llama.cpp reads only for some architectures, with the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.value_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "router_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_shared_feed_forward_length": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.alpha": (0, 1),
    "n_deepstack_layers": (0,),
    "use_parallel_residual": (True,),
}


class Settings:
    """The metadata of a file's architecture by key, without the architecture's name."""

    def __init__(self, file: GgufFile):
        self.path, self.architecture = file.path, file.architecture
        self._values, self._used = file.settings(), set[str]()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a setting, which is then marked as used.

        A list of equal numbers, one for each layer, counts as one number. Raises InputError if the numbers differ.
        """
        self._used.add(key)
        value = self._values.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise InputError(
                f"{self.path}: {self._name(key)} differs from layer to layer ({value[:8]}), but {self.architecture} "
                "is only described with equal layers: start from the model in safetensors"
            )
        return value[0]

    def layers(self, key: str) -> Any:
        """The unchanged value of a setting: a list if there is one number for each layer. Marks it as used."""
        self._used.add(key)
        return self._values.get(key)

    def need(self, key: str) -> Any:
        """As `take`, but raises InputError if the setting is missing."""
        value = self.take(key)
        if value is None:
            raise InputError(f"{self.path} lacks {self._name(key)}, which llama.cpp needs: convert the model again")
        return value

    def ignore(self, key: str, *neutral: Any) -> None:
        """Marks a setting as used that llama.cpp does not read. Raises InputError for a value that is not neutral."""
        self._used.add(key)
        value = self._values.get(key)
        if value is None:
            return
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (str, StringArray)) or not any(
                isclose(number, harmless, rel_tol=1e-3) for harmless in neutral
            ):
                raise InputError(
                    f"{self.path} states {self._name(key)} is {_short(number)}, which llama.cpp does not read for the "
                    f"architecture {self.architecture}, so that llama.cpp would run another model: start from the "
                    "model in safetensors"
                )

    def finish(self) -> None:
        """Raises InputError for an unused setting that may change what the model computes."""
        for key in self._values:
            if key in self._used or key in _HARMLESS:
                continue
            if key not in _NEUTRAL:
                raise InputError(
                    f"{self.path} states {self._name(key)} is {_short(self._values[key])}, which is not described for "
                    f"the architecture {self.architecture} and may change what it computes: start from the model in "
                    "safetensors"
                )
            self.ignore(key, *_NEUTRAL[key])

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
