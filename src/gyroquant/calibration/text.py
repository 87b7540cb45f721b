"""Text to batches of tokens: local files, lists of strings or rows, and datasets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gyroquant.calibration.documents import (
    Conversation,
    Row,
    canonical,
    documents,
    is_rows,
    parse_json,
    read_parquet,
    render,
)
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
_PROBE = "a text"  # what is around it is what a tokenizer puts around every text
_FIRST = 64  # tokens that are tried in its place


@dataclass(frozen=True)
class Text:
    """A text with a name to print and a fingerprint to compare.

    Where `conversations` are given, the text is what a chat template makes of them, and `content` what they were read
    from. `note` says what was left out of the source, if anything was.
    """

    name: str
    content: str
    conversations: tuple[Conversation, ...] = ()
    note: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """What results say of it."""
        told: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        told |= {"conversations": len(self.conversations)} if self.conversations else {}
        return told | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class TokenBatch:
    """Windows of a text that has been tokenized, `ids` of shape (samples, length), and what text.

    `bos` are the tokens at the head of every window. `tokens` counts those of the text in the windows (without what was
    put in front of it), `text_tokens` those of the whole text; None where nobody has counted.
    """

    name: str
    sha256: str
    ids: Tensor
    bos: tuple[int, ...] = ()
    tokens: int | None = None
    text_tokens: int | None = None

    def about(self) -> dict[str, Any]:
        """What results say of it."""
        return {"name": self.name, "sha256": self.sha256}

    def take(self, nsamples: int, seqlen: int, section: str = "calibration") -> Tensor:
        """The first of them, shape (nsamples, seqlen). Raises InputError when there are fewer, or of another length."""
        if len(self.ids) < nsamples or self.ids.shape[1] != seqlen:
            raise self._fewer(nsamples, seqlen, section)
        return self.ids[:nsamples]

    def cut(self, nsamples: int, seqlen: int, section: str) -> Tensor:
        """The beginnings of the first of them, shape (nsamples, seqlen). Raises InputError when there is less."""
        if len(self.ids) < nsamples or self.ids.shape[1] < seqlen:
            raise self._fewer(nsamples, seqlen, section)
        return self.ids[:nsamples, :seqlen]

    def checked(self, vocabulary: int) -> TokenBatch:
        """Itself. Raises InputError for what are no windows of tokens of a model that knows `vocabulary` of them."""
        if self.ids.dim() != 2 or self.ids.is_floating_point() or self.ids.is_complex() or not self.ids.numel():
            raise InputError(
                f"{self.name} have shape {tuple(self.ids.shape)} and are {self.ids.dtype}: give integers of shape "
                "(samples, length)"
            )
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"{self.name} hold token {low if low < 0 else high}, but the model knows only {vocabulary}: they are "
                "not this model's"
            )
        return self

    def _fewer(self, nsamples: int, seqlen: int, section: str) -> InputError:
        count, length = self.ids.shape
        return InputError(
            f"{self.name} is given as {count} windows of {length} tokens, not as {nsamples} windows of {seqlen}: give "
            f"as many, or ask for less: --set {section}.nsamples={min(count, nsamples)} "
            f"--set {section}.seqlen={length if section == 'calibration' else min(length, seqlen)}"
        )


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a text, `ids` of shape (tokens,), and `bos`, the tokens that every window of it begins with."""

    name: str
    sha256: str
    ids: Tensor
    bos: tuple[int, ...] = ()

    def windows(self, length: int, count: int | None = None) -> TokenBatch:
        """The first `count` windows (None: all), see `windows`."""
        found, ends = _cut(self.ids, length, self.name, self.bos)
        found, ends = found[:count], ends[:count]
        return TokenBatch(self.name, self.sha256, found, self.bos, ends[-1], self.ids.numel())

    def sample(self, nsamples: int, seqlen: int, seed: int) -> TokenBatch:
        """Windows at random, see `sample`."""
        found = sample(self.ids, nsamples, seqlen, seed, self.name, self.bos)
        return TokenBatch(self.name, self.sha256, found, self.bos, text_tokens=self.ids.numel())


