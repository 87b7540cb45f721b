"""Names of parameters in a block, with the numbers of experts replaced by '{e}'."""

from __future__ import annotations

from typing import Any

from torch import nn


def numbered(model: Any, prefix: str, name: str) -> str:
    """The name without the prefix of its block; the number of a module in a list is '{e}', if there is one list."""
    parts = name.removeprefix(prefix).split(".")
    module = model.get_submodule(prefix.rstrip(".")) if prefix else model
    lists = []
    for place, part in enumerate(parts):
        if isinstance(module, nn.ModuleList) and part.isdigit():
            lists.append(place)
        module = getattr(module, part, None) if isinstance(module, nn.Module) else None
    if len(lists) == 1:
        parts[lists[0]] = "{e}"
    return ".".join(parts)
