"""The runtime OpenVINO, and the settings with which it computes in fp32 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.openvino.layout import MODEL
from gyroquant.formats.runtime import Runtime


class OpenVinoRuntime(Runtime):
    """OpenVINO's CPU plugin, or another of its devices."""

    title = "OpenVINO"

    def __init__(self, folder: Path, exact: bool, device: str = "CPU"):
        super().__init__(folder, exact)
        try:
            import openvino as ov
        except ImportError as error:
            raise InputError('OpenVINO is not installed: pip install "gyroquant[openvino]"') from error
        core = ov.Core()
        if device not in core.available_devices:
            raise InputError(f"OpenVINO has no device {device} here; use one of {', '.join(core.available_devices)}")
        settings = exact_settings() if exact and device == "CPU" else {}
        self._request = core.compile_model(str(folder / MODEL), device, settings).create_infer_request()
        self._length = 0

    @classmethod
    def on_devices(cls, folder: Path) -> Iterator[tuple[str, Runtime]]:
        import openvino as ov

        core = ov.Core()
        for device in core.available_devices:
            yield f"{device}, {core.get_property(device, 'FULL_DEVICE_NAME')}", cls(folder, False, device)

    def start(self) -> None:
        self._request.reset_state()
        self._length = 0

    def feed(self, ids: Tensor) -> Tensor:
        self._length += ids.shape[1]
        return infer(self._request, ids, torch.ones(1, self._length, dtype=torch.long))[0]

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self.start()
        return infer(self._request, ids, mask)


def infer(request: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of new tokens, (batch, new, words), by an inference request that keeps its state.

    ids: the new tokens, (batch, new).
    mask: 1 for tokens and 0 for padding, for all tokens so far, (batch, all).
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs["beam_idx"] = torch.arange(len(ids), dtype=torch.int32)
    request.infer({name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(request.get_tensor("logits").data.copy()).float()


def exact_settings() -> dict[str, str]:
    """The settings with which the CPU plugin computes in fp32 throughout, for exact comparisons."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
