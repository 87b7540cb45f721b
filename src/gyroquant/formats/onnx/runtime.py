"""The runtime ONNX Runtime, and the change to a graph that makes it compute in fp32 throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.onnx.layout import MODEL
from gyroquant.formats.runtime import Runtime


class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider."""

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
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.start()

    def start(self) -> None:
        self._length, self._past = 0, self._empty_cache(1)

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        """Keys and values of no tokens."""
        shapes = {tensor.name: tensor.shape for tensor in self._session.get_inputs()[3:]}
        return {
            name: self._value(torch.zeros(batch, heads, 0, size).numpy())
            for name, (_, heads, _, size) in shapes.items()
        }

    def feed(self, ids: Tensor) -> Tensor:
        before, self._length = self._length, self._length + ids.shape[1]
        mask = torch.ones(1, self._length, dtype=torch.long)
        return self._infer(ids, mask, torch.arange(before, self._length)[None])[0]

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self._past = self._empty_cache(len(ids))
        return self._infer(ids, mask, positions)

    def _infer(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        values = {name: self._value(tensor.numpy()) for name, tensor in inputs.items()}
        logits, *present = self._session.run_with_ort_values(self._outputs, values | self._past)
        self._past = dict(zip(self._past, present, strict=True))
        return torch.from_numpy(logits.numpy().copy())


def in_fp32(model: bytes) -> bytes:
    """The serialized graph with all products computed in fp32, for exact comparisons."""
    from onnx import ModelProto

    proto = ModelProto.FromString(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return proto.SerializeToString()
