"""Compares the tokens of a GGUF file with those of the tokenizer from which it was made, on a set of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gyroquant.formats.gguf.header import why_not_llama_cpp
from gyroquant.formats.gguf.llama_cpp import Vocabulary, installed
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.tokenizer import read_tokenizer
from gyroquant.models.stores.tokenizer_texts import texts

_EXAMPLES = 20  # differing texts that are reported in full


def compare_tokenizers(path: Path, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """Compares a file's tokenizer with the original on a set of texts. llama.cpp reads the file, or our own reader if
    llama.cpp is not installed or does not read it.

    Returns facts (the reader, the counts of texts, examples that differ) and notes.
    """
    reader, tokenize = _reader(path)
    tried, differ = 0, []
    for label, text in texts(tokenizer):
        tried += 1
        expected, actual = tokenizer(text)["input_ids"], tokenize(text)
        if expected != actual:
            both = {"tokenizer": expected, "file": actual}
            tokens = {key: tokenizer.convert_ids_to_tokens(ids) for key, ids in both.items()}
            differ.append({"what": label, "text": text, **tokens})
    facts = {"compared_by": reader, "texts": tried, "texts_that_differ": len(differ), "examples": differ[:_EXAMPLES]}
    if not differ:
        return facts, []
    names = list(dict.fromkeys(difference["what"] for difference in differ))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return facts, [
        f"{reader} gives other tokens than the tokenizer for {len(differ)} of {tried} texts: "
        f"{', '.join(names[:8])}{more}"
    ]


def _reader(path: Path) -> tuple[str, Callable[[str], list[int]]]:
    if installed() and not why_not_llama_cpp(path):
        return "llama.cpp", Vocabulary(path)
    read = read_tokenizer(GgufFile(path), str(path))
    return "gyroquant's reader of GGUF", lambda text: list(read(text)["input_ids"])
