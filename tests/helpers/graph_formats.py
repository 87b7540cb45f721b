"""The formats that are graphs of our own, as the tests of what they have in common run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import saved_models
import torch

Build = Callable[[Any, Any], Any]


def saved(model: Any, folder: Path, transform: dict[str, Any] | None = None, **weights: Any) -> Path:
    """The folder of a tiny model rounded to nearest, asymmetric."""
    return saved_models.rounded(model, folder, transform, **{"symmetric": False} | weights).folder


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same but for the order of sums."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


class GraphFormat(ABC):
    """One format, with the package that runs it."""

    name: str
    package: str

    @abstractmethod
    def compute(self, build: Build, x: torch.Tensor) -> torch.Tensor:
        """Runs what `build` makes of a format's operations and an input, exactly."""

    @abstractmethod
    def padded(self, folder: Path, ids: torch.Tensor, mask: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """The logits of a batch read at once, exactly."""

    @abstractmethod
    def script(self, folder: Path, ids: torch.Tensor) -> str:
        """Lines that print the last logits of one sequence, without gyroquant."""

    @abstractmethod
    def dtypes(self, folder: Path, shape: list[int]) -> set[str]:
        """The dtypes, as torch calls them, of what is stored of a shape."""


class OpenVinoGraphs(GraphFormat):
    """OpenVINO IR."""

    name = package = "openvino"

    def compute(self, build: Build, x: torch.Tensor) -> torch.Tensor:
        import openvino as ov

        from gyroquant.formats.openvino.operations import OpenVinoOperations
        from gyroquant.formats.openvino.runtime import exact_settings

        given = ov.opset13.parameter([*[-1] * (x.dim() - 1), x.shape[-1]], x.numpy().dtype)
        made = ov.opset13.multiply(build(OpenVinoOperations(), given), np.float32(1))
        return torch.from_numpy(
            ov.Core().compile_model(ov.Model([made], [given]), "CPU", exact_settings())(x.numpy())[0]
        )

    def padded(self, folder: Path, ids: torch.Tensor, mask: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        import openvino as ov

        from gyroquant.formats.openvino.runtime import exact_settings

        feed = {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions}
        feed["beam_idx"] = np.arange(len(ids), dtype=np.int32)
        request = ov.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", exact_settings())
        return torch.from_numpy(request.create_infer_request().infer(feed)[0])

    def script(self, folder: Path, ids: torch.Tensor) -> str:
        from gyroquant.formats.openvino.runtime import exact_settings

        return f"""
import numpy as np, openvino as ov
r = ov.Core().compile_model({str(folder / "openvino_model.xml")!r}, "CPU", {exact_settings()!r}).create_infer_request()
r.infer({{"input_ids": np.array({ids.tolist()}), "attention_mask": np.ones({list(ids.shape)}, np.int64),
    "position_ids": np.arange({ids.shape[1]})[None], "beam_idx": np.zeros(1, np.int32)}})
print(*r.get_tensor("logits").data[0, -1])
"""

    def dtypes(self, folder: Path, shape: list[int]) -> set[str]:
        import openvino as ov

        graph = ov.Core().read_model(str(folder / "openvino_model.xml"))
        names = {ov.Type.f16: "float16", ov.Type.bf16: "bfloat16", ov.Type.f32: "float32"}
        stored = [op for op in graph.get_ops() if op.get_type_name() == "Constant"]
        return {names[op.get_element_type()] for op in stored if list(op.get_output_partial_shape(0)) == shape}


class OnnxGraphs(GraphFormat):
    """ONNX, run by ONNX Runtime."""

    name, package = "onnx", "onnxruntime"

    def compute(self, build: Build, x: torch.Tensor) -> torch.Tensor:
        import onnxruntime as ort
        from onnx import TensorProto, helper

        from gyroquant.formats.onnx.decoder import OPSETS
        from gyroquant.formats.onnx.operations import OnnxOperations, Value
        from gyroquant.formats.onnx.runtime import in_fp32

        ops = OnnxOperations()
        made = ops.add(build(ops, Value("x", x.dim())), ops.scalar(0.0))
        sizes: list[str | int] = [f"d{i}" for i in range(x.dim() - 1)]
        kind = TensorProto.FLOAT if x.is_floating_point() else TensorProto.INT64
        given = helper.make_tensor_value_info("x", kind, [*sizes, x.shape[-1]])
        out = helper.make_tensor_value_info(made.name, TensorProto.FLOAT, None)
        graph = helper.make_graph(ops.nodes, "test", [given], [out], ops.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid(*one) for one in OPSETS.items()], ir_version=11
        )
        session = ort.InferenceSession(in_fp32(model.SerializeToString()), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    def padded(self, folder: Path, ids: torch.Tensor, mask: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        from gyroquant.formats.onnx.runtime import OnnxRuntime

        session = OnnxRuntime(folder, exact=True)._session
        feed = {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions}
        for one in session.get_inputs()[3:]:
            feed[one.name] = np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32)
        return torch.from_numpy(session.run(["logits"], feed)[0])

    def script(self, folder: Path, ids: torch.Tensor) -> str:
        return f"""
import numpy as np, onnx, onnxruntime as ort
m = onnx.load({str(folder / "model.onnx")!r})
for a in (a for n in m.graph.node for a in n.attribute if a.name == "accuracy_level"): a.i = 0
s = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
feed = {{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in s.get_inputs()[3:]}}
feed |= {{"input_ids": np.array({ids.tolist()}), "attention_mask": np.ones({list(ids.shape)}, np.int64),
    "position_ids": np.arange({ids.shape[1]})[None]}}
print(*s.run(["logits"], feed)[0][0, -1])
"""

    def dtypes(self, folder: Path, shape: list[int]) -> set[str]:
        import onnx

        graph = onnx.load(folder / "model.onnx").graph
        names = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
        stored = [one for one in graph.initializer if list(one.dims) == shape]
        return {names.get(one.data_type, "float32") for one in stored}


GRAPH_FORMATS = {one.name: one for one in (OpenVinoGraphs(), OnnxGraphs())}
