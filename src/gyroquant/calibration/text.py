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
_ROWS = 20_000  # at most this many rows of a streamed dataset are read
_JOIN = "\n\n"
_PROBE = "a text"  # a tokenizer adds the same special tokens around it as around every text
_FIRST = 64  # if the tokenizer has no tokens for the probe, this many of its tokens are tried instead


@dataclass(frozen=True)
class Text:
    """A text with a name to print and a fingerprint to compare.

    With `conversations`, the text is what a chat template makes of them, and `content` is their source. `note` says
    what was left out of the source; it is empty if nothing was.
    """

    name: str
    content: str
    conversations: tuple[Conversation, ...] = ()
    note: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """The facts about the text that results contain."""
        facts: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        facts |= {"conversations": len(self.conversations)} if self.conversations else {}
        return facts | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class TokenBatch:
    """Windows of a tokenized text, with the name and the sha256 of the text.

    - ids: the tokens, shape (samples, length).
    - bos: the tokens at the start of every window.
    - tokens: how many tokens of the text are in the windows, without added BOS. None if not counted.
    - text_tokens: how many tokens the whole text has. None if not counted.
    """

    name: str
    sha256: str
    ids: Tensor
    bos: tuple[int, ...] = ()
    tokens: int | None = None
    text_tokens: int | None = None

    def about(self) -> dict[str, Any]:
        """The facts about the text that results contain."""
        return {"name": self.name, "sha256": self.sha256}

    def take(self, nsamples: int, seqlen: int, section: str = "calibration") -> Tensor:
        """The first windows, shape (nsamples, seqlen). Raises InputError if there are fewer, or of another length."""
        if len(self.ids) < nsamples or self.ids.shape[1] != seqlen:
            raise self._fewer(nsamples, seqlen, section)
        return self.ids[:nsamples]

    def cut(self, nsamples: int, seqlen: int, section: str) -> Tensor:
        """The starts of the first windows, shape (nsamples, seqlen). Raises InputError if there are too few tokens."""
        if len(self.ids) < nsamples or self.ids.shape[1] < seqlen:
            raise self._fewer(nsamples, seqlen, section)
        return self.ids[:nsamples, :seqlen]

    def checked(self, vocabulary: int) -> TokenBatch:
        """This batch. Raises InputError if `ids` are not windows of tokens, or if a token is not below `vocabulary`."""
        if self.ids.dim() != 2 or self.ids.is_floating_point() or self.ids.is_complex() or not self.ids.numel():
            raise InputError(
                f"{self.name} have shape {tuple(self.ids.shape)} and are {self.ids.dtype}: give integers of shape "
                "(samples, length)"
            )
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"{self.name} hold token {low if low < 0 else high}, but the model has only {vocabulary} tokens: give "
                "tokens of this model"
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

    def about(self) -> dict[str, Any]:
        """The facts about the text that results contain."""
        return {"name": self.name, "sha256": self.sha256}

    def windows(self, length: int, count: int | None = None) -> TokenBatch:
        """The first `count` windows; all of them if `count` is None. See the function `windows`."""
        ids, ends = _cut(self.ids, length, self.name, self.bos)
        ids, ends = ids[:count], ends[:count]
        return TokenBatch(self.name, self.sha256, ids, self.bos, ends[-1], self.ids.numel())

    def sample(self, nsamples: int, seqlen: int, seed: int) -> TokenBatch:
        """Random windows, see the function `sample`."""
        ids = sample(self.ids, nsamples, seqlen, seed, self.name, self.bos)
        return TokenBatch(self.name, self.sha256, ids, self.bos, text_tokens=self.ids.numel())


def load_text(
    source: str | Path | Sequence[str | Mapping[str, Any]], split: Split = "train", *, prose: bool = False
) -> Text:
    """The text of a local file, of a list of strings or rows, or of a dataset on the hub.

    Files whose names end in .json, .jsonl, .ndjson or .parquet hold rows: texts or conversations (see `documents`). Any
    other file is prose, and with `prose` every file is. Rows that are texts are joined by two newlines. Datasets are
    `wikitext2`, `c4`, `pile-10k` or ``name:split:column``; their first 20,000 rows are read. `split` says whether a
    named dataset is for calibration ("train") or for evaluation ("test"). Raises InputError for a file that is missing,
    empty or not text, and for rows that are not understood.
    """
    if not isinstance(source, (str, Path)):
        return _of_list(source)
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # such as a name that is too long, because it is the text itself
        raise InputError(
            f"there is no text file {str(source)[:40]!r}...: {error.strerror}; give [text] for a text"
        ) from error
    if is_folder:
        raise InputError(f"{path} is a folder; give a text file in it")
    if is_file:
        return _of_file(path, prose)
    name = str(source)
    if name in _DATASETS:
        repository, configuration, column, train, test = _DATASETS[name]
        return _from_hub(name, repository, configuration, train if split == "train" else test, column)
    if name.count(":") == 2:
        repository, chosen_split, column = name.split(":")
        return _from_hub(name, repository, None, chosen_split, column)
    raise InputError(
        f"there is no text file {name!r}; give a file, one of {', '.join(_DATASETS)}, or name:split:column of a dataset"
    )


