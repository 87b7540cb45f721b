"""The tokenizer of a GGUF file as llama.cpp runs it (src/llama-vocab.cpp there), built with the tokenizers library.

Two kinds are built: byte-level BPE ("gpt2"), whose way to cut out words the file names, and sentencepiece ("llama"),
where the piece of the highest score is joined first. transformers' own reader cuts words of most names as GPT-2 does
and puts no space after special tokens; others than these two are left to it, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gyroquant.errors import InputError
from gyroquant.models.gguf_check import read_strings
from gyroquant.models.gguf_file import GgufFile
from gyroquant.models.store import load_tokenizer

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN35 = _ENDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"  # by ASCII alone: llama.cpp's stand-in for case
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How words are cut out, one pattern after the other, by the names for it; whether words that are tokens stay whole; and
# whether a text starts with bos where the file does not say.
_CUTS: tuple[tuple[tuple[str, ...], str, bool, bool], ...] = (
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
    """The tokenizer of a file. Raises InputError where it has none, or a damaged one."""
    found = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    kind, pre = found.get("ggml.model"), found.get("ggml.pre", "default")
    if kind in (None, "none", "no_vocab"):
        raise InputError(f"{label} has no usable tokenizer: the file says that there is none (tokenizer.ggml.model)")
    cut = next((cut for cut in _CUTS if pre in cut[1].split()), None)
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and cut is None):
        what = f"kind {kind!r}" if kind != "gpt2" else f"pre-tokenizer {pre!r}"
        warnings.warn(
            f"{label}: transformers reads its tokenizer, of the {what}; it may cut text otherwise than llama.cpp does",
            stacklevel=2,
        )
        return load_tokenizer(file.path.parent, label, gguf_file=file.path.name)
    strings = read_strings(file.path, (_TOKENS, _MERGES))
    tokens = strings.get(_TOKENS, [])
    types = found.get("ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens) or not tokens or len(set(tokens)) != len(tokens):
        raise InputError(f"{label} has no usable tokenizer: its {len(tokens)} tokens are not one of each, with a type")
    try:
        if kind == "gpt2":
            assert cut is not None
            made = _byte_level(tokens, [tuple(merge.split(" ", 1)) for merge in strings.get(_MERGES, [])], cut)
        else:
            made = _sentencepiece(tokens, types, found)
        _add_tokens(made, tokens, types, found)
        starts = cut[3] if cut is not None and kind == "gpt2" else True
        return _finished(made, tokens, found, starts)
    except Exception as error:  # the library raises plain exceptions for merges without tokens and the like
        raise InputError(f"{label} has no usable tokenizer: {error}") from error


def _byte_level(tokens: Sequence[str], merges: list[Any], cut: tuple[Any, ...]) -> Tokenizer:
    patterns, _, whole, _ = cut
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=whole)
    made = Tokenizer(model)
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(tokens: Sequence[str], types: Sequence[int], found: Mapping[str, Any]) -> Tokenizer:
    vocabulary, scores = {token: i for i, token in enumerate(tokens)}, found["ggml.scores"]
    pieces = sorted(range(len(tokens)), key=lambda i: -scores[i])
    merges = [pair for i in pieces for pair in _pairs(tokens[i], vocabulary)]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    escaped = normalizers.Replace(" ", _SPACE)
    prefixed = found.get("ggml.add_space_prefix", True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escaped]) if prefixed else escaped
    tail = [decoders.Strip(" ", 1, 0)] if prefixed else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return made


def _pairs(piece: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The ways to join a piece of two."""
    for at in range(1, len(piece)):
        if piece[:at] in vocabulary and piece[at:] in vocabulary:
            yield piece[:at], piece[at:]


def _add_tokens(made: Tokenizer, tokens: Sequence[str], types: Sequence[int], found: Mapping[str, Any]) -> None:
    """Makes tokens that llama.cpp finds in a text before anything else added ones."""
    name = str(found.get("general.name", "")).lower()
    stripping = "phi-3" in name or "phi3" in name  # llama.cpp's own rule
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            rstrip = stripping and token not in ("<unk>", "<s>", "<|endoftext|>")
            special = kind != TokenType.USER_DEFINED
            made.add_tokens([AddedToken(token, normalized=False, special=special, rstrip=rstrip)])


def _finished(made: Tokenizer, tokens: Sequence[str], found: Mapping[str, Any], starts: bool) -> Any:
    """The tokenizer as transformers has it, with what stands at both ends of a text."""
    named = {kind: found.get(f"ggml.{key}_token_id") for kind, key in _NAMED.items()}
    if found["ggml.model"] == "llama":  # llama.cpp's defaults
        named = {"bos": 1, "eos": 2, "unk": 0} | {kind: number for kind, number in named.items() if number is not None}
    special = {f"{kind}_token": tokens[i] for kind, i in named.items() if i is not None and 0 <= i < len(tokens)}
    ends = [
        special[f"{kind}_token"] if found.get(f"ggml.add_{kind}_token", usual) and f"{kind}_token" in special else ""
        for kind, usual in (("bos", starts), ("eos", False))
    ]
    if any(ends):
        template = [part for part in (ends[0], "$A", ends[1]) if part]
        around = [(token, tokens.index(token)) for token in dict.fromkeys(end for end in ends if end)]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    if isinstance(written := found.get("chat_template"), str):
        tokenizer.chat_template = written
    return tokenizer
