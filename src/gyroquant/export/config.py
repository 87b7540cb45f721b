"""config.json as other programs and other versions of transformers read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

# Where an architecture's older name for a setting is not the usual one.
_OLDER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def write_config(config: Any, folder: Path, **more: Any) -> None:
    """Writes config.json as transformers does, with RoPE's settings in both places (see `older_rope_names`) and with
    `more`.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data |= older_rope_names(config, data) | more
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_rope_names(config: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings under the names that transformers 4 had for them; `data` is what config.json holds without them.

    transformers 5 keeps them as `rope_parameters`. transformers 4 and, for most architectures, mlx-lm look for
    `rope_theta`, `rope_scaling`, `partial_rotary_factor` and, where layers differ, `rope_local_base_freq` at the top,
    and take defaults of their own where these are missing. transformers 5 reads both, `rope_scaling` first: names with
    which it would read anything else than without are left out.
    """
    settings = getattr(config, "rope_parameters", None)
    if not settings:
        return {}
    names = _OLDER_NAMES.get(config.model_type, {})
    found = {names.get(key, key): value for key, value in _older(settings, data).items()}
    for kept in (found, {key: value for key, value in found.items() if key != "rope_scaling"}):
        again = type(config).from_dict(deepcopy(dict(data) | kept))
        if _without_alias(again.rope_parameters) == _without_alias(settings):
            return kept
    return {}


def _older(settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by the usual older names: those of layers with full attention where there are several."""
    full = settings.get("full_attention")
    if isinstance(full, Mapping):
        local = settings.get("sliding_attention") or {}
        base = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return _older(full, data) | base
    apart = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor") if settings.get(key) is not None}
    kind = settings.get("rope_type", "default")
    if kind == "default":
        return apart | {"rope_scaling": None}
    scaling = {key: value for key, value in settings.items() if key not in {*apart, "rope_type", "type"}}
    # Phi-3, whose it is, knows longrope by `type` alone and keeps the original length beside it
    scaling = {key: value for key, value in scaling.items() if key not in data or data[key] != value}
    return apart | {"rope_scaling": {"type" if kind == "longrope" else "rope_type": kind} | scaling}


def _without_alias(settings: Any) -> Any:
    """RoPE's settings without `type`, which says what `rope_type` says."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: _without_alias(value) for key, value in settings.items() if key != "type"}
