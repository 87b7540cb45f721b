"""Programs that run what we write, behind one face. One program a file; a format belongs to one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gyroquant.errors import InputError
from gyroquant.runtimes.base import Runtime
from gyroquant.runtimes.executorch import ExecuTorchRuntime
from gyroquant.runtimes.llama_cpp import LlamaCppRuntime
from gyroquant.runtimes.onnx import OnnxRuntime
from gyroquant.runtimes.openvino import OpenVinoRuntime
from gyroquant.runtimes.transformers import TransformersRuntime

__all__ = [
    "ExecuTorchRuntime",
    "LlamaCppRuntime",
    "OnnxRuntime",
    "OpenVinoRuntime",
    "Runtime",
    "TransformersRuntime",
    "open_runtime",
]


def open_runtime(format_name: str, folder: Path, exact: bool) -> Runtime:
    """The program that runs a format. Raises InputError when it is not installed or does not open the folder."""
    kind = Runtime.kinds.get(format_name)
    if kind is None:
        raise InputError(f"{folder}: no program runs {format_name!r}; known are {', '.join(sorted(Runtime.kinds))}")
    if kind.instead is not None and importlib.util.find_spec(kind.package) is None:
        kind = kind.instead
    return kind(folder, exact)
