"""RoPE as a GGUF file says it: a type of scaling with its numbers, or tensors that divide the frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gyroquant.models.gguf_rope import FREQS, LONG, SHORT

_EVERYWHERE = ("default", "linear", "yarn")
_WITH_TENSORS = (*_EVERYWHERE, "llama3", "longrope")  # where llama.cpp reads factors from tensors
_CLOSE = 1e-6


def rope_problems(config: Any, name: str, tensors: bool) -> Iterable[str]:
    """What llama.cpp would turn otherwise than a model is meant, for its architecture `name`, which may read factors
    from tensors.
    """
    rope = config.rope_parameters
    kinds = _WITH_TENSORS if tensors else _EVERYWHERE
    if rope["rope_type"] not in kinds:
        yield f"llama.cpp has RoPE of type {', '.join(kinds)} for {name}, not of type {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1:
        yield f"llama.cpp turns whole heads of {name}, here RoPE turns a part of them"
    if rope["rope_type"] == "yarn":
        bounds = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        if bounds != (32, 1) or not rope.get("truncate", True):
            yield (
                f"llama.cpp runs YaRN of {name} between 32 and 1 turns and rounds where they lie, not as beta_fast, "
                "beta_slow and truncate say"
            )


def describe_rope(writer: gguf.GGUFWriter, config: Any) -> list[str]:
    """Writes the metadata of RoPE. Returns what there is to note."""
    rope = config.rope_parameters
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
        f"llama.cpp takes LongRoPE's factors for long texts as soon as its context is larger than {original} tokens, "
        "the model where a text is: with a larger context, short texts come out otherwise"
    ]


def rope_tensors(config: Any, width: int) -> dict[str, Tensor]:
    """What the frequencies of RoPE are divided by, where there is more to it than one factor; heads are so wide."""
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        short, long = _long(config)
        return {LONG: long, SHORT: short}
    if rope["rope_type"] != "llama3":
        return {}
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {FREQS: (plain / _scaled(config)[0].double()).float()}


def _scaled(config: Any) -> tuple[Tensor, float]:
    """The frequencies, and what queries and keys are multiplied by."""
    frequencies, attention = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(attention)


def _long(config: Any) -> tuple[Tensor, Tensor]:
    """LongRoPE's factors for short and for long texts."""
    rope = config.rope_parameters
    return torch.tensor(rope["short_factor"]).float(), torch.tensor(rope["long_factor"]).float()


def _add_attention(writer: gguf.GGUFWriter, factor: float) -> None:
    if abs(factor - 1) > _CLOSE:
        writer.add_rope_scaling_attn_factors(factor)
