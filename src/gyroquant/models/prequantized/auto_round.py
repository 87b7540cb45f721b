"""AutoRound's own checkpoints: quant_method "auto-round", one of several layouts by `packing_format`.

`auto_round:auto_gptq` is GPTQ's first layout, `auto_round` and `auto_round:gptqmodel` the second (zero points as they
are), `auto_round:auto_awq` AutoAWQ's; `auto_round:llm_compressor` and what holds MXFP4, MXFP8 and NVFP4 use the names
of compressed-tensors, `auto_round:fp8` and `fp8_static` those of fp8. Layers may have bits of their own
(`extra_config`), which their shapes tell. Source: auto_round/inference/backend.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gyroquant.models.prequantized.awq import Awq
from gyroquant.models.prequantized.base import Decoded, Format, Modules, Stored
from gyroquant.models.prequantized.compressed_tensors import CompressedTensors
from gyroquant.models.prequantized.fp8 import Fp8
from gyroquant.models.prequantized.gptq import Gptq

_MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
_NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FLOATS = {"mx_fp": _MX, "mx_fp_rceil": _MX, "nv_fp": _NV, "nv_fp4_with_static_gs": _NV}


class AutoRound(Format):
    """AutoRound's layouts, each as the format that it is like."""

    methods = ("auto-round", "intel/auto-round")

    @property
    def layout(self) -> str:
        return self._packing

    def check(self) -> None:
        settings = self.settings
        self._packing = str(settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq")
        if settings.get("rotation_config") or settings.get("transform_config"):
            raise self.refusal("with a rotation that runs with the model, which no plain weights hold")
        self._like = self._inner(self._packing, str(settings.get("data_type") or "int"))
        self.notes += self._like.notes
        bits = settings.get("act_bits")
        if isinstance(bits, int) and bits < 16 and not self._like.notes:
            self.notes.append(f"its runtime rounds inputs to {bits} bits ({settings.get('act_data_type')}); exact here")

    def _inner(self, packing: str, data: str) -> Format:
        inside: Mapping[str, Any] = {"quant_method": self.method, "group_size": self.settings.get("group_size", -1)}
        kind = packing.removeprefix("auto_round").removeprefix(":")
        if data.startswith("fp8") or kind in ("fp8", "fp8_static"):
            size = self.settings.get("weight_block_size")
            scheme = self.settings.get("activation_scheme")
            return Fp8({**inside, "weight_block_size": size, "activation_scheme": scheme}, self.label)
        if data in _FLOATS:
            weights = _FLOATS[data] | {"num_bits": self.settings.get("bits", 4)}
            return CompressedTensors(
                {**inside, "config_groups": {"all": {"weights": weights, "targets": ["Linear"]}}}, self.label
            )
        if data != "int":
            raise self.refusal(f"in {data}, which is not decoded")
        if kind in ("auto_awq", "awq"):
            return Awq(inside, self.label)
        if kind in ("", "gptqmodel"):
            return Gptq({**inside, "checkpoint_format": "gptq_v2"}, self.label)
        if kind in ("auto", "auto_gptq", "gptq", "gptq:exllamav2"):
            return Gptq({**inside, "checkpoint_format": "gptq"}, self.label)
        raise self.refusal(f"in the layout {packing!r}, which is not decoded")

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        return self._like.take(stored, modules)
