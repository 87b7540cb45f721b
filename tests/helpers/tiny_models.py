"""Tiny random models of every supported architecture, and of models that also take images around them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from gyroquant.models.execution.runner import auto_class
from gyroquant.testing.models import COMMON, amount, examples, prose, randomise, tiny_config, tokenizer, tokens

__all__ = ["COMMON", "amount", "prose", "randomise", "tokenizer", "tokens"]

CONFIGS: dict[str, Callable[[], Any]] = {name: partial(tiny_config, tiny) for name, tiny in examples().items()}


def _vision(**values: Any) -> dict[str, Any]:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return common | {"image_size": 28, "patch_size": 14} | values


def _wrapper(name: str, **parts: Any) -> Callable[[], Any]:
    text = {key: value for key, value in COMMON.items() if key not in ("tie_word_embeddings",)}
    parts["text_config"] = text | parts["text_config"]
    return lambda: getattr(transformers, name)(**deepcopy(parts))


_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}

WRAPPERS: dict[str, Callable[[], Any]] = {
    "llava": _wrapper(
        "LlavaConfig",
        text_config={"model_type": "llama"},
        vision_config=_vision(model_type="clip_vision_model", num_hidden_layers=2, projection_dim=32),
        image_token_index=90,
    ),
    "mistral3": _wrapper(
        "Mistral3Config",
        text_config={"model_type": "mistral", "head_dim": 16},
        vision_config=_vision(model_type="pixtral", head_dim=16),
        image_token_index=90,
    ),
    "gemma3_wrapper": _wrapper(
        "Gemma3Config",
        text_config={"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
        vision_config=_vision(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    ),
    "qwen2_vl": _wrapper(
        "Qwen2VLConfig",
        text_config=_MROPE,
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 14},
        **{"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
    ),
    "qwen2_5_vl": _wrapper(
        "Qwen2_5_VLConfig",
        text_config=_MROPE,
        vision_config={"depth": 1, "num_heads": 2, "out_hidden_size": 64} | _vision(),
        **{"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
    ),
    "qwen3_vl": _wrapper(
        "Qwen3VLConfig",
        text_config=_MROPE | {"head_dim": 16},
        vision_config={"depth": 2, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [1]} | _vision(),
        **{"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
    ),
}
"""Models that take images too, around the decoders of some of the above; `build` knows them as well."""


# What some of them have in common; tests expect refusals by it.
POST_NORM = ("gemma2", "gemma3", "olmo2", "olmo3", "exaone4", "glm4")
QK_NORM = ("qwen3", "qwen3_moe", "olmoe", "gemma3", "olmo2", "olmo3", "exaone4")
NO_NORM_IN_FRONT = ("olmo2", "olmo3", "exaone4")
ONE_NORM = ("cohere", "cohere2")
NO_GATE = ("arcee", "starcoder2", "nemotron", "opt", "gpt2", "gpt_neox", "gpt_neox_serial")


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model of that name in `CONFIGS` or `WRAPPERS`, fp32, in evaluation mode."""
    config = (CONFIGS | WRAPPERS)[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    return randomise(model, seed).eval()


CHAT = "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
"""A chat template that begins a conversation by BOS, as Llama's does."""


def beginning(single: str = "<s> $A", template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """`tokenizer` with what its post-processor puts around a text, `single`, and a chat template."""
    from tokenizers import processors

    found = tokenizer()
    special = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    found.chat_template = template
    return found


class Folders(dict[str, Path]):
    """Folders of tiny models with their tokenizer, saved when first asked for."""

    def __init__(self, place: Path):
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Path:
        folder = self.place / name
        build(name).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        self[name] = folder
        return folder
