"""The tokenizer of a GGUF file gives the ids that llama.cpp gives."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gyroquant.errors import InputError
from gyroquant.formats.gguf.llama_cpp import Vocabulary
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.tokenizer import PRE_TOKENIZERS, read_tokenizer
from gyroquant.models.stores.tokenizer_texts import TEXTS, texts

NAMES = [cut[1].split()[-1] for cut in PRE_TOKENIZERS]


@pytest.fixture(scope="module")
def merged() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level tokenizer whose merges run across words, so that every cut shows."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>", "</s>"]
    )
    raw.train_from_iterator(list(TEXTS.values()) * 4, trainer)
    model = json.loads(raw.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(pair) for pair in model["merges"]]


def write(path: Path, **fields: Any) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    for field, value in fields.items():
        getattr(writer, f"add_{field}")(value)
    writer.add_tensor("token_embd.weight", np.ones((3, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def byte_level(path: Path, merged: tuple[list[str], list[str]], pre: str, **more: Any) -> GgufFile:
    tokens, merges = merged
    fields = {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_list": [*tokens, "<think>"]}
    fields |= {"token_types": [3, 3, *[1] * (len(tokens) - 2), 4], "token_merges": merges}
    return write(path, **fields, bos_token_id=0, eos_token_id=1, **more)


def sentencepiece(path: Path, **more: Any) -> GgufFile:
    letters = sorted({letter for text in TEXTS.values() for letter in text.replace(" ", "\u2581") if letter >= " "})
    made = [
        "\u2581a",
        "an",
        "nd",
        "in",
        "\u2581\u2581",
        "and",
        "\u2581and",
        "12",
        "34",
        "1234",
        "he",
        "the",
        "\u2581the",
    ]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *made,
        *letters,
        "<think>",
        "<|endoftext|>",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(made) + len(letters)), 4, 3]
    scores = [0.0] * 259 + [-float(i) for i in range(len(made) + len(letters))] + [0.0, 0.0]
    return write(
        path, tokenizer_model="llama", tokenizer_pre="default", token_list=tokens, token_types=types,
        token_scores=scores, **more,
    )  # fmt: skip


def same(path: Path, file: GgufFile) -> Any:
    tokenizer, theirs = read_tokenizer(file, "it"), Vocabulary(path)
    for what, text in texts(tokenizer):
        assert tokenizer(text)["input_ids"] == theirs(text), (what, text)
    return tokenizer


@pytest.mark.parametrize("pre", NAMES)
def test_words_are_cut_as_in_llama_cpp(pre: str, merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    same(tmp_path / "m.gguf", byte_level(tmp_path / "m.gguf", merged, pre))


@pytest.mark.parametrize("ends", [{"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_what_stands_around_a_text(ends: dict[str, bool], merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    for pre in ("llama-bpe", "qwen2"):
        same(tmp_path / "m.gguf", byte_level(tmp_path / "m.gguf", merged, pre, **ends))


@pytest.mark.parametrize("settings", [{}, {"add_space_prefix": False}, {"add_bos_token": False}])
def test_pieces_are_joined_as_in_llama_cpp(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = same(tmp_path / "m.gguf", sentencepiece(tmp_path / "m.gguf", **settings))
    assert tokenizer.bos_token == "<s>"


def test_phi3_by_its_name_takes_spaces_behind_special_tokens(tmp_path: Path) -> None:
    tokenizer = same(tmp_path / "m.gguf", sentencepiece(tmp_path / "m.gguf", name="My Phi-3 mini"))
    assert tokenizer("<think>  a")["input_ids"] == tokenizer("<think>a")["input_ids"]


def test_texts_come_back(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    for file in (byte_level(tmp_path / "a.gguf", merged, "gpt-2"), sentencepiece(tmp_path / "b.gguf")):
        tokenizer = read_tokenizer(file, "it")
        for text in TEXTS.values():
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_what_transformers_has_to_read_is_said(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    file = byte_level(tmp_path / "m.gguf", merged, "viking")
    with pytest.warns(UserWarning, match="transformers reads its tokenizer, of the pre-tokenizer 'viking'"):
        read_tokenizer(file, "it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_tokenizer(byte_level(tmp_path / "m.gguf", merged, "smollm"), "it")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_model": "none"}, "states that there is none"),
        ({"tokenizer_model": "llama", "token_list": ["a", "a"], "token_types": [1, 1]}, "its 2 tokens repeat, or some"),
        ({"tokenizer_model": "llama", "token_list": ["a", "b"], "token_types": [1]}, "its 2 tokens repeat, or some"),
        (
            {"tokenizer_model": "llama", "token_list": ["a", "b"], "token_types": [1, 1]},
            "no usable tokenizer: 'ggml.sc",
        ),
        ({"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": ["a"], "token_merges": ["a b"]}, "usable"),
    ],
)
def test_damaged_tokenizers_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_tokenizer(write(tmp_path / "m.gguf", **fields), "it")
