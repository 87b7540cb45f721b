"""An export says which texts llama.cpp cuts otherwise than the tokenizer, by name, and what a file cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
from gguf_reading import written
from missing_packages import LLAMA_CPP, hide
from tiny_tokenizers import ROWS, byte_level, pieces
from tokenizers import AddedToken

from gyroquant.models.stores.packed import PackedStore

BY = ["llama.cpp", "gyroquant's reader of GGUF"]


@pytest.fixture(params=BY)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who compares: llama.cpp, or our own reader as if that was not installed."""
    if request.param != "llama.cpp":
        hide(monkeypatch, *LLAMA_CPP)
    return str(request.param)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    """A rounded model with rows enough for the tokenizers here."""
    return saved_models.rounded(
        tiny_models.build("llama", vocab_size=ROWS), tmp_path_factory.mktemp("talking") / "ours"
    )


def exported(store: PackedStore, tokenizer: Any, out: Path) -> tuple[dict[str, Any], list[str]]:
    tokenizer.save_pretrained(store.folder)
    facts = written(store, out)[0]
    return facts["tokenizer"], facts["notes"]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "pieces"])
def test_what_is_the_same_has_no_notes(kind: str, by: str, talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = pieces() if kind == "pieces" else byte_level(kind)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    facts, notes = exported(talking, tokenizer, tmp_path / "gguf")
    assert notes == []
    assert (facts["compared_by"], facts["texts_that_differ"], facts["examples"]) == (by, 0, [])
    assert facts["texts"] > 40


RULED = {
    "lstrip": AddedToken("<mask>", lstrip=True, normalized=False, special=True),
    "rstrip": AddedToken("<call>", rstrip=True, normalized=False, special=True),
    "single_word": AddedToken("an", single_word=True, normalized=False),
}


@pytest.mark.parametrize("rule", RULED)
def test_rules_of_added_tokens_are_named(rule: str, by: str, talking: PackedStore, tmp_path: Path) -> None:
    tokenizer, token = byte_level("gpt-2"), RULED[rule]
    tokenizer.add_tokens([token])
    facts, notes = exported(talking, tokenizer, tmp_path / "gguf")
    assert any(token.content in note and f"({rule})" in note for note in notes)
    (counted,) = [note for note in notes if "gives other tokens than the tokenizer for" in note]
    assert counted.startswith(by)
    assert f"the added token {token.content}" in counted
    assert facts["texts_that_differ"] == len(facts["examples"]) > 0
    assert all(one["tokenizer"] != one["file"] for one in facts["examples"])


def test_other_letters_after_normalizing_are_named(by: str, talking: PackedStore, tmp_path: Path) -> None:
    facts, notes = exported(talking, byte_level("qwen2"), tmp_path / "gguf")
    assert [one["what"] for one in facts["examples"]] == ["combining accents"]
    assert any("1 of" in note and "combining accents" in note for note in notes)


def test_without_a_tokenizer_there_is_nothing_to_compare(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "ours")
    assert written(store, tmp_path / "gguf")[0]["tokenizer"] is None
