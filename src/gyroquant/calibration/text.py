"""Text to batches of tokens: local files, lists of strings and datasets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gyroquant.errors import InputError

Split = Literal["train", "test"]

# name -> (dataset, configuration, column, split to calibrate on, split to evaluate on, what joins the rows)
_DATASETS: dict[str, tuple[str, str | None, str, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "c4": ("allenai/c4", "en", "text", "train", "validation"),
    "pile-10k": ("NeelNanda/pile-10k", None, "text", "train", "train"),
}
_ROWS = 20_000  # rows of a streamed dataset that are read at the most
_JOIN = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text with a name to print and a fingerprint to compare."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class TokenBatch:
    """Windows of a text that somebody has tokenized and chosen, `ids` of shape (samples, length), and what text."""

    name: str
    sha256: str
    ids: Tensor

    def take(self, nsamples: int, seqlen: int) -> Tensor:
        """The first of them, shape (nsamples, seqlen). Raises InputError when there are fewer, or of another length."""
        if len(self.ids) < nsamples or self.ids.shape[1] != seqlen:
            there = " windows of ".join(map(str, self.ids.shape))
            raise InputError(f"{self.name} is given as {there} tokens, not as {nsamples} windows of {seqlen}")
        return self.ids[:nsamples]


def load_text(source: str | Path | Sequence[str], split: Split = "train") -> Text:
    """The text of a local file, of a list of strings, or of a dataset on the hub.

    Datasets are `wikitext2`, `c4`, `pile-10k` or ``name:split:column``; their rows are joined by two newlines. `split`
    says whether a named dataset is wanted for calibration (train) or for evaluation (test). Raises InputError for a
    file that is missing, empty or not text.
    """
    if not isinstance(source, (str, Path)):
        if not all(isinstance(one, str) for one in source):
            raise InputError("a text is a file or a list of strings: one of its entries is no string")
        return _checked(Text(f"{len(source)} strings", _JOIN.join(source)))
    path = Path(source)
    try:
        there, folder = path.is_file(), path.is_dir()
    except OSError as error:  # such as a name that is too long, because it is the text itself
        raise InputError(
            f"there is no text file {str(source)[:40]!r}...: {error.strerror}; give [text] for a text"
        ) from error
    if folder:
        raise InputError(f"{path} is a folder; give a text file in it")
    if there:
        try:
            return _checked(Text(path.name, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error}): give plain text, or convert it") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    name = str(source)
    if name in _DATASETS:
        repository, configuration, column, train, test = _DATASETS[name]
        return _checked(Text(name, _from_hub(repository, configuration, train if split == "train" else test, column)))
    if name.count(":") == 2:
        repository, wanted, column = name.split(":")
        return _checked(Text(name, _from_hub(repository, None, wanted, column)))
    raise InputError(
        f"there is no text file {name!r}; give a file, one of {', '.join(_DATASETS)}, or name:split:column of a dataset"
    )


def _checked(text: Text) -> Text:
    if not text.content.strip():
        raise InputError(f"the text {text.name} is empty: give one with words in it")
    if "\0" in text.content:
        raise InputError(f"{text.name} holds zero bytes: it is not text; give plain text")
    try:
        text.content.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{text.name} holds halves of characters, which UTF-8 has not: {error}") from error
    return text


def _from_hub(repository: str, configuration: str | None, split: str, column: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"the dataset {repository} needs the package datasets: pip install 'gyroquant[hub]'; "
            "or give a local text file"
        ) from error
    try:
        rows = datasets.load_dataset(repository, configuration, split=split, streaming=True)
        return _JOIN.join(row[column] for _, row in zip(range(_ROWS), rows, strict=False))
    except Exception as error:  # a hub fails in many ways, all of which mean the same to the user
        raise InputError(
            f"the dataset {repository} ({split}, column {column}) cannot be fetched: {error}; "
            "give a local text file instead"
        ) from error


def tokenize(text: Text, tokenizer: Any, vocabulary: int) -> Tensor:
    """All tokens of a text, shape (tokens,), int64. Raises InputError for a tokenizer that does not fit the model."""
    ids = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.long)
    if not ids.numel():
        raise InputError(f"the tokenizer makes no tokens of {text.name}: it is not this model's")
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, but the model knows only {vocabulary}: it is not this model's"
        )
    return ids


def windows(ids: Tensor, length: int, name: str = "the text") -> Tensor:
    """Consecutive windows that do not overlap, shape (windows, length); the rest of the tokens is dropped.

    Raises InputError when there is not a single whole window.
    """
    if length < 1:
        raise InputError(f"a window of {length} tokens is none: take 1 or more")
    count = ids.numel() // length
    if count == 0:
        raise InputError(f"{name} has {ids.numel()} tokens, fewer than one window of {length}; use a shorter window")
    return ids[: count * length].view(count, length)


def sample(ids: Tensor, nsamples: int, seqlen: int, seed: int, name: str = "the text") -> Tensor:
    """`nsamples` different windows in random order, shape (nsamples, seqlen), the same for the same seed.

    Raises InputError when the text is too short for them.
    """
    all_windows = windows(ids, seqlen, name)
    if len(all_windows) < nsamples:
        raise InputError(
            f"{name} has {ids.numel()} tokens, enough for {len(all_windows)} samples of {seqlen}, not for {nsamples}; "
            "lower --nsamples or --seqlen, or give more text"
        )
    order = torch.randperm(len(all_windows), generator=torch.Generator().manual_seed(seed))
    return all_windows[order[:nsamples]]
