"""ONNX, for ONNX Runtime."""

from gyroquant.formats.onnx import runtime, writer

__all__ = ["runtime", "writer"]
