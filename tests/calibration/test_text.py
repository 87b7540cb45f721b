"""Texts become the same tokens for the same seed; what cannot be used is named."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.calibration.text import (
    TokenBatch,
    TokenStream,
    bos_tokens,
    load_text,
    sample,
    token_stream,
    tokenize,
    windows,
)
from gyroquant.errors import InputError

Tokenizer = transformers.PreTrainedTokenizerFast


def test_files_and_lists(corpus: Path) -> None:
    assert load_text(corpus).content == corpus.read_text()
    joined = load_text(["one", "two"])
    assert joined.content == "one\n\ntwo"
    assert joined.sha256 == load_text(["one\n\ntwo"]).sha256


def test_samples_are_windows_of_the_text(corpus: Path, tokenizer: Tokenizer) -> None:
    ids = tokenize(load_text(corpus), tokenizer, 96)
    picked = sample(ids, 10, 32, seed=4)
    everything = {tuple(row.tolist()) for row in windows(ids, 32)}
    assert len({tuple(row.tolist()) for row in picked}) == 10
    assert {tuple(row.tolist()) for row in picked} <= everything
    assert torch.equal(picked, sample(ids, 10, 32, seed=4))
    assert not torch.equal(picked, sample(ids, 10, 32, seed=5))


def test_texts_that_are_too_short(tokenizer: Tokenizer) -> None:
    ids = tokenize(load_text([tiny_models.prose(100)]), tokenizer, 96)
    with pytest.raises(InputError, match="100 tokens, enough for 3 samples of 32, not for 4"):
        sample(ids, 4, 32, seed=0)
    with pytest.raises(InputError, match="fewer than one window of 128"):
        windows(ids, 128)


def test_a_tokenizer_of_another_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not this model's"):
        tokenize(load_text([tiny_models.prose(100)]), tokenizer, 20)


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "empty"), (b" \n ", "empty"), (b"\xff\xfe\x00bad", "not UTF-8"), (b"a\0b", "zero bytes")]
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        load_text(path)


def test_a_mark_of_the_byte_order_and_line_ends_are_no_characters_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfw1 w2\r\n\r\nw3\n")
    assert load_text(tmp_path / "a.txt").content == "w1 w2\n\nw3\n"


@pytest.mark.parametrize(
    ("single", "front"),
    [
        ("$A", ()),
        ("$A </s>", ()),
        ("<s> $A", (1,)),
        ("<s> $A </s>", (1,)),
        ("<s> <s> $A", (1,)),
        ("<pad> <s> $A", (0, 1)),
        ("</s> $A", (2,)),
    ],
)
def test_every_window_begins_as_the_tokenizer_begins_a_text(single: str, front: tuple[int, ...]) -> None:
    tokenizer, text = tiny_models.beginning(single), load_text([tiny_models.prose(200)])
    assert bos_tokens(tokenizer) == front
    stream = token_stream(text, tokenizer, 96)
    assert stream.ids.tolist() == tiny_models.tokenizer()(text.content)["input_ids"]  # and nothing behind it
    batch = stream.windows(32)
    own = 32 - len(front)
    assert batch.ids.tolist() == [[*front, *stream.ids[i : i + own].tolist()] for i in range(0, 200 - own + 1, own)]
    assert (batch.tokens, batch.text_tokens) == (len(batch.ids) * own, 200)
    drawn = stream.sample(4, 32, 3).ids
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in batch.ids.tolist()}


def test_without_bos_windows_are_cut_from_what_the_tokenizer_gives() -> None:
    tokenizer, text = tiny_models.beginning("<s> $A </s>"), load_text([tiny_models.prose(100)])
    stream = token_stream(text, tokenizer, 96, add_bos=False)
    assert stream.bos == ()
    assert stream.ids.tolist() == tokenizer(text.content)["input_ids"]
    assert stream.windows(32).ids[:, 0].eq(1).tolist() == [True, False, False]


def test_a_tokenizer_without_bos_gives_the_same_with_and_without_it(corpus: Path, tokenizer: Tokenizer) -> None:
    streams = [token_stream(load_text(corpus), tokenizer, 96, add_bos) for add_bos in (True, False)]
    assert torch.equal(streams[0].sample(5, 32, 1).ids, streams[1].sample(5, 32, 1).ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=9, max_size=60), st.integers(3, 8), st.sampled_from([(1,), (1, 2)]))
def test_windows_hold_the_text_once_and_begin_with_bos_once(ids: list[int], length: int, bos: tuple[int, ...]) -> None:
    """A text that has BOS itself where a window begins does not get another one there."""
    stream = TokenStream("it", "", torch.tensor(ids), bos)
    batch = stream.windows(length)
    at, size = 0, len(bos)
    for row in batch.ids.tolist():
        assert len(row) == length
        assert tuple(row[:size]) == bos
        has_own = tuple(ids[at : at + size]) == bos
        body = row if has_own else row[size:]
        assert body == ids[at : at + len(body)]
        at += len(body)
    assert at == batch.tokens
    assert len(ids) - at < length  # no whole window is left out


def test_a_text_that_holds_bos_already_gets_no_second_one() -> None:
    text = load_text(["<s> " + tiny_models.prose(100)])
    first = token_stream(text, tiny_models.beginning(), 96).windows(32).ids[0].tolist()
    assert first[0] == 1
    assert first[1] > 2


def test_windows_without_room_for_text_are_refused() -> None:
    with pytest.raises(InputError, match="no room for text"):
        windows(torch.arange(50), 2, bos=(0, 1))


def test_a_tokenizer_that_truncates_by_default_does_not_cut_a_text() -> None:
    tokenizer = tiny_models.beginning()
    tokenizer.backend_tokenizer.enable_truncation(16)
    assert token_stream(load_text([tiny_models.prose(100)]), tokenizer, 96).ids.numel() == 100


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.ones(24, dtype=torch.long), "shape"),
        (torch.ones(2, 24), "give integers"),
        (torch.full((2, 24), 96), "has only 96 tokens"),
        (torch.full((2, 24), -1), "token -1"),
    ],
)
def test_ids_that_are_no_windows_of_the_model(ids: torch.Tensor, why: str) -> None:
    with pytest.raises(InputError, match=why):
        TokenBatch("the ids", "", ids).checked(96)


def test_names_that_are_nothing() -> None:
    with pytest.raises(InputError, match=r"no text file 'wikitext3'; give a file, one of wikitext2, c4, pile-10k"):
        load_text("wikitext3")


class _Datasets(ModuleType):
    """Stands in for the datasets library and notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[object, ...]] = []

    def load_dataset(self, name: str, configuration: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        self.asked.append((name, configuration, split))
        if name == "no/where":
            raise ConnectionError("offline")
        return [{"text": "first", "body": "b1"}, {"text": "second", "body": "b2"}]


def test_named_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _Datasets()
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load_text("wikitext2").content == "first\n\nsecond"
    assert load_text("wikitext2", split="test").content == "first\n\nsecond"
    assert load_text("owner/set:validation:body").content == "b1\n\nb2"
    assert library.asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("owner/set", None, "validation"),
    ]
    with pytest.raises(InputError, match="cannot be fetched: offline; give a local text file"):
        load_text("no/where:train:text")


def test_rows_beyond_the_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets())
    assert "note" not in load_text("wikitext2").about()
    monkeypatch.setattr("gyroquant.calibration.text._ROWS", 1)
    text = load_text("wikitext2")
    assert text.content == "first"
    assert text.about()["note"] == "only the first 1 rows"


def test_datasets_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'gyroquant\[hub\]'"):
        load_text("c4")
