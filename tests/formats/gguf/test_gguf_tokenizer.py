"""The tokenizer of a GGUF file gives the ids of the original's, or is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
from gguf_reading import written
from tiny_tokenizers import ROWS, TEXTS, byte_level, pieces
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.tokenizer import read_tokenizer
from gyroquant.models.stores.packed import PackedStore


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    """A rounded model with rows enough for the tokenizers above."""
    return saved_models.rounded(
        tiny_models.build("llama", vocab_size=ROWS), tmp_path_factory.mktemp("talking") / "ours"
    )


def with_tokenizer(store: PackedStore, tokenizer: Any, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts and the metadata of a file of this model with another tokenizer."""
    tokenizer.save_pretrained(store.folder)
    facts, metadata, _ = written(store, out)
    return facts, {key.removeprefix("tokenizer."): value for key, value in metadata.items() if "tokenizer." in key}


def same_ids(tokenizer: Any, out: Path, texts: list[str]) -> None:
    read = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    for text in texts:
        wanted = tokenizer.encode(text, add_special_tokens=False)
        assert read.encode(text, add_special_tokens=False) == wanted, text


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_byte_level_tokenizers(cut: str, talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = byte_level(cut)
    facts, found = with_tokenizer(talking, tokenizer, tmp_path / "gguf")
    assert any(" NFC" in note for note in facts["notes"]) == bool(facts["notes"]) == (cut == "qwen2")
    tokens, types = found.pop("ggml.tokens"), found.pop("ggml.token_type")
    merges = found.pop("ggml.merges")
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": cut,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": False,
        "chat_template": tokenizer.chat_template,
    }
    assert len(tokens) == len(types) == len(set(tokens)) == ROWS
    size = len(tokenizer)
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(list(range(size)))
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, ROWS)]
    assert types == [3, 3, *[1] * (size - 3), 4, *[5] * (ROWS - size)]
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [tuple(merge.split(" ")) for merge in merges] == [tuple(pair) for pair in spec["model"]["merges"]]
    if cut not in ("smollm", "llama-bpe"):  # transformers knows neither the first nor whole words
        same_ids(tokenizer, tmp_path / "gguf", TEXTS)


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_a_tokenizer_that_was_read_from_a_file_is_written_again(cut: str, talking: PackedStore, tmp_path: Path) -> None:
    """Its steps are those of our reader, not of the tokenizer from which that file was made."""
    with_tokenizer(talking, byte_level(cut), tmp_path / "first")
    read = read_tokenizer(GgufFile(tmp_path / "first" / "model.gguf"), "first")
    facts, found = with_tokenizer(talking, read, tmp_path / "again")
    assert facts["notes"] == []
    assert (found["ggml.model"], facts["tokenizer"]["texts_that_differ"]) == ("gpt2", 0)
    again = read_tokenizer(GgufFile(tmp_path / "again" / "model.gguf"), "again")
    assert again.backend_tokenizer.to_str() == read.backend_tokenizer.to_str()


@pytest.mark.parametrize("cut", ["unknown", "prefixed"])
def test_tokenizers_that_llama_cpp_has_not_are_left_out(cut: str, talking: PackedStore, tmp_path: Path) -> None:
    facts, found = with_tokenizer(talking, byte_level(cut), tmp_path / "gguf")
    assert found == {"ggml.model": "none"}
    (note,) = facts["notes"]
    assert "llama.cpp does not split text as its tokenizer does" in note


def test_tokenizers_of_sentencepiece(talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = pieces()
    facts, found = with_tokenizer(talking, tokenizer, tmp_path / "gguf")
    assert facts["notes"] == []
    scores, types = found["ggml.scores"], found["ggml.token_type"]
    assert (found["ggml.model"], found["ggml.add_space_prefix"], found["ggml.add_bos_token"]) == ("llama", True, True)
    assert "ggml.merges" not in found
    assert types[:4] == [2, 3, 3, 6]
    assert types.count(6) == 256
    assert scores[259:274] == [-i for i in range(15)]
    assert all(score < -14 for score in (*scores[:259], *scores[274:]))
    same_ids(tokenizer, tmp_path / "gguf", [text for text in TEXTS if "<" not in text and not text.startswith(" ")])
    for scheme in ("never", "first"):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        facts, found = with_tokenizer(talking, tokenizer, tmp_path / scheme)
        assert found["ggml.add_space_prefix"] == bool(facts["notes"]) == (scheme == "first")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["merges"] = spec["model"]["merges"][::2] + spec["model"]["merges"][1::2]
    mixed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>")
    facts, found = with_tokenizer(talking, mixed, tmp_path / "mixed")
    assert found == {"ggml.model": "none"}
    assert "not sorted by the piece" in facts["notes"][0]


def test_tokens_without_a_row_are_left_out(talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.pad_token = "<extra99>"
    facts, found = with_tokenizer(talking, tokenizer, tmp_path / "gguf")
    assert found["ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(ROWS)))
    assert "ggml.padding_token_id" not in found
    assert facts["notes"] == ["tokens from 400 on have no row in the embedding and are left out"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("qwen2"), tmp_path / "ours")
    for path in store.folder.glob("tokenizer*"):
        path.unlink()
    facts, metadata, _ = written(store, tmp_path / "gguf")
    assert metadata["tokenizer.ggml.model"] == "none"
    assert "the file has no tokenizer" in facts["notes"][-1]
