"""The tokenizer of a GGUF file as llama.cpp runs it (src/llama-vocab.cpp there), built with the tokenizers library.

This module builds two kinds: byte-level BPE ("gpt2"), for which the file names a pre-tokenizer, and sentencepiece
("llama"), which joins the piece of the highest score first. For these two, the reader of transformers differs from
llama.cpp: it splits words as GPT-2 does for most names, and puts no space after special tokens. transformers reads all
other kinds, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gyroquant.errors import InputError
from gyroquant.models.stores.base import load_tokenizer
from gyroquant.models.stores.gguf.check import read_strings
from gyroquant.models.stores.gguf.file import GgufFile

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"  # llama.cpp replaces case by ASCII letters
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizers. Each entry: the patterns that split words, applied in this order; the names of the pre-tokenizer;
# whether a word that is a token stays whole; whether a text starts with BOS if the file does not state it.
PRE_TOKENIZERS: tuple[tuple[tuple[str, ...], str, bool, bool], ...] = (
    ((_GPT2,), "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion", False, False),
    ((r"\p{N}", _GPT2), "starcoder refact command-r smollm codeshell exaone minerva-7b", False, False),
    ((_QWEN2,), "qwen2 stablelm2 deepseek-r1-qwen kormo f2llmv2 hunyuan", False, False),
    ((_QWEN35,), "qwen35", False, False),
    ((_LLAMA3,), "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", True, True),
    ((_LLAMA3,), "smaug-bpe dbrx chatglm-bpe", False, False),
    ((_LLAMA3,), "glm4", True, False),
    ((_TEKKEN,), "tekken", True, True),
    ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"), "default", False, False),
)


def read_tokenizer(file: GgufFile, label: str) -> Any:
    """The tokenizer of a file. Raises InputError if it does not have one, or if it is damaged."""
    settings = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    kind, pre = settings.get("ggml.model"), settings.get("ggml.pre", "default")
    if kind in (None, "none", "no_vocab"):
        raise InputError(f"{label} has no usable tokenizer: the file states that there is none (tokenizer.ggml.model)")
    cut = next((cut for cut in PRE_TOKENIZERS if pre in cut[1].split()), None)
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and cut is None):
        unsupported = f"kind {kind!r}" if kind != "gpt2" else f"pre-tokenizer {pre!r}"
        warnings.warn(
            f"{label}: transformers reads its tokenizer, of the {unsupported}; it may split text "
            "differently from llama.cpp",
            stacklevel=2,
        )
        return load_tokenizer(file.path.parent, label, gguf_file=file.path.name)
    strings = read_strings(file.path, (_TOKENS, _MERGES))
    tokens = strings.get(_TOKENS, [])
    types = settings.get("ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens) or not tokens or len(set(tokens)) != len(tokens):
        raise InputError(
            f"{label} has no usable tokenizer: its {len(tokens)} tokens repeat, or some of them have no type; "
            "convert the model again"
        )
    try:
        if kind == "gpt2":
            assert cut is not None
            tokenizer = _byte_level(tokens, [tuple(merge.split(" ", 1)) for merge in strings.get(_MERGES, [])], cut)
        else:
            tokenizer = _sentencepiece(tokens, types, settings)
        _add_tokens(tokenizer, tokens, types, settings)
        starts = cut[3] if cut is not None and kind == "gpt2" else True
        return _with_special_tokens(tokenizer, tokens, settings, starts)
    except Exception as error:  # the library raises plain exceptions, for merges without tokens for example
        raise InputError(f"{label} has no usable tokenizer: {error}") from error


def _byte_level(tokens: Sequence[str], merges: list[Any], cut: tuple[Any, ...]) -> Tokenizer:
    patterns, _, whole, _ = cut
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=whole)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: Sequence[str], types: Sequence[int], settings: Mapping[str, Any]) -> Tokenizer:
    vocabulary, scores = {token: i for i, token in enumerate(tokens)}, settings["ggml.scores"]
    pieces = sorted(range(len(tokens)), key=lambda i: -scores[i])
    merges = [pair for i in pieces for pair in _pairs(tokens[i], vocabulary)]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    escaped = normalizers.Replace(" ", _SPACE)
    prefixed = settings.get("ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escaped]) if prefixed else escaped
    tail = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return tokenizer


def _pairs(piece: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that join to this piece."""
    for split in range(1, len(piece)):
        if piece[:split] in vocabulary and piece[split:] in vocabulary:
            yield piece[:split], piece[split:]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int], settings: Mapping[str, Any]) -> None:
    """Adds the tokens that llama.cpp matches in a text before it splits words."""
    name = str(settings.get("general.name", "")).lower()
    stripping = "phi-3" in name or "phi3" in name  # llama.cpp's own rule
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            rstrip = stripping and token not in ("<unk>", "<s>", "<|endoftext|>")
            special = kind != TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special, rstrip=rstrip)])


def _with_special_tokens(core: Tokenizer, tokens: Sequence[str], settings: Mapping[str, Any], starts: bool) -> Any:
    """The tokenizer as a class of transformers, with the special tokens at both ends of a text."""
    named = {kind: settings.get(f"ggml.{key}_token_id") for kind, key in _NAMED.items()}
    if settings["ggml.model"] == "llama":  # llama.cpp's defaults
        named = {"bos": 1, "eos": 2, "unk": 0} | {kind: number for kind, number in named.items() if number is not None}
    special = {f"{kind}_token": tokens[i] for kind, i in named.items() if i is not None and 0 <= i < len(tokens)}
    ends = [
        special[f"{kind}_token"]
        if settings.get(f"ggml.add_{kind}_token", default) and f"{kind}_token" in special
        else ""
        for kind, default in (("bos", starts), ("eos", False))
    ]
    if any(ends):
        sequence = [part for part in (ends[0], "$A", ends[1]) if part]
        around = [(token, tokens.index(token)) for token in dict.fromkeys(end for end in ends if end)]
        core.post_processor = processors.TemplateProcessing(single=sequence, special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
    if isinstance(template := settings.get("chat_template"), str):
        tokenizer.chat_template = template
    return tokenizer
