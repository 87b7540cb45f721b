"""The options of a quantization, as users give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gyroquant.registry import nearest
from gyroquant.system.worker_pool import Workers


@dataclass(frozen=True)
class OutputOptions:
    """How a quantization runs and what it writes.

    dense: write rounded weights as plain numbers of 16 or 32 bits. Default False: packed codes.
    overwrite: replace the destination once the new result is complete. Default False.
    device: where to compute: "cpu" (default), "cuda", ...
    save_dtype: dtype of the parameters that are not rounded: "auto" (default), "float16", "bfloat16", "float32".
    offload: a folder for activations while the model is quantized. Default None: they stay in memory.
    fresh: discard the journal of an interrupted run. Default False: continue that run.
    workers: processes that quantize blocks in parallel. Default None: one block after the other, in this process.
    """

    dense: bool = False
    overwrite: bool = False
    device: str = "cpu"
    save_dtype: str = "auto"
    offload: str | Path | None = None
    fresh: bool = False
    workers: Workers | None = None

    def changed(self, function: str, given: Mapping[str, Any]) -> OutputOptions:
        """These options with the keywords of a call. Raises TypeError for an unknown keyword."""
        known = [field.name for field in fields(self)]
        for name in given:
            if name not in known:
                raise TypeError(
                    f"{function}() got an unexpected keyword argument {name!r}; did you mean {nearest(name, known)!r}? "
                    f"The output options are {', '.join(known)}"
                )
        return replace(self, **given)


__all__ = ["OutputOptions"]
