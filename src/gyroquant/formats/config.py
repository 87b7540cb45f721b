"""config.json as other programs and other versions of transformers read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

# Architectures whose older name for a setting is not the usual one.
_OLDER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def write_config(config: Any, folder: Path, **more: Any) -> None:
    """Writes config.json as transformers does, with RoPE's settings under both names (see `older_rope_names`), and with
    the entries of `more`.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data |= older_rope_names(config, data) | more
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_rope_names(config: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings under the names of transformers 4. `data` is the content of config.json without them.

    transformers 5 keeps the settings as `rope_parameters`. transformers 4 and, for most architectures, mlx-lm read
    `rope_theta`, `rope_scaling`, `partial_rotary_factor` and, if layers differ, `rope_local_base_freq` at the top
    level. They use their own defaults for missing names. transformers 5 reads both, `rope_scaling` first. A name that
    would change what transformers 5 reads is left out.
    """
    settings = getattr(config, "rope_parameters", None)
    if not settings:
        return {}
    names = _OLDER_NAMES.get(config.model_type, {})
    older = {names.get(key, key): value for key, value in _older(settings, data).items()}
    for candidate in (older, {key: value for key, value in older.items() if key != "rope_scaling"}):
        try:
            reread = type(config).from_dict(deepcopy(dict(data) | candidate))
        except Exception:  # some classes refuse the older names, with errors of many kinds
            continue
        if _without_alias(reread.rope_parameters) == _without_alias(settings):
            return candidate
    return {}


def _older(settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under the usual older names. If kinds of layers differ, those of full attention."""
    full = settings.get("full_attention")
    if isinstance(full, Mapping):
        local = settings.get("sliding_attention") or {}
        base = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return _older(full, data) | base
    top_level = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor") if settings.get(key) is not None}
    kind = settings.get("rope_type", "default")
    if kind == "default":
        return top_level | {"rope_scaling": None}
    scaling = {key: value for key, value in settings.items() if key not in {*top_level, "rope_type", "type"}}
    # Phi-3, which introduced longrope, reads its kind from `type` alone and the original length from the top level
    scaling = {key: value for key, value in scaling.items() if key not in data or data[key] != value}
    return top_level | {"rope_scaling": {"type" if kind == "longrope" else "rope_type": kind} | scaling}


def _without_alias(settings: Any) -> Any:
    """RoPE's settings without `type`, which repeats `rope_type`."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: _without_alias(value) for key, value in settings.items() if key != "type"}