def _checked(text: Text) -> Text:
    if not text.content.strip():
        raise InputError(f"the text {text.name} is empty: give a text with words in it")
    if "\0" in text.content:
        raise InputError(f"{text.name} has zero bytes, so it is not text: give plain text")
    try:
        text.content.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{text.name} has lone surrogates, which UTF-8 cannot encode: {error}. Remove them") from error
    return text


def _of_list(source: Sequence[Any]) -> Text:
    name = f"{len(source)} {'strings' if all(isinstance(entry, str) for entry in source) else 'rows'}"
    if not all(isinstance(entry, (str, Mapping)) for entry in source):
        raise InputError(
            "a text is a file, or a list of strings or rows: one entry of the list is neither a string nor a row"
        )
    return _of_rows(name, [Row(entry, f"entry {number} of the list") for number, entry in enumerate(source, 1)])


def _of_file(path: Path, prose: bool) -> Text:
    if not prose and path.suffix.lower() == ".parquet":
        return _of_rows(path.name, read_parquet(path))
    try:
        # a byte-order mark is not part of the text; line ends become \n, as everywhere in Python
        content = path.read_text(encoding="utf-8" if prose else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): give plain text, or convert it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    text = _checked(Text(path.name, content))
    return text if prose or not is_rows(path) else _of_rows(path.name, parse_json(content, path.name), content)


def _of_rows(name: str, rows: Sequence[Row], content: str | None = None, note: str = "") -> Text:
    """The text of rows. `content` is the source of conversations; by default the rows as JSON lines."""
    contents = documents(rows)
    if all(isinstance(entry, str) for entry in contents):
        return _checked(Text(name, _JOIN.join(map(str, contents)), note=note))
    conversations = tuple(entry for entry in contents if isinstance(entry, Conversation))
    return _checked(Text(name, canonical(rows) if content is None else content, conversations, note))


def _from_hub(name: str, repository: str, configuration: str | None, split: str, column: str) -> Text:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"the dataset {repository} needs the package datasets: pip install 'gyroquant[hub]', "
            "or give a local text file"
        ) from error
    try:
        stream = datasets.load_dataset(repository, configuration, split=split, streaming=True)
        rows = [row[column] for _, row in zip(range(_ROWS + 1), stream, strict=False)]
    except Exception as error:  # the hub fails in many ways, and the remedy is always the same
        raise InputError(
            f"the dataset {repository} ({split}, column {column}) cannot be fetched: {error}; "
            "give a local text file instead"
        ) from error
    note = f"only the first {_ROWS} rows" if len(rows) > _ROWS else ""
    placed = [Row(row, f"row {number} of {name}") for number, row in enumerate(rows[:_ROWS], 1)]
    return _of_rows(name, placed, note=note)


def tokenize(text: Text, tokenizer: Any, vocabulary: int, special: bool = True) -> Tensor:
    """All tokens of a text, shape (tokens,), int64. With `special`, the tokenizer adds its special tokens around it.

    The tokenizer's chat template writes conversations one after another, each with its own special tokens. Raises
    InputError for a tokenizer that does not fit the model, and for conversations if it has no template.
    """
    if text.conversations:
        tokens = [token for conversation in text.conversations for token in render(conversation, tokenizer)]
    else:
        tokens = tokenizer(text.content, add_special_tokens=special, verbose=False)["input_ids"]
    ids = torch.tensor(tokens, dtype=torch.long)
    if not ids.numel():
        raise InputError(
            f"the tokenizer makes no tokens of {text.name}, so it is not this model's: give the model's own tokenizer"
        )
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, but the model has only {vocabulary} tokens, so it is not "
            "this model's: give the model's own tokenizer"
        )
    return ids


