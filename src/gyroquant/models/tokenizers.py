"""Tokenizers as their files have them."""

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
    """The tokenizer in a folder; code that the folder may bring is never run. Raises InputError when there is none.

    Where there is a tokenizer.json, it gives its tokens. transformers builds many classes anew from its vocabulary and
    merges alone, and these classes cut words in their own way, not in the file's.
    """
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        if not options and _cuts_otherwise(found, folder / "tokenizer.json"):
            return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **_special_tokens(found))
        return found
    except Exception as error:  # transformers raises many kinds for a missing tokenizer
        own = "trust_remote_code" in str(error)
        why = "it names code of its own (auto_map), which is never run" if own else str(error)
        raise InputError(f"{label} has no usable tokenizer: {why}") from error


def _cuts_otherwise(tokenizer: Any, path: Path) -> bool:
    """Whether a tokenizer normalizes or cuts texts in another way than a tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not path.is_file() or "__init__" not in vars(type(tokenizer)):
        return False  # or its class takes the file as it is
    stored = Tokenizer.from_file(str(path))
    return any(_step(backend, name) != _step(stored, name) for name in _TOKENIZER_STEPS)


def _step(backend: Any, name: str) -> Any:
    """What is comparable of a part of a tokenizer; of its model the settings, since all keep the vocabulary."""
    part = getattr(backend, name)
    if name == "model":
        return [type(part).__name__, *(getattr(part, setting, None) or None for setting in _MODEL_SETTINGS)]
    return None if part is None else json.loads(part.__getstate__())


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    """The special tokens that a class knows though no file may name them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}


__all__ = ["load_tokenizer"]
