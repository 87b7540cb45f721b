"""The texts of a comparison: as tokens of the model, which results depend on, and by their readable names."""

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
from gyroquant.models.stores.base import WeightStore

_DIGITS = 12


@dataclass(frozen=True)
class EvaluationText:
    """A text that models are measured on.

    source: a file or the name of a dataset.
    window: tokens in a window. Windows do not overlap.
    windows: use the first windows only, at most this many. Default None: all.
    """

    source: str
    window: int
    windows: int | None = None


@dataclass(frozen=True)
class Texts:
    """The texts of a comparison as tokens.

    calibration: all tokens of the calibration text, shape (tokens,).
    tests: the windows of each test by name, shape (windows, length).
    bos: the special tokens that every window begins with, as text, or None.
    """

    calibration: TokenStream
    tests: Mapping[str, TokenBatch]
    bos: str | None = None

    @cached_property
    def keys(self) -> dict[str, str]:
        """The keys of the tests in results, by readable name. Tests with the same tokens have the same key."""
        return {name: token_digest(test.ids) for name, test in self.tests.items()}

    def about(self) -> dict[str, dict[str, Any]]:
        """The facts of each test that a comparison stores, by name."""
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


def read_texts(
    store: WeightStore, calibration: str | Path, tests: Mapping[str, EvaluationText], add_bos: bool = True
) -> Texts:
    """Reads and tokenizes the texts. With `add_bos`, every window begins with the tokenizer's BOS tokens.

    Raises InputError if a text, the tokenizer or a window does not fit the model.
    """
    tokenizer, batches = store.tokenizer(), {}
    stream = token_stream(load_text(calibration), tokenizer, store.text_config.vocab_size, add_bos)
    for name, test in tests.items():
        text = load_text(test.source, split="test")
        batch = text_windows(text, store, test.window, test.windows, tokenizer, add_bos)
        batches[name] = replace(batch, ids=batch.ids.clone())
    return Texts(stream, batches, bos_text(stream.bos, tokenizer))


def token_digest(ids: Tensor) -> str:
    """The name of tokens in results: a digest of their shape and values. It does not depend on the text's name."""
    sha256 = hashlib.sha256(str(tuple(ids.shape)).encode())
    sha256.update(ids.contiguous().numpy().data)
    return sha256.hexdigest()[:_DIGITS]


def evaluation_texts(
    texts: Iterable[str | Path], cuttings: Mapping[str, tuple[int, int | None]]
) -> dict[str, EvaluationText]:
    """Every text in each of the `cuttings`, by a readable name.

    texts: files or names of datasets. A text that is given twice counts once.
    cuttings: (window, windows) by name.
    """
    sources = list({Path(text): str(text) for text in texts}.values())
    return {
        f"{_name(source, sources)}, {cutting}": EvaluationText(source, *cuttings[cutting])
        for source in sources
        for cutting in cuttings
    }


def _name(text: str, others: Sequence[str]) -> str:
    """A file's name, with as many of its folders as needed to distinguish it from the others."""
    for count in range(1, len(Path(text).parts) + 1):
        names = [Path(*Path(other).parts[-count:]).as_posix() for other in others]
        name = names[others.index(text)]
        if names.count(name) == 1:
            return name
    return text


__all__ = ["EvaluationText", "Texts", "evaluation_texts", "read_texts", "token_digest"]
