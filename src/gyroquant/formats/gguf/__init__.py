"""GGUF, the format of llama.cpp."""

from gyroquant.formats.gguf import llama_cpp_runtime, writer

__all__ = ["llama_cpp_runtime", "writer"]
