"""Texts become the same tokens for the same seed; what cannot be used is named."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
import transformers

from gyroquant.calibration.text import load_text, sample, tokenize, windows
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
    ids = tokenize(load_text([tiny.prose(100)]), tokenizer, 96)
    with pytest.raises(InputError, match="100 tokens, enough for 3 samples of 32, not for 4"):
        sample(ids, 4, 32, seed=0)
    with pytest.raises(InputError, match="fewer than one window of 128"):
        windows(ids, 128)


def test_a_tokenizer_of_another_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not this model's"):
        tokenize(load_text([tiny.prose(100)]), tokenizer, 20)


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "empty"), (b" \n ", "empty"), (b"\xff\xfe\x00bad", "not UTF-8"), (b"a\0b", "zero bytes")]
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        load_text(path)


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


def test_datasets_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'gyroquant\[hub\]'"):
        load_text("c4")
