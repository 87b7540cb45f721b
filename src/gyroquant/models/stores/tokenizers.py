"""Loads tokenizers so that they split text as their files state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gyroquant.errors import InputError

_TOKENIZER_STEPS = ("normalizer", "pre_tokenizer", "model")
_MODEL_SETTINGS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)


def load_tokenizer(folder: Path, label: str, **options: Any) -> Any:
    """The tokenizer in a folder. Never runs code from the folder. Raises InputError if there is no usable tokenizer.

    If there is a tokenizer.json, the tokenizer gives the same tokens as this file. For many classes, transformers uses
    only its vocabulary and merges, and these classes split words in their own way, not in the file's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        if not options and _splits_differently(tokenizer, folder / "tokenizer.json"):
            return PreTrainedTokenizerFast.from_pretrained(
                folder, trust_remote_code=False, **_special_tokens(tokenizer)
            )
        return tokenizer
    except Exception as error:  # transformers raises many kinds for a missing tokenizer
        own = "trust_remote_code" in str(error)
        why = "it names code of its own (auto_map), which is never run" if own else str(error)
        raise InputError(f"{label} has no usable tokenizer: {why}") from error


def _splits_differently(tokenizer: Any, path: Path) -> bool:
    """Whether a tokenizer normalizes or splits text differently from a tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not path.is_file() or "__init__" not in vars(type(tokenizer)):
        return False  # there is no file to compare with, or the class uses the file unchanged
    stored = Tokenizer.from_file(str(path))
    return any(_step(backend, name) != _step(stored, name) for name in _TOKENIZER_STEPS)


def _step(backend: Any, name: str) -> Any:
    """A comparable form of one step of a tokenizer. Of the model only the settings: all classes keep the vocabulary."""
    part = getattr(backend, name)
    if name == "model":
        return [type(part).__name__, *(getattr(part, setting, None) or None for setting in _MODEL_SETTINGS)]
    return None if part is None else json.loads(part.__getstate__())


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    """The special tokens of a class. No file may name them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}


__all__ = ["load_tokenizer"]
