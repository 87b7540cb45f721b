"""RoPE as llama.cpp runs it for a GGUF file, as `rope_parameters` of transformers.

llama.cpp turns pair i by position * scale / factor[i] * base ** (-2 i / width). `scale` comes from linear scaling or
from YaRN's ramp. `factor` is a tensor of the file: rope_freqs.weight for Llama 3, rope_factors_long or
rope_factors_short for LongRoPE. Of the last two, llama.cpp chooses one by the size of the context, transformers by the
length of the text.
Sources: llama.cpp, src/llama-context.cpp (YaRN's attention factor), ggml-cpu/ops.cpp (rope_yarn) and
src/llama-model.cpp (get_rope_factors); transformers, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.settings import Settings

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_EXACT = 2e-6  # relative, of a factor; the file stores factors in fp32
_LLAMA3 = (1.0, 4.0, 8192)  # Llama 3.1 to 3.3: low_freq_factor, high_freq_factor, original context


def rope_parameters(
    settings: Settings, file: GgufFile, width: int, context: int, scalings: tuple[str, ...]
) -> dict[str, Any]:
    """The `rope_parameters` of a transformers config that turn as llama.cpp does.

    The type is default, one of `scalings`, or longrope, which can express all others. `width` is the number of turned
    coordinates of a head, `context` the maximum length of a text in tokens. Raises InputError for settings that
    llama.cpp reads only for other architectures.
    """
    base = float(settings.take("rope.freq_base", 10000.0))
    kind = settings.take("rope.scaling.type", "linear")
    factor = settings.take("rope.scaling.factor") or settings.take("rope.scale_linear") or 1.0
    settings.take("rope.scale_linear")
    attention = float(settings.take("rope.scaling.attn_factor", 1.0))
    original = int(settings.take("rope.scaling.original_context_length", context))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise InputError(
            f"{file.path}: llama.cpp has no RoPE scaling of the type {kind!r} (rope.scaling.type): convert the model "
            "again"
        )
    factor = 1.0 if kind == "none" else float(factor)
    _check_yarn(settings, kind, factor)
    ramp = kind == "yarn" and factor != 1
    if ramp and factor > 1:
        attention *= 1 + 0.1 * math.log(factor)
    tensors = {name: _factors(file, name, width) for name in (FREQS, LONG, SHORT) if name in file.tensors}
    common = {"rope_theta": base}
    if not tensors and ramp and "yarn" in scalings:
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return common | scaling | {"beta_fast": _BETA_FAST, "beta_slow": _BETA_SLOW, "attention_factor": attention}
    if not tensors and not ramp and attention == 1 and (factor == 1 or "linear" in scalings):
        return common | ({"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor})
    plain = base ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    ones = np.ones(width // 2)
    pair = [tensors.get(name, tensors.get(FREQS, ones)) for name in (SHORT, LONG)]
    if ramp:
        pair = [plain / _yarn(plain / factors, factor, base, original, width) for factors in pair]
    else:
        pair = [factors * factor for factors in pair]
    if tensors.keys() == {FREQS} and attention == 1 and "llama3" in scalings and (llama3 := _llama3(plain, pair[0])):
        return common | llama3
    return common | {
        "rope_type": "longrope",
        "short_factor": pair[0].tolist(),
        "long_factor": pair[1].tolist(),
        "attention_factor": attention,
        "factor": max(1.0, context / original),
        "original_max_position_embeddings": original,
    }


def _check_yarn(settings: Settings, kind: str, factor: float) -> None:
    """Raises InputError for settings of YaRN that llama.cpp does not read for these architectures, unless they state
    what llama.cpp does anyway.
    """
    default_attention = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    neutral = {
        "ext_factor": (-1.0, 1.0),
        "attn_factor": (default_attention,),
        "beta_fast": (_BETA_FAST,),
        "beta_slow": (_BETA_SLOW,),
    }
    for name, values in neutral.items():
        key = f"rope.scaling.yarn_{name}"
        if kind == "yarn":
            settings.ignore(key, *values)
        else:
            settings.take(key)
    settings.ignore("rope.scaling.yarn_log_multiplier", 0.0)


def _factors(file: GgufFile, name: str, width: int) -> np.ndarray:
    values = file.values(name).astype(np.float64).reshape(-1)
    if len(values) != width // 2 or not np.isfinite(values).all() or not (values > 0).all():
        raise InputError(
            f"{file.path}: {name} does not hold {width // 2} numbers above 0, one for each pair of a head: convert the "
            "model again"
        )
    return values


def _yarn(plain: np.ndarray, factor: float, base: float, original: int, width: int) -> np.ndarray:
    """The frequencies of YaRN: a mix of `plain` and `plain / factor`, by the number of full turns of each pair."""

    def place(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(place(_BETA_FAST))), min(width - 1, math.ceil(place(_BETA_SLOW)))
    kept = 1 - np.clip((np.arange(width // 2) - low) / max(0.001, high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor)


def _llama3(plain: np.ndarray, factors: np.ndarray) -> dict[str, Any] | None:
    """The settings of Llama 3's scaling that give these factors, or None if there are no such settings.

    Between the two ends, 1 / factor is a straight line over the frequency. Its slope and height determine two of the
    three numbers, so low_freq_factor is set to 1.
    """
    factor = float(factors.max())
    if factor <= 1 or factors.min() < 1 - _EXACT:
        return None
    turns = plain / (2 * np.pi)  # per position
    candidates = [_LLAMA3]
    middle = (factors > 1 + _EXACT) & (factors < factor * (1 - _EXACT))
    if middle.sum() > 1:
        smooth = (1 / factors[middle] - 1 / factor) / (1 - 1 / factor)
        slope, height = np.polyfit(turns[middle], smooth, 1)
        if height < 0:
            candidates.append((1.0, round(float(1 - 1 / height), 4), round(float(-slope / height))))
    for rounded in (round(factor, 3), factor):
        for low, high, original in candidates:
            smooth = np.clip((original * turns - low) / (high - low), 0, 1)
            expected = 1 / ((1 - smooth) / rounded + smooth)
            if np.allclose(expected, factors, rtol=_EXACT, atol=0):
                scaling = {"rope_type": "llama3", "factor": rounded, "low_freq_factor": low, "high_freq_factor": high}
                return scaling | {"original_max_position_embeddings": int(original)}
    return None
