"""The settings of a GGUF file's architecture, each of which has to be used, or known to change nothing."""

from __future__ import annotations

from math import isclose
from typing import Any

from gyroquant.errors import InputError
from gyroquant.models.gguf_check import StringArray
from gyroquant.models.gguf_file import GgufFile

# Settings without an influence on what a model of the described architectures computes.
_HARMLESS = (
    "vocab_size",  # what counts is the embedding
    "tensor_data_layout",
    "rope.scaling.finetuned",  # Granite reads it, the others do not
    "expert_shared_count",
    "interleave_moe_layer_step",
)
# Settings that llama.cpp reads for some architectures only, with the values by which they change nothing.
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
        """The value of a setting, which is used thereby; a list of equal numbers, one a layer, counts as the number.

        Raises InputError for different numbers: these layers are not all alike.
        """
        self._used.add(key)
        value = self._values.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise InputError(
                f"{self.path}: {self._name(key)} differs from layer to layer ({value[:8]}), and layers alike "
                f"are all that {self.architecture} is described with"
            )
        return value[0]

    def layers(self, key: str) -> Any:
        """The value of a setting as it is, a list where there is one number a layer."""
        self._used.add(key)
        return self._values.get(key)

    def need(self, key: str) -> Any:
        """As `take`. Raises InputError where the setting is missing."""
        value = self.take(key)
        if value is None:
            raise InputError(f"{self.path} does not say {self._name(key)}, which llama.cpp needs: make the file anew")
        return value

    def ignore(self, key: str, *neutral: Any) -> None:
        """Uses a setting that llama.cpp does not read here. Raises InputError for a value that is not neutral."""
        self._used.add(key)
        value = self._values.get(key)
        if value is None:
            return
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (str, StringArray)) or not any(isclose(one, good, rel_tol=1e-3) for good in neutral):
                raise InputError(
                    f"{self.path} says {self._name(key)} is {_short(one)}, which llama.cpp does not read for the "
                    f"architecture {self.architecture}: what the file says and what llama.cpp runs are two models"
                )

    def finish(self) -> None:
        """Raises InputError for a setting that nothing has used and that may change what the model computes."""
        for key in self._values:
            if key in self._used or key in _HARMLESS:
                continue
            if key not in _NEUTRAL:
                raise InputError(
                    f"{self.path} says {self._name(key)} is {_short(self._values[key])}, which is not described for "
                    f"the architecture {self.architecture} and may change what it computes"
                )
            self.ignore(key, *_NEUTRAL[key])

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
