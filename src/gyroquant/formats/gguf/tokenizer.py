"""Writes a tokenizer to a GGUF file: llama.cpp's name of its pre-tokenizer, the tokens, and merges or scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import gguf

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.tokenizer import PRE_TOKENIZERS
from gyroquant.models.stores.packed import PackedStore


def add_tokenizer(writer: gguf.GGUFWriter, store: PackedStore) -> tuple[Any, list[str]]:
    """Writes the tokenizer. If a GGUF file cannot express it, the file states that there is none, because nobody would
    notice an almost right one. Returns the tokenizer, or None, and notes.
    """
    notes: list[str] = []
    tokenizer: Any = None
    try:
        tokenizer = store.tokenizer()
        fields = _vocabulary(tokenizer, store.config, notes)
    except InputError as error:
        tokenizer = None
        fields = {"tokenizer_model": "none"}
        notes = [f"the file has no tokenizer, so llama.cpp reads and writes token ids only: {error}"]
    for field, value in fields.items():
        getattr(writer, f"add_{field}")(value)
    return tokenizer, notes


def _vocabulary(tokenizer: Any, config: Any, notes: list[str]) -> dict[str, Any]:
    """The fields of a tokenizer by the names of the gguf package, with one token for each row of the embedding. Adds to
    `notes`. Raises InputError for a tokenizer that llama.cpp does not support.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    spec: Any = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    if spec["model"]["type"] != "BPE" or not spec["model"]["merges"]:
        raise InputError(f"its tokenizer (of type {spec['model']['type']}) is not BPE with merges")
    rows = config.vocab_size
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    notes += _rules(spec)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(gguf.TokenType.UNUSED)] * rows
    vocab = backend.get_vocab(with_added_tokens=True)
    for token, i in vocab.items():
        if i < rows:
            kind = gguf.TokenType.CONTROL if added.get(i) else gguf.TokenType.USER_DEFINED
            tokens[i], types[i] = token, int(kind if i in added else gguf.TokenType.NORMAL)
    if max(vocab.values()) >= rows:
        notes.append(f"tokens from {rows} on have no row in the embedding and are left out")
    fields: dict[str, Any] = {"token_list": tokens, "token_types": types}
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        number = getattr(config, f"{kind}_token_id", None) if number is None else number
        if isinstance(number, int) and number < rows:
            fields[f"{kind}_token_id"] = number
    around = backend.encode("").ids
    fields["add_bos_token"] = around[:1] == [fields.get("bos_token_id")]
    fields["add_eos_token"] = around[fields["add_bos_token"] :] == [fields.get("eos_token_id")]
    if len(around) != fields["add_bos_token"] + fields["add_eos_token"]:
        raise InputError(f"its tokenizer adds the tokens {around} to a text, not only bos and eos")
    if template := tokenizer.chat_template:
        named = template.items() if isinstance(template, dict) else ()
        fields["chat_template"] = [{"name": name, "template": text} for name, text in named] or template
    return (_sentencepiece if spec["model"]["byte_fallback"] else _byte_level)(spec, fields, notes)


_RULES = {
    "lstrip": "includes the spaces before it",
    "rstrip": "includes the spaces after it",
    "single_word": "matches whole words only",
    "normalized": "matches normalized text",
}


def _rules(spec: Mapping[str, Any]) -> Iterable[str]:
    """Notes on the rules of added tokens that a GGUF file cannot express."""
    composing = spec["normalizer"] in (None, {"type": "NFC"})  # these leave ASCII unchanged
    for rule, text in _RULES.items():
        with_rule = [token["content"] for token in spec["added_tokens"] if token[rule]]
        names = [name for name in with_rule if rule != "normalized" or not (composing and name.isascii())]
        if names and (rule != "normalized" or spec["normalizer"]):
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            yield f"the added token {listed} {text} ({rule}); GGUF cannot express this, so in llama.cpp it does not"


# llama.cpp's names of pre-tokenizers, by their steps and by `ignore_merges`: whether words that are tokens stay whole.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_TEKKEN, "bytes"), True): "tekken",
}
for _patterns, _names, _whole, _ in PRE_TOKENIZERS:  # a tokenizer that was itself read from a GGUF file has these steps
    _PRE.setdefault(((*_patterns, "bytes"), _whole), _names.split()[0])


def _byte_level(spec: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The fields of a byte-level tokenizer: `fields`, its pre-tokenizer and its merges."""
    whole, normalizer = spec["pre_tokenizer"] or {"type": None}, spec["normalizer"]
    steps = tuple(_step(step) for step in whole.get("pretokenizers", [whole]))
    pre = _PRE.get((steps, spec["model"]["ignore_merges"]))
    if pre is None or normalizer not in (None, {"type": "NFC"}):
        raise InputError(f"llama.cpp does not split text as its tokenizer does: {json.dumps([normalizer, whole])}")
    if normalizer:
        notes.append("llama.cpp does not normalize text to NFC, as the tokenizer does: give it text in NFC")
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        **fields,
        "token_merges": merges,
        "add_space_prefix": False,
    }


def _step(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    regex = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return str(step["pattern"].get("Regex")) if regex else "unknown"


def _sentencepiece(spec: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The fields of a sentencepiece tokenizer: `fields`, how it writes spaces, and the scores of its pieces. llama.cpp
    applies the merge whose result has the highest score first, so the merges have to be sorted by the piece that they
    make.
    """
    normalizer, whole = spec["normalizer"] or {"normalizers": []}, spec["pre_tokenizer"]
    steps = [tuple(step.values()) for step in normalizer.get("normalizers", [normalizer])]
    written = ("Replace", {"String": " "}, "\u2581")
    prefixed = whole is None and steps == [("Prepend", "\u2581"), written]
    if whole and whole["type"] == "Metaspace" and not whole["split"] and not steps:
        prefixed = whole["prepend_scheme"] != "never"
        if whole["prepend_scheme"] == "first":
            notes.append("llama.cpp adds a space before text that follows a special token, the tokenizer does not")
    elif not prefixed and (whole is not None or steps != [written]):
        raise InputError(f"llama.cpp does not write spaces as its tokenizer does: {json.dumps([normalizer, whole])}")
    pieces = [piece for piece, _ in groupby("".join(pair) for pair in spec["model"]["merges"])]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    if len(ranks) != len(pieces):
        raise InputError(
            "the merges of its tokenizer are not sorted by the piece that they make; llama.cpp requires it"
        )
    types = list(fields["token_types"])
    for i, token in enumerate(fields["token_list"]):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = int(gguf.TokenType.BYTE)
    if "unk_token_id" in fields:
        types[fields["unk_token_id"]] = int(gguf.TokenType.UNKNOWN)
    scores = [-float(ranks.get(token, len(ranks))) for token in fields["token_list"]]
    rest = {"token_types": types, "token_scores": scores, "add_space_prefix": prefixed}
    return {"tokenizer_model": "llama", **fields, **rest}
