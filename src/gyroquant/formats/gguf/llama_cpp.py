"""llama.cpp through its Python binding, without console output, and its quantizer."""

from __future__ import annotations

import ctypes
import logging
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gyroquant.errors import InputError

_BATCH = 512
_ERROR, _CONTINUED = 4, 5  # log levels of ggml
_LOG = logging.getLogger("gyroquant.llama_cpp")  # all log messages of llama.cpp, at the level DEBUG
_PREFIX = "LLAMA_FTYPE_MOSTLY_"
_errors: list[str] = []
_callbacks: list[Any] = []  # kept, since llama.cpp calls them until the process ends


@cache
def binding() -> Any:
    """The package llama_cpp, without console output. Raises InputError if it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise InputError('llama.cpp is not installed: pip install "gyroquant[llama-cpp]"') from error
    last = 0

    def log(level: int, text: bytes, _: Any) -> None:
        nonlocal last
        last = last if level == _CONTINUED else level
        line = " ".join(text.decode(errors="replace").replace("==", "").split())
        if line and last == _ERROR:
            _errors.append(line)
        _LOG.debug(line)

    _callbacks.append(llama_cpp.llama_log_callback(log))
    llama_cpp.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def complained() -> str:
    """The error messages of llama.cpp since the last call of this function."""
    messages = " ".join(_errors)
    _errors.clear()
    return messages


class Vocabulary:
    """The tokenizer of a GGUF file in llama.cpp, without the weights. Raises InputError if llama.cpp cannot open it."""

    def __init__(self, path: Path):
        self.library = binding()
        settings = self.library.llama_model_default_params()
        settings.vocab_only = True
        complained()
        self._model = self.library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise InputError(f"llama.cpp cannot open {path}: {complained()}")
        weakref.finalize(self, self.library.llama_model_free, self._model)
        self.vocab = self.library.llama_model_get_vocab(self._model)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text, with the special tokens that the file adds. Names of special tokens in the text become
        these tokens.
        """
        return tokenize(self.library, self.vocab, text, add_special=True)


def tokenize(library: Any, vocab: Any, text: str, add_special: bool) -> list[int]:
    """The tokens of a text by a vocabulary of llama.cpp. Names of special tokens in the text become these tokens.

    With `add_special`, the tokens include those that the file adds to every text, such as BOS.
    """
    data = text.encode()
    capacity = len(data) + 8
    ids = (library.llama_token * capacity)()
    return list(ids[: library.llama_tokenize(vocab, data, len(data), ids, capacity, add_special, True)])


def file_types() -> dict[str, int]:
    """The types that llama.cpp's quantizer can write, with their numbers. Raises InputError as `binding` does."""
    types = {name.removeprefix(_PREFIX): kind for name, kind in vars(binding()).items() if name.startswith(_PREFIX)}
    return types | {"F32": 0}


def rewrite(source: Path, target: Path, kind: str) -> None:
    """Rewrites a GGUF file with tensors of another type, by llama.cpp's quantizer. Raises InputError with llama.cpp's
    messages if it fails.
    """
    library = binding()
    settings = library.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = file_types()[kind], torch.get_num_threads(), True
    complained()
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise InputError(f"llama.cpp cannot write {kind}: {complained()}")
