"""OpenVINO's format."""

from gyroquant.formats.openvino import runtime, writer

__all__ = ["runtime", "writer"]
