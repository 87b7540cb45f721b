"""A tokenizer as llama.cpp has it: the way it cuts out words by its name there, pieces, merges or scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import gguf

from gyroquant.errors import InputError
from gyroquant.models.packed import PackedStore


def add_tokenizer(writer: gguf.GGUFWriter, store: PackedStore) -> tuple[Any, list[str]]:
    """Writes the tokenizer. Where it cannot be expressed, the file says that there is none: nobody would notice a
    nearly right one. Returns the tokenizer, if there is one, and what there is to note.
    """
    notes: list[str] = []
    tokenizer: Any = None
    try:
        tokenizer = store.tokenizer()
        fields = _vocabulary(tokenizer, store.config, notes)
    except InputError as error:
        tokenizer = None
        fields = {"tokenizer_model": "none"}
        notes = [f"the file has no tokenizer, so that llama.cpp takes and gives token ids only: {error}"]
    for field, value in fields.items():
        getattr(writer, f"add_{field}")(value)
    return tokenizer, notes


def _vocabulary(tokenizer: Any, config: Any, notes: list[str]) -> dict[str, Any]:
    """A tokenizer under the names of the gguf package, with one token for each row of the embedding. Adds what there is
    to note. Raises InputError for a tokenizer that llama.cpp does not have.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    spec: Any = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    if spec["model"]["type"] != "BPE" or not spec["model"]["merges"]:
        raise InputError(f"its tokenizer (of type {spec['model']['type']}) is not one of BPE with merges")
    rows = config.vocab_size
    added = {one["id"]: one["special"] for one in spec["added_tokens"]}
    notes += _rules(spec)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(gguf.TokenType.UNUSED)] * rows
    found = backend.get_vocab(with_added_tokens=True)
    for token, i in found.items():
        if i < rows:
            kind = gguf.TokenType.CONTROL if added.get(i) else gguf.TokenType.USER_DEFINED
            tokens[i], types[i] = token, int(kind if i in added else gguf.TokenType.NORMAL)
    if max(found.values()) >= rows:
        notes.append(f"tokens from {rows} on have no row in the embedding and were left out")
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
        raise InputError(f"its tokenizer puts the tokens {around} around a text, not only bos and eos")
    if template := tokenizer.chat_template:
        named = template.items() if isinstance(template, dict) else ()
        fields["chat_template"] = [{"name": name, "template": text} for name, text in named] or template
    return (_sentencepiece if spec["model"]["byte_fallback"] else _byte_level)(spec, fields, notes)


_RULES = {
    "lstrip": "takes the spaces in front of it with it",
    "rstrip": "takes the spaces behind it with it",
    "single_word": "is found as a whole word only",
    "normalized": "is found in normalized text",
}


def _rules(spec: Mapping[str, Any]) -> Iterable[str]:
    """What added tokens are found by that a GGUF file cannot say."""
    composing = spec["normalizer"] in (None, {"type": "NFC"})  # which leaves ASCII as it is
    for rule, text in _RULES.items():
        found = [one["content"] for one in spec["added_tokens"] if one[rule]]
        names = [name for name in found if rule != "normalized" or not (composing and name.isascii())]
        if names and (rule != "normalized" or spec["normalizer"]):
            which = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            yield f"the added token {which} {text} ({rule}), which a GGUF file cannot say: in llama.cpp it does not"


# How words are cut out of a text: the steps of a pre-tokenizer, and whether words that are tokens are taken whole.
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


def _byte_level(spec: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The rest of a byte-level tokenizer: how it cuts out words, and its merges."""
    whole, normalizer = spec["pre_tokenizer"] or {"type": None}, spec["normalizer"]
    steps = tuple(_step(one) for one in whole.get("pretokenizers", [whole]))
    pre = _PRE.get((steps, spec["model"]["ignore_merges"]))
    if pre is None or normalizer not in (None, {"type": "NFC"}):
        raise InputError(f"llama.cpp does not cut out words as its tokenizer does: {json.dumps([normalizer, whole])}")
    if normalizer:
        notes.append("llama.cpp does not normalize text to NFC as the tokenizer does: give it text that is")
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        **fields,
        "token_merges": merges,
        "add_space_prefix": False,
    }


def _step(one: Mapping[str, Any]) -> str:
    if one["type"] == "ByteLevel" and not one["add_prefix_space"]:
        return "words" if one["use_regex"] else "bytes"
    if one["type"] == "Digits" and one["individual_digits"]:
        return "digits"
    regex = one["type"] == "Split" and one["behavior"] == "Isolated" and not one["invert"]
    return str(one["pattern"].get("Regex")) if regex else "unknown"


def _sentencepiece(spec: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The rest of a tokenizer as sentencepiece makes them: how it writes spaces, and the scores of its pieces. What
    makes the piece of the highest score is joined first, so merges have to be sorted by the piece that they make.
    """
    normalizer, whole = spec["normalizer"] or {"normalizers": []}, spec["pre_tokenizer"]
    steps = [tuple(one.values()) for one in normalizer.get("normalizers", [normalizer])]
    written = ("Replace", {"String": " "}, "\u2581")
    prefixed = whole is None and steps == [("Prepend", "\u2581"), written]
    if whole and whole["type"] == "Metaspace" and not whole["split"] and not steps:
        prefixed = whole["prepend_scheme"] != "never"
        if whole["prepend_scheme"] == "first":
            notes.append("llama.cpp puts a space in front of text behind special tokens too, the tokenizer does not")
    elif not prefixed and (whole is not None or steps != [written]):
        raise InputError(f"llama.cpp does not write spaces as its tokenizer does: {json.dumps([normalizer, whole])}")
    pieces = [piece for piece, _ in groupby("".join(pair) for pair in spec["model"]["merges"])]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    if len(ranks) != len(pieces):
        raise InputError("the merges of its tokenizer are not sorted by the pieces that they make, as llama.cpp's are")
    types = list(fields["token_types"])
    for i, token in enumerate(fields["token_list"]):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = int(gguf.TokenType.BYTE)
    if "unk_token_id" in fields:
        types[fields["unk_token_id"]] = int(gguf.TokenType.UNKNOWN)
    scores = [-float(ranks.get(token, len(ranks))) for token in fields["token_list"]]
    rest = {"token_types": types, "token_scores": scores, "add_space_prefix": prefixed}
    return {"tokenizer_model": "llama", **fields, **rest}
