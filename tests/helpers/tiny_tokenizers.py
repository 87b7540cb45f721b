"""Tokenizers trained on a few texts, cut as those of well-known models are, and one as sentencepiece makes them."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
