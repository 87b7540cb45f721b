"""The runtime ONNX Runtime, and the change to a graph that makes it compute in fp32 throughout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.onnx.layout import MODEL
from gyroquant.formats.runtime import Runtime

_TEXT = ("input_ids", "attention_mask", "position_ids")
_ROOM = 512  # tokens for which there is room at first


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
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._room, self._cache = 0, self._keys_and_values(1, 0)
        self.start()

    def start(self) -> None:
        self._length = 0

    def _keys_and_values(self, batch: int, room: int) -> list[Tensor]:
        """Room for the keys and values of so many tokens, zeros, in the order of the graph's inputs."""
        shapes = (tensor.shape for tensor in self._session.get_inputs()[len(_TEXT) :])
        return [torch.zeros(batch, heads, room, size) for _, heads, _, size in shapes]

    def _make_room(self) -> None:
        """Moves keys and values to larger buffers, if they have become too small for the text."""
        if self._length <= self._room:
            return
        self._room, before = max(_ROOM, 2 * self._room, self._length), self._cache
        self._cache = self._keys_and_values(1, self._room)
        for new, old in zip(self._cache, before, strict=True):
            new[:, :, : old.shape[2]] = old
        # Output and input are the same buffer: the runtime writes new keys and values into it and copies nothing.
        self._binding = self._session.io_binding()
        self._binding.bind_output(self._outputs[0])  # results come in the order in which they were bound
        for past, present, buffer in zip(self._inputs[len(_TEXT) :], self._outputs[1:], self._cache, strict=True):
            value = self._value(buffer.numpy())
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def feed(self, ids: Tensor) -> Tensor:
        before, self._length = self._length, self._length + ids.shape[1]
        self._make_room()
        mask, positions = torch.ones(1, self._length, dtype=torch.long), torch.arange(before, self._length)[None]
        text = [self._value(tensor.contiguous().numpy()) for tensor in (ids, mask, positions)]
        for name, value in zip(_TEXT, text, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output(self._outputs[0])
        self._session.run_with_iobinding(self._binding)
        return torch.from_numpy(self._binding.get_outputs()[0].numpy().copy())[0]

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        values = [*(ids, mask, positions), *self._keys_and_values(len(ids), 0)]
        named = {name: value.numpy() for name, value in zip(self._inputs, values, strict=True)}
        return torch.from_numpy(self._session.run(self._outputs[:1], named)[0])


def in_fp32(model: bytes) -> bytes:
    """The serialized graph with all products computed in fp32, for exact comparisons."""
    from onnx import ModelProto

    proto = ModelProto.FromString(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return proto.SerializeToString()
