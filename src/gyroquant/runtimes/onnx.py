"""ONNX Runtime, and how to have it compute in fp32 throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export.onnx import MODEL
from gyroquant.runtimes.base import Runtime


class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider."""

    formats = ("onnx",)
    title = "ONNX Runtime"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise InputError('ONNX Runtime is not installed: pip install "gyroquant[onnx]"') from error
        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        model = (folder / MODEL).read_bytes()
        self._session = ort.InferenceSession(in_fp32(model) if exact else model, settings, ["CPUExecutionProvider"])
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.start()

    def start(self) -> None:
        self._length, self._past = 0, self._nothing(1)

    def _nothing(self, batch: int) -> dict[str, Any]:
        """Keys and values of no tokens."""
        shapes = {one.name: one.shape for one in self._session.get_inputs()[3:]}
        return {
            name: self._value(torch.zeros(batch, heads, 0, size).numpy())
            for name, (_, heads, _, size) in shapes.items()
        }

    def feed(self, ids: Tensor) -> Tensor:
        before, self._length = self._length, self._length + ids.shape[1]
        mask = torch.ones(1, self._length, dtype=torch.long)
        return self._infer(ids, mask, torch.arange(before, self._length)[None])[0]

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self._past = self._nothing(len(ids))
        return self._infer(ids, mask, positions)

    def _infer(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given = {name: self._value(tensor.numpy()) for name, tensor in inputs.items()}
        logits, *present = self._session.run_with_ort_values(self._outputs, given | self._past)
        self._past = dict(zip(self._past, present, strict=True))
        return torch.from_numpy(logits.numpy().copy())


def in_fp32(model: bytes) -> bytes:
    """The graph with all products computed in fp32, to compare with."""
    from onnx import ModelProto

    found = ModelProto.FromString(model)
    for node in found.graph.node:
        for one in node.attribute:
            if one.name == "accuracy_level":
                one.i = 0
    return found.SerializeToString()
