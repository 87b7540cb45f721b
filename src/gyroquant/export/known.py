"""Every format, registered by being imported."""

from gyroquant.export import compressed_tensors, dense, executorch, gguf, gptq, openvino

__all__ = ["compressed_tensors", "dense", "executorch", "gguf", "gptq", "openvino"]
