"""Every format, registered by being imported."""

from gyroquant.export import compressed_tensors, dense, executorch, gguf, gptq, onnx, openvino

__all__ = ["compressed_tensors", "dense", "executorch", "gguf", "gptq", "onnx", "openvino"]
