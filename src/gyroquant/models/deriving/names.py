"""Names of parameters in a block, with the numbers of experts replaced by '{e}'."""

from __future__ import annotations

from typing import Any

from torch import nn

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def numbered(model: Any, prefix: str, name: str) -> str:
    """The name without the prefix of its block; the number of an expert in a list of modules is '{e}'."""
    parts = name.removeprefix(prefix).split(".")
    module = model.get_submodule(prefix.rstrip(".")) if prefix else model
    lists = []
    for place, part in enumerate(parts):
        if isinstance(module, nn.ModuleList) and part.isdigit() and len(module) in expert_counts(model.config):
            lists.append(place)
        module = getattr(module, part, None) if isinstance(module, nn.Module) else None
    if len(lists) == 1:
        parts[lists[0]] = "{e}"
    return ".".join(parts)


def expert_counts(config: Any) -> set[int]:
    """The numbers of experts that a configuration states."""
    return {value for key in _EXPERTS if isinstance(value := getattr(config, key, None), int)}
