"""AutoRound's checkpoints: quant_method "auto-round". `packing_format` names the layout:

- `auto_round:auto_gptq`: GPTQ's first layout.
- `auto_round` and `auto_round:gptqmodel`: GPTQ's second layout (zero points unchanged).
- `auto_round:auto_awq`: AutoAWQ's layout.
- `auto_round:llm_compressor`, and MXFP4, MXFP8 and NVFP4 in any layout: the names of compressed-tensors.
- `auto_round:fp8` and `auto_round:fp8_static`: the names of fp8.

Layers may have other bits (`extra_config`). Their shapes determine them. Source: auto_round/inference/backend.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gyroquant.models.stores.prequantized.awq import Awq
from gyroquant.models.stores.prequantized.base import Decoded, Modules, PrequantizedFormat, Stored
from gyroquant.models.stores.prequantized.compressed_tensors import CompressedTensors
from gyroquant.models.stores.prequantized.fp8 import Fp8
from gyroquant.models.stores.prequantized.gptq import Gptq

_MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
_NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FLOATS = {"mx_fp": _MX, "mx_fp_rceil": _MX, "nv_fp": _NV, "nv_fp4_with_static_gs": _NV}


class AutoRound(PrequantizedFormat):
    """AutoRound's layouts, each decoded by the format with the same layout."""

    methods = ("auto-round", "intel/auto-round")

    @property
    def layout(self) -> str:
        return self._packing

    def check(self) -> None:
        settings = self.settings
        self._packing = str(settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq")
        if settings.get("rotation_config") or settings.get("transform_config"):
            raise self.refusal("with an online rotation, which plain weights cannot hold")
        self._decoder = self._decoder_of(self._packing, str(settings.get("data_type") or "int"))
        self.notes += self._decoder.notes
        bits = settings.get("act_bits")
        if isinstance(bits, int) and bits < 16 and not self._decoder.notes:
            self.notes.append(
                f"its runtime rounds inputs to {bits} bits ({settings.get('act_data_type')}); gyroquant does not"
            )

    def _decoder_of(self, packing: str, data: str) -> PrequantizedFormat:
        """The format that decodes this `packing_format` and `data_type`."""
        common: Mapping[str, Any] = {"quant_method": self.method, "group_size": self.settings.get("group_size", -1)}
        kind = packing.removeprefix("auto_round").removeprefix(":")
        if data.startswith("fp8") or kind in ("fp8", "fp8_static"):
            size = self.settings.get("weight_block_size")
            scheme = self.settings.get("activation_scheme")
            return Fp8({**common, "weight_block_size": size, "activation_scheme": scheme}, self.label)
        if data in _FLOATS:
            weights = _FLOATS[data] | {"num_bits": self.settings.get("bits", 4)}
            return CompressedTensors(
                {**common, "config_groups": {"all": {"weights": weights, "targets": ["Linear"]}}}, self.label
            )
        if data != "int":
            raise self.refusal(f"in {data}, which is not decoded")
        if kind in ("auto_awq", "awq"):
            return Awq(common, self.label)
        if kind in ("", "gptqmodel"):
            return Gptq({**common, "checkpoint_format": "gptq_v2"}, self.label)
        if kind in ("auto", "auto_gptq", "gptq", "gptq:exllamav2"):
            return Gptq({**common, "checkpoint_format": "gptq"}, self.label)
        raise self.refusal(f"in the layout {packing!r}, which is not decoded")

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        return self._decoder.take(stored, modules)
