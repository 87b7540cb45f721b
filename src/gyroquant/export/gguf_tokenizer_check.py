"""The tokens that a GGUF file gives for a set of texts, beside those of the tokenizer that it was made from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gyroquant.export.llama_cpp import Vocabulary
from gyroquant.models.gguf_file import GgufFile
from gyroquant.models.gguf_tokenizer import read_tokenizer
from gyroquant.models.tokenizer_texts import texts

_KEPT = 20  # texts that differ, written down in full


def compare_tokenizers(path: Path, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """What llama.cpp makes of texts with a file's tokenizer, or our own reader of it where llama.cpp is not installed:
    by whom, how many texts, which of them come out otherwise and how; and what there is to note.
    """
    by, tokenize = _reader(path)
    tried, differ = 0, []
    for what, text in texts(tokenizer):
        tried += 1
        wanted, found = tokenizer(text)["input_ids"], tokenize(text)
        if wanted != found:
            both = {"tokenizer": wanted, "file": found}
            named = {key: tokenizer.convert_ids_to_tokens(ids) for key, ids in both.items()}
            differ.append({"what": what, "text": text, **named})
    facts = {"compared_by": by, "texts": tried, "texts_that_differ": len(differ), "examples": differ[:_KEPT]}
    if not differ:
        return facts, []
    names = list(dict.fromkeys(one["what"] for one in differ))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return facts, [
        f"{by} gives other tokens than the tokenizer for {len(differ)} of {tried} texts: {', '.join(names[:8])}{more}"
    ]


def _reader(path: Path) -> tuple[str, Callable[[str], list[int]]]:
    if importlib.util.find_spec("llama_cpp") is not None:
        return "llama.cpp", Vocabulary(path)
    read = read_tokenizer(GgufFile(path), str(path))
    return "gyroquant's reader of GGUF", lambda text: list(read(text)["input_ids"])
