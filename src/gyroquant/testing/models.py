"""Tiny random models for the checks of contracts, built from the configuration classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from gyroquant.models.execution.runner import auto_class
from gyroquant.models.graph.spec import Example, architectures

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
"""The settings of every tiny model. Values of its `Example` replace them."""


def tiny_config(example: Example) -> Any:
    """The configuration that an example describes."""
    kind = getattr(transformers, example.config) if isinstance(example.config, str) else example.config
    common = {key: value for key, value in COMMON.items() if key not in example.without}
    return kind(**common | dict(example.values))


def examples() -> Mapping[str, Example]:
    """The tiny models of all registered architectures, by name."""
    return {name: tiny for architecture in architectures() for name, tiny in architecture.examples.items()}


def tiny_model(tiny: str | Example = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with random parameters, fp32, in evaluation mode; `changes` are made to its configuration."""
    config = tiny_config(examples()[tiny] if isinstance(tiny, str) else tiny)
    for key, value in changes.items():
        setattr(config, key, value)
    return randomise(auto_class(config).from_config(config, dtype=torch.float32), seed).eval()


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Gives every weight random values of usual size, every norm a random gain and every bias a random value.

    With the usual initial values, ones and zeros, a fold that ignores gains and biases would pass the checks.
    """
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


def tokens(model: PreTrainedModel, batch: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """Random token ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch, length), generator=generator)


def amount(nsamples: int = 2, length: int = 24) -> list[str]:
    """Changes of a recipe that calibrate and prove on as many tokens as `tokens` returns."""
    sections = ("calibration", "proof")
    return [change for name in sections for change in (f"{name}.nsamples={nsamples}", f"{name}.seqlen={length}")]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 96 words: three special tokens, then w0 .. w92."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(93)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def prose(words: int, seed: int = 0) -> str:
    """Random words of the tiny tokenizer. Some are much more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(words, generator=generator) ** 2 * 93).long()
    return " ".join(f"w{i}" for i in numbers.tolist())