def load_text(
    source: str | Path | Sequence[str | Mapping[str, Any]], split: Split = "train", *, prose: bool = False
) -> Text:
    """The text of a local file, of a list of strings or rows, or of a dataset on the hub.

    Files whose names end in .json, .jsonl or .parquet hold rows, which are texts or conversations (see `documents`);
    any other file is prose, as every file is with `prose`. Rows that are texts are joined by two newlines. Datasets are
    `wikitext2`, `c4`, `pile-10k` or ``name:split:column``, of which the first 20,000 rows are read. `split` says
    whether a named dataset is wanted for calibration (train) or for evaluation (test). Raises InputError for a file
    that is missing, empty or not text, and for rows that are not understood.
    """
    if not isinstance(source, (str, Path)):
        return _of_list(source)
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
        return _of_file(path, prose)
    name = str(source)
    if name in _DATASETS:
        repository, configuration, column, train, test = _DATASETS[name]
        return _from_hub(name, repository, configuration, train if split == "train" else test, column)
    if name.count(":") == 2:
        repository, wanted, column = name.split(":")
        return _from_hub(name, repository, None, wanted, column)
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


def _of_list(source: Sequence[Any]) -> Text:
    name = f"{len(source)} {'strings' if all(isinstance(one, str) for one in source) else 'rows'}"
    if not all(isinstance(one, (str, Mapping)) for one in source):
        raise InputError("a text is a file or a list of strings: one of its entries is no string (nor a row of data)")
    return _of_rows(name, [Row(one, f"entry {number} of the list") for number, one in enumerate(source, 1)])


def _of_file(path: Path, prose: bool) -> Text:
    if not prose and path.suffix.lower() == ".parquet":
        return _of_rows(path.name, read_parquet(path))
    try:
        # a mark of the byte order is none of the text's characters; line ends become \n, as everywhere in Python
        content = path.read_text(encoding="utf-8" if prose else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): give plain text, or convert it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    text = _checked(Text(path.name, content))
    return text if prose or not is_rows(path) else _of_rows(path.name, parse_json(content, path.name), content)


def _of_rows(name: str, rows: Sequence[Row], content: str | None = None, note: str = "") -> Text:
    """The text of rows; `content` is what conversations were read from, the rows themselves where it is not given."""
    found = documents(rows)
    if all(isinstance(one, str) for one in found):
        return _checked(Text(name, _JOIN.join(map(str, found)), note=note))
    conversations = tuple(one for one in found if isinstance(one, Conversation))
    return _checked(Text(name, canonical(rows) if content is None else content, conversations, note))


def _from_hub(name: str, repository: str, configuration: str | None, split: str, column: str) -> Text:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"the dataset {repository} needs the package datasets: pip install 'gyroquant[hub]'; "
            "or give a local text file"
        ) from error
    try:
        stream = datasets.load_dataset(repository, configuration, split=split, streaming=True)
        rows = [row[column] for _, row in zip(range(_ROWS + 1), stream, strict=False)]
    except Exception as error:  # a hub fails in many ways, all of which mean the same to the user
        raise InputError(
            f"the dataset {repository} ({split}, column {column}) cannot be fetched: {error}; "
            "give a local text file instead"
        ) from error
    note = f"the first {_ROWS} rows alone" if len(rows) > _ROWS else ""
    placed = [Row(row, f"row {number} of {name}") for number, row in enumerate(rows[:_ROWS], 1)]
    return _of_rows(name, placed, note=note)


def tokenize(text: Text, tokenizer: Any, vocabulary: int, special: bool = True) -> Tensor:
    """All tokens of a text, shape (tokens,), int64, with what the tokenizer puts around a text if `special`.

    Conversations are written by the tokenizer's chat template, one after another, each with its own special tokens.
    Raises InputError for a tokenizer that does not fit the model or has no template.
    """
    if text.conversations:
        found = [token for one in text.conversations for token in render(one, tokenizer)]
    else:
        found = tokenizer(text.content, add_special_tokens=special, verbose=False)["input_ids"]
    ids = torch.tensor(found, dtype=torch.long)
    if not ids.numel():
        raise InputError(f"the tokenizer makes no tokens of {text.name}: it is not this model's")
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, but the model knows only {vocabulary}: it is not this model's"
        )
    return ids


