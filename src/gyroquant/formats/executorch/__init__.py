"""ExecuTorch's format."""

from gyroquant.formats.executorch import runtime, writer

__all__ = ["runtime", "writer"]