def bos_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokenizer adds before every text, such as BOS. Empty if it adds none.

    They are what its post-processor adds. A token that it adds twice in a row is returned once. Raises InputError if
    the tokenizer splits the text itself differently when it adds them.
    """
    words = (tokenizer.decode([token]) for token in range(_FIRST))
    for probe in (_PROBE, *words):  # a tokenizer may have no tokens for the first probe
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        if plain:
            break
    else:
        return ()
    whole = tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    if not starts:
        raise InputError(
            "the tokenizer splits a text differently when it adds special tokens, so its BOS tokens cannot be found: "
            "set add_bos=false (--no-bos)"
        )
    front = whole[: starts[0]]
    return tuple(token for i, token in enumerate(front) if i == 0 or token != front[i - 1])


def bos_text(bos: Sequence[int], tokenizer: Any) -> str | None:
    """The tokens at the start of windows, as results show them. None if there are none."""
    if not bos:
        return None
    to_tokens = getattr(tokenizer, "convert_ids_to_tokens", None)
    return "".join(to_tokens(list(bos))) if to_tokens is not None else " ".join(map(str, bos))


def token_stream(text: Text, tokenizer: Any, vocabulary: int, add_bos: bool = True) -> TokenStream:
    """The tokens of a text, to be cut into windows.

    With `add_bos`, every window begins with the tokenizer's BOS tokens. Without it, the text is cut as the tokenizer
    gives it, so only the first window has BOS, if the tokenizer adds it.
    """
    bos = bos_tokens(tokenizer) if add_bos else ()
    return TokenStream(text.name, text.sha256, tokenize(text, tokenizer, vocabulary, not add_bos), bos)


def calibration_windows(
    source: Text | TokenBatch, tokenizer: Any, vocabulary: int, nsamples: int, seqlen: int, seed: int, add_bos: bool
) -> TokenBatch:
    """The windows to calibrate on, shape (nsamples, seqlen): drawn from a text, or the first of a given batch.

    Raises InputError if there are fewer, or if the windows of a given batch have another length.
    """
    if isinstance(source, TokenBatch):
        ids = source.checked(vocabulary).take(nsamples, seqlen)
        return TokenBatch(source.name, source.sha256, ids, source.bos)
    return token_stream(source, tokenizer, vocabulary, add_bos).sample(nsamples, seqlen, seed)


def _cut(ids: Tensor, length: int, name: str, bos: Sequence[int] = ()) -> tuple[Tensor, list[int]]:
    """Windows of tokens, and for each of them how many tokens are used up at its end."""
    if length < 1:
        raise InputError(f"a window of {length} tokens is too short: take 1 or more")
    if length <= len(bos):
        raise InputError(
            f"a window of {length} tokens has no room for text, because it begins with {len(bos)} special tokens: take "
            "longer windows"
        )
    if not bos:
        count = ids.numel() // length
        cut, ends = ids[: count * length].view(count, length), [length * (i + 1) for i in range(count)]
    else:
        cut, ends = _cut_with_bos(ids, length, torch.tensor(bos))
    if not ends:
        raise InputError(f"{name} has {ids.numel()} tokens, fewer than one window of {length}; use a shorter window")
    return cut, ends


def _cut_with_bos(ids: Tensor, length: int, bos: Tensor) -> tuple[Tensor, list[int]]:
    """As `_cut`. If the text itself has the special tokens where a window begins, they are not added again."""
    size = len(bos)
    own = set((ids.unfold(0, size, 1) == bos).all(1).nonzero().flatten().tolist()) if ids.numel() >= size else set()
    pieces, ends, at = list[Tensor](), list[int](), 0
    while (end := at + (length if at in own else length - size)) <= ids.numel():
        pieces.append(ids[at:end] if at in own else torch.cat([bos, ids[at:end]]))
        ends.append(end)
        at = end
    return (torch.stack(pieces) if pieces else ids.new_empty(0, length)), ends


def windows(ids: Tensor, length: int, name: str = "the text", bos: Sequence[int] = ()) -> Tensor:
    """Consecutive windows that do not overlap, shape (windows, length). The remaining tokens are dropped.

    Each window begins with the tokens `bos`, which take the place of as many tokens of text. Raises InputError if the
    text is shorter than one window.
    """
    return _cut(ids, length, name, bos)[0]


def sample(
    ids: Tensor, nsamples: int, seqlen: int, seed: int, name: str = "the text", bos: Sequence[int] = ()
) -> Tensor:
    """`nsamples` different windows in random order, shape (nsamples, seqlen). The same seed gives the same windows.

    Each window begins with the tokens `bos`. Raises InputError if the text has fewer windows.
    """
    all_windows = windows(ids, seqlen, name, bos)
    if len(all_windows) < nsamples:
        raise InputError(
            f"{name} has {ids.numel()} tokens, enough for {len(all_windows)} samples of {seqlen}, not for {nsamples}; "
            "lower --nsamples or --seqlen, or give more text"
        )
    order = torch.randperm(len(all_windows), generator=torch.Generator().manual_seed(seed))
    return all_windows[order[:nsamples]]