def bos_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts in front of every text, such as BOS; empty where it puts none.

    They are what its post-processor adds; a token that it adds twice in a row is there once. Raises InputError where
    the text itself is cut otherwise with them.
    """
    known = (tokenizer.decode([token]) for token in range(_FIRST))
    for probe in (_PROBE, *known):  # a tokenizer may not know the first
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        if plain:
            break
    else:
        return ()
    whole = tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    if not starts:
        raise InputError(
            "the tokenizer cuts a text otherwise when it puts special tokens around it, so that what it begins with "
            "cannot be told: give add_bos=false (--no-bos)"
        )
    front = whole[: starts[0]]
    return tuple(token for i, token in enumerate(front) if i == 0 or token != front[i - 1])


def bos_text(bos: Sequence[int], tokenizer: Any) -> str | None:
    """Tokens at the head of windows as results tell them; None for none."""
    if not bos:
        return None
    known = getattr(tokenizer, "convert_ids_to_tokens", None)
    return "".join(known(list(bos))) if known is not None else " ".join(map(str, bos))


def token_stream(text: Text, tokenizer: Any, vocabulary: int, add_bos: bool = True) -> TokenStream:
    """The tokens of a text, to be cut into windows which, with `add_bos`, each begin as the tokenizer begins a text.

    Without it the text is cut as the tokenizer gives it: where it puts BOS in front, only the first window has it.
    """
    bos = bos_tokens(tokenizer) if add_bos else ()
    return TokenStream(text.name, text.sha256, tokenize(text, tokenizer, vocabulary, not add_bos), bos)


def calibration_windows(
    source: Text | TokenBatch, tokenizer: Any, vocabulary: int, nsamples: int, seqlen: int, seed: int, add_bos: bool
) -> TokenBatch:
    """The windows to calibrate on, shape (nsamples, seqlen): drawn from a text, or the first of those that are given.

    Raises InputError where there are fewer, or where given ones have another length.
    """
    if isinstance(source, TokenBatch):
        ids = source.checked(vocabulary).take(nsamples, seqlen)
        return TokenBatch(source.name, source.sha256, ids, source.bos)
    return token_stream(source, tokenizer, vocabulary, add_bos).sample(nsamples, seqlen, seed)


def _cut(ids: Tensor, length: int, name: str, bos: Sequence[int] = ()) -> tuple[Tensor, list[int]]:
    """Windows of tokens, and for each how many tokens have been used up with it."""
    if length < 1:
        raise InputError(f"a window of {length} tokens is none: take 1 or more")
    if length <= len(bos):
        raise InputError(f"a window of {length} has no room for text: each begins with {len(bos)} special tokens")
    if not bos:
        count = ids.numel() // length
        found, ends = ids[: count * length].view(count, length), [length * (i + 1) for i in range(count)]
    else:
        found, ends = _cut_with_bos(ids, length, torch.tensor(bos))
    if not ends:
        raise InputError(f"{name} has {ids.numel()} tokens, fewer than one window of {length}; use a shorter window")
    return found, ends


def _cut_with_bos(ids: Tensor, length: int, bos: Tensor) -> tuple[Tensor, list[int]]:
    """As `_cut`; where the text has the special tokens itself at the head of a window, they are not put there again."""
    size = len(bos)
    own = set((ids.unfold(0, size, 1) == bos).all(1).nonzero().flatten().tolist()) if ids.numel() >= size else set()
    pieces, ends, at = list[Tensor](), list[int](), 0
    while (end := at + (length if at in own else length - size)) <= ids.numel():
        pieces.append(ids[at:end] if at in own else torch.cat([bos, ids[at:end]]))
        ends.append(end)
        at = end
    return (torch.stack(pieces) if pieces else ids.new_empty(0, length)), ends


def windows(ids: Tensor, length: int, name: str = "the text", bos: Sequence[int] = ()) -> Tensor:
    """Consecutive windows that do not overlap, shape (windows, length); the rest of the tokens is dropped.

    Each begins with the tokens `bos`, and has so much less of the text. Raises InputError when there is not a single
    whole window.
    """
    return _cut(ids, length, name, bos)[0]


def sample(
    ids: Tensor, nsamples: int, seqlen: int, seed: int, name: str = "the text", bos: Sequence[int] = ()
) -> Tensor:
    """`nsamples` different windows in random order, shape (nsamples, seqlen), the same for the same seed.

    Each begins with the tokens `bos`. Raises InputError when the text is too short for them.
    """
    all_windows = windows(ids, seqlen, name, bos)
    if len(all_windows) < nsamples:
        raise InputError(
            f"{name} has {ids.numel()} tokens, enough for {len(all_windows)} samples of {seqlen}, not for {nsamples}; "
            "lower --nsamples or --seqlen, or give more text"
        )
    order = torch.randperm(len(all_windows), generator=torch.Generator().manual_seed(seed))
    return all_windows[order[:nsamples]]
