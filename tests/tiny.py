"""Tiny random models of every supported architecture, built from their own transformers configuration classes.

Norm gains and biases are randomised: with the usual initial values (ones and zeros) a fold that forgets them would
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from gyroquant.models.runner import auto_class

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(name: str, drop: tuple[str, ...] = (), **values: Any) -> Callable[[], Any]:
    merged = {k: v for k, v in COMMON.items() if k not in drop} | values
    return lambda: getattr(transformers, name)(**merged)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _config("LlamaConfig"),
    "llama_tied": _config("LlamaConfig", tie_word_embeddings=True),
    "llama_bias": _config("LlamaConfig", attention_bias=True, mlp_bias=True),
    "mistral": _config("MistralConfig"),
    "smollm3": _config("SmolLM3Config", tie_word_embeddings=True),
    "granite": _config(
        "GraniteConfig",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        tie_word_embeddings=True,
    ),
    "granite_bias": _config("GraniteConfig", residual_multiplier=0.4, mlp_bias=True),
    "seed_oss": _config("SeedOssConfig", head_dim=16, attention_bias=True, attention_out_bias=True),
    "ernie4_5": _config("Ernie4_5Config", head_dim=16, use_bias=True),
    "helium": _config("HeliumConfig", head_dim=16),
    "arcee": _config("ArceeConfig", mlp_bias=True),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=32),
    "qwen2_moe": _config(
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": _config("Qwen3MoeConfig", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _config("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "phi3": _config("Phi3Config"),
    "glm": _config("GlmConfig", head_dim=16),
    "glm4": _config("Glm4Config", head_dim=16),
    "gemma2": _config(
        "Gemma2Config", head_dim=32, query_pre_attn_scalar=32, sliding_window=8, tie_word_embeddings=True
    ),
    "gemma3": _config(
        "Gemma3TextConfig", head_dim=32, query_pre_attn_scalar=32, sliding_window=8, tie_word_embeddings=True
    ),
    "olmo2": _config("Olmo2Config"),
    "olmo3": _config("Olmo3Config", sliding_window=8, num_hidden_layers=4),
    "exaone4": _config("Exaone4Config", head_dim=16, sliding_window=8, num_hidden_layers=4),
    "cohere": _config("CohereConfig", tie_word_embeddings=True),
    "cohere2": _config("Cohere2Config", sliding_window=8, tie_word_embeddings=True, num_hidden_layers=4),
    "starcoder2": _config("Starcoder2Config", tie_word_embeddings=True),
    "nemotron": _config("NemotronConfig", head_dim=16),
    "opt": _config(
        "OPTConfig",
        drop=("intermediate_size", "num_key_value_heads"),
        ffn_dim=96,
        word_embed_proj_dim=64,
        tie_word_embeddings=True,
    ),
    "gpt_neox": _config("GPTNeoXConfig", drop=("num_key_value_heads",)),
    "gpt_neox_serial": _config("GPTNeoXConfig", drop=("num_key_value_heads",), use_parallel_residual=False),
    "gpt2": _config("GPT2Config", drop=("num_key_value_heads", "intermediate_size"), tie_word_embeddings=True),
}


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


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Gives every weight a sensible random size, every norm a random gain and every bias a random value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.dim() == 1:  # the gain of a norm; Gemma and Nemotron store gain - 1
            gain = (1 + 0.4 * noise).abs() + 0.2
            parameter.copy_(gain - 1 if model.config.model_type.startswith(("gemma", "nemotron")) else gain)
        elif "emb" in name or "wte" in name or "wpe" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model of that name in `CONFIGS` or `WRAPPERS`, fp32, in evaluation mode."""
    config = (CONFIGS | WRAPPERS)[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    return randomise(model, seed).eval()


def tokens(model: PreTrainedModel, batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch, length), generator=generator)


def amount(nsamples: int = 2, length: int = 24) -> list[str]:
    """The changes of a recipe that ask for as many tokens as `tokens` gives, to calibrate and to prove on."""
    sections = ("calibration", "proof")
    return [change for s in sections for change in (f"{s}.nsamples={nsamples}", f"{s}.seqlen={length}")]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 96 words: w0 .. w92 behind the three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(93)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


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


def prose(words: int, seed: int = 0) -> str:
    """Random words of the tiny tokenizer, some much more often than others."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(words, generator=generator) ** 2 * 93).long()
    return " ".join(f"w{i}" for i in numbers.tolist())


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
