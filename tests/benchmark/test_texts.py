"""Texts are known by their tokens, and called by names that tell them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_models

from gyroquant.benchmark.texts import EvaluationText, Texts, evaluation_texts, read_texts, token_digest
from gyroquant.errors import InputError
from gyroquant.models.stores.source import open_model

WAYS = {"bbt": (1024, 8)}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["en/test.txt", "de/test.txt"], ["en/test.txt", "de/test.txt"]),
        (["en/test.txt", "de/other.txt"], ["test.txt", "other.txt"]),
        (["test.txt", "en/test.txt"], ["test.txt", "en/test.txt"]),
        (["a/en/test.txt", "b/en/test.txt", "c.txt"], ["a/en/test.txt", "b/en/test.txt", "c.txt"]),
        (["test.txt", "./test.txt", "test.txt"], ["test.txt"]),
        (["/test.txt", "test.txt"], ["/test.txt", "test.txt"]),
        (["wikitext2", "owner/name:test:text"], ["wikitext2", "name:test:text"]),
    ],
)
def test_every_text_has_a_name_of_its_own(given: list[str], names: list[str]) -> None:
    found = evaluation_texts(given, WAYS)
    assert list(found) == [f"{name}, bbt" for name in names]
    assert [Path(one.source) for one in found.values()] == list(dict.fromkeys(map(Path, given)))


def test_every_text_is_cut_in_every_way() -> None:
    found = evaluation_texts(["a.txt", "b.txt"], {"bbt": (1024, 8), "standard": (2048, None)})
    assert found["b.txt, standard"] == EvaluationText("b.txt", 2048, None)
    assert len(found) == 4


def read(folder: Path, **tests: EvaluationText) -> Texts:
    return read_texts(open_model(folder), tests["a"].source, tests)


def test_tests_are_called_by_their_tokens_not_by_their_names(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy.txt").write_text(corpus.read_text() + " w1 w2 w3")
    trial = EvaluationText(str(corpus), 32, 4)
    same = read(folders["llama"], a=trial, b=EvaluationText(str(tmp_path / "copy.txt"), 32, 4))
    assert same.keys["a"] == same.keys["b"]
    others = read(folders["llama"], a=trial, b=EvaluationText(str(corpus), 16, 8), c=EvaluationText(str(corpus), 32, 3))
    assert len(set(others.keys.values())) == 3
    assert others.keys["a"] == same.keys["a"]
    short = tmp_path / "short.txt"
    short.write_text(tiny_models.prose(100))
    cut = read(folders["llama"], a=EvaluationText(str(short), 32, None), b=EvaluationText(str(short), 32, 9))
    assert cut.keys["a"] == cut.keys["b"]
    assert cut.about()["b"] | {"sha256": "?"} == {
        "name": "b",
        "sha256": "?",
        "window": 32,
        "windows": 3,
        "tokens": 96,
        "text_tokens": 100,
        "bos": None,
    }


def test_another_tokenizer_makes_other_texts(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folders["llama"], other)
    swap_two_words(other)
    trial = EvaluationText(str(corpus), 32, 4)
    here, there = read(folders["llama"], a=trial), read(other, a=trial)
    assert here.calibration.sha256 == there.calibration.sha256
    assert token_digest(here.calibration.ids) != token_digest(there.calibration.ids)
    assert here.keys != there.keys


def test_windows_begin_with_bos_where_the_tokenizer_puts_it(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(folders["llama"], other)
    tiny_models.beginning().save_pretrained(other)
    trial, store = EvaluationText(str(corpus), 32, 4), open_model(other)
    on, off, none = (
        read(other, a=trial),
        read_texts(store, corpus, {"a": trial}, False),
        read(folders["llama"], a=trial),
    )
    assert (on.bos, off.bos, none.bos) == ("<s>", None, None)
    assert on.tests["a"].ids[:, 0].eq(1).all()
    assert off.tests["a"].ids[:, 0].eq(1).tolist() == [True, False, False, False]
    assert len({text.keys["a"] for text in (on, off, none)}) == 3
    assert on.about()["a"]["bos"] == "<s>"
    assert (on.about()["a"]["tokens"], off.about()["a"]["tokens"]) == (4 * 31, 4 * 32)


def swap_two_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    text = path.read_text()
    assert '"w3": 6' in text
    path.write_text(text.replace('"w3": 6', '"w3": ?').replace('"w4": 7', '"w4": 6').replace('"w3": ?', '"w3": 7'))


def test_a_window_that_does_not_fit_is_refused(folders: dict[str, Path], corpus: Path) -> None:
    with pytest.raises(InputError, match="does not fit a model of 128 positions"):
        read(folders["llama"], a=EvaluationText(str(corpus), 4096, None))
