"""The texts of a comparison as the model's tokens, which is what results depend on, and what they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from gyroquant.calibration.text import TokenBatch, TokenStream, bos_text, load_text, token_stream
from gyroquant.evaluation.perplexity import text_windows
from gyroquant.models.store import WeightStore

_DIGITS = 12


@dataclass(frozen=True)
class Trial:
    """A text that models are measured on: windows that do not overlap, the first `windows` of them (None: all)."""

    source: str
    window: int
    windows: int | None = None


@dataclass(frozen=True)
class Texts:
    """Tokens: all of the `calibration` text, shape (tokens,), and by name those of `tests`, shape (windows, length).

    `bos` is what every window begins with, as results tell it, or None.
    """

    calibration: TokenStream
    tests: Mapping[str, TokenBatch]
    bos: str | None = None

    @cached_property
    def keys(self) -> dict[str, str]:
        """What results call the tests, by what people do: tests of other names on the same tokens are the same."""
        return {name: token_digest(test.ids) for name, test in self.tests.items()}

    def about(self) -> dict[str, dict[str, Any]]:
        """The tests for people, by name."""
        return {
            name: {
                "name": name.rpartition(", ")[0] or name,
                "sha256": test.sha256,
                "window": test.ids.shape[1],
                "windows": len(test.ids),
                "tokens": test.tokens,
                "text_tokens": test.text_tokens,
                "bos": self.bos,
            }
            for name, test in self.tests.items()
        }


def read_texts(store: WeightStore, calibration: str | Path, tests: Mapping[str, Trial], add_bos: bool = True) -> Texts:
    """Reads and tokenizes; with `add_bos` every window begins as the tokenizer begins a text.

    Raises InputError for a text, a tokenizer or a window that does not fit.
    """
    tokenizer, found = store.tokenizer(), {}
    stream = token_stream(load_text(calibration), tokenizer, store.text_config.vocab_size, add_bos)
    for name, test in tests.items():
        text = load_text(test.source, split="test")
        measured_on = text_windows(text, store, test.window, test.windows, tokenizer, add_bos)
        found[name] = replace(measured_on, ids=measured_on.ids.clone())
    return Texts(stream, found, bos_text(stream.bos, tokenizer))


def token_digest(ids: Tensor) -> str:
    """What results call tokens, whatever text they are of: by shape and values."""
    total = hashlib.sha256(str(tuple(ids.shape)).encode())
    total.update(ids.contiguous().numpy().data)
    return total.hexdigest()[:_DIGITS]


def trials(texts: Iterable[str | Path], ways: Mapping[str, tuple[int, int | None]]) -> dict[str, Trial]:
    """Every text in each of the `ways` to cut it, (window, windows), by a name for people; a text given twice is there
    once.
    """
    once = list({Path(text): str(text) for text in texts}.values())
    return {f"{_name(text, once)}, {way}": Trial(text, *ways[way]) for text in once for way in ways}


def _name(text: str, others: Sequence[str]) -> str:
    """A file's name, with as many of its folders in front as it takes to tell it from the others."""
    for count in range(1, len(Path(text).parts) + 1):
        names = [Path(*Path(other).parts[-count:]).as_posix() for other in others]
        name = names[others.index(text)]
        if names.count(name) == 1:
            return name
    return text


__all__ = ["Texts", "Trial", "read_texts", "token_digest", "trials"]
