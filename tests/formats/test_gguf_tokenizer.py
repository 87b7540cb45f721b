"""The tokenizer of a GGUF file gives the ids of the original's, or is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
from gguf_reading import written
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gyroquant.models.stores.packed import PackedStore

TEXTS = ["Hello world, it's 2026!", "  two  spaces\n\nand 1234567 digits", "ünïcödé <|end|>and x == y;\t", "<tool>a b"]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROWS = 400


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


CUTS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (words(), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words()]), False),
    "qwen2": (split(QWEN2), False),
    "llama-bpe": (split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), True),
    "smaug-bpe": (split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), False),
    "unknown": (split(r"\p{N}+|\p{L}+"), False),
    "prefixed": (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
}


def byte_level(cut: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the texts above, that puts <|start|> in front of a text."""
    pre_tokenizer, whole = CUTS[cut]
    raw = Tokenizer(models.BPE(ignore_merges=whole))
    raw.pre_tokenizer, raw.decoder = pre_tokenizer, decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    raw.add_tokens(["<tool>"])
    raw.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    if cut == "qwen2":
        raw.normalizer = normalizers.NFC()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|start|>", eos_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as sentencepiece makes them: every way to make a piece is a merge, in the order of the pieces."""
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "\u2581")} - {"ü", "\n", "\t"})
    made = [
        "\u2581a",
        "an",
        "nd",
        "in",
        "wo",
        "it",
        "\u2581\u2581",
        "and",
        "\u2581and",
        "wor",
        "\u2581wor",
        "it'",
        "12",
        "34",
        "1234",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *made, *letters]
    known = set(tokens)
    merges = [
        (piece[:k], piece[k:])
        for piece in made
        for k in range(1, len(piece))
        if piece[:k] in known and piece[k:] in known
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


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
