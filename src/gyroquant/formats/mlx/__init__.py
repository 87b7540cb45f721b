"""MLX's format."""

from gyroquant.formats.mlx import runtime, writer

__all__ = ["runtime", "writer"]
