"""RoPE in a GGUF file: a type of scaling with its parameters, or tensors that divide the frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gyroquant.models.stores.gguf.rope import FREQS, LONG, SHORT

_EVERYWHERE = ("default", "linear", "yarn")
_WITH_TENSORS = (*_EVERYWHERE, "llama3", "longrope")  # for architectures that read factors from tensors in llama.cpp
_CLOSE = 1e-6


def full_rope(config: Any) -> Mapping[str, Any]:
    """The RoPE settings of a model, or those of its layers without a window if layers differ."""
    settings: Mapping[str, Any] = config.rope_parameters
    full: Mapping[str, Any] = settings.get("full_attention", settings)
    return full


def rope_problems(config: Any, name: str, tensors: bool, partial: bool) -> Iterable[str]:
    """The RoPE settings that llama.cpp would not follow, one sentence each.

    `name` is llama.cpp's architecture. `tensors` states whether it reads factors from tensors, `partial` whether RoPE
    may turn a part of a head.
    """
    rope = full_rope(config)
    kinds = _WITH_TENSORS if tensors else _EVERYWHERE
    if rope["rope_type"] not in kinds:
        yield f"llama.cpp does not support RoPE of type {rope['rope_type']} for {name}; it supports {', '.join(kinds)}"
    if rope.get("partial_rotary_factor", 1.0) != 1 and not partial:
        yield f"llama.cpp turns whole heads of {name}, but this RoPE turns a part of each (partial_rotary_factor)"
    if rope["rope_type"] == "yarn":
        bounds = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        if bounds != (32, 1) or not rope.get("truncate", True):
            yield (
                f"llama.cpp supports YaRN of {name} only with beta_fast 32, beta_slow 1 and truncate; this model has "
                "other values"
            )


def describe_rope(writer: gguf.GGUFWriter, config: Any) -> list[str]:
    """Writes the metadata of RoPE. Returns notes."""
    rope = full_rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        factor = rope["factor"] or config.max_position_embeddings / rope["original_max_position_embeddings"]
        usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        _add_attention(writer, _scaled(config)[1] / usual)
    if kind != "longrope":
        return []
    original = rope["original_max_position_embeddings"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    _add_attention(writer, _scaled(config)[1])
    if torch.equal(*_long(config)):
        return []
    return [
        f"llama.cpp uses LongRoPE's factors for long texts if its context is larger than {original} tokens, the model "
        "if the text is: with a larger context, short texts give other results"
    ]


def rope_tensors(config: Any, width: int) -> dict[str, Tensor]:
    """The divisors of RoPE's frequencies, by the names of their tensors. Empty unless the frequencies have different
    factors. `width` is the size of a head.
    """
    rope = full_rope(config)
    if rope["rope_type"] == "longrope":
        short, long = _long(config)
        return {LONG: long, SHORT: short}
    if rope["rope_type"] != "llama3":
        return {}
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {FREQS: (plain / _scaled(config)[0].double()).float()}


def _scaled(config: Any) -> tuple[Tensor, float]:
    """RoPE's frequencies, and the factor of queries and keys."""
    kind = "full_attention" if "full_attention" in config.rope_parameters else None
    make = ROPE_INIT_FUNCTIONS[full_rope(config)["rope_type"]]
    frequencies, attention = make(config, torch.device("cpu"), layer_type=kind)
    return frequencies, float(attention)


def _long(config: Any) -> tuple[Tensor, Tensor]:
    """LongRoPE's factors for short and for long texts."""
    rope = full_rope(config)
    return torch.tensor(rope["short_factor"]).float(), torch.tensor(rope["long_factor"]).float()


def _add_attention(writer: gguf.GGUFWriter, factor: float) -> None:
    if abs(factor - 1) > _CLOSE:
        writer.add_rope_scaling_attn_factors(factor)
