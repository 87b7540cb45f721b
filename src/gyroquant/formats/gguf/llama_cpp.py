"""llama.cpp through its C functions, from one of two Python packages, without console output."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import weakref
from functools import cache
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.formats.gguf import xllamacpp

_DISTRIBUTIONS = {
    "llama_cpp": "llama-cpp-python",
    xllamacpp.PACKAGE: xllamacpp.PACKAGE,
}  # by package, first choice first
_ERROR, _CONTINUED = 4, 5  # log levels of ggml
_LOG = logging.getLogger("gyroquant.llama_cpp")  # all log messages of llama.cpp, at the level DEBUG
_errors: list[str] = []
_callbacks: list[Any] = []  # kept, since llama.cpp calls them until the process ends


def installed() -> bool:
    """Whether a package with llama.cpp is installed."""
    return any(importlib.util.find_spec(package) is not None for package in _DISTRIBUTIONS)


def distribution() -> str:
    """The name of the distribution that llama.cpp comes from. Raises InputError if none is installed."""
    for package, name in _DISTRIBUTIONS.items():
        if importlib.util.find_spec(package) is not None:
            return name
    raise InputError('llama.cpp is not installed: pip install "gyroquant[llama-cpp]"')


@cache
def binding() -> Any:
    """llama.cpp's C functions by the names of llama-cpp-python, without console output.

    They come from llama-cpp-python if it is installed, otherwise from xllamacpp. Raises InputError if neither is, and
    for a version of xllamacpp that does not fit.
    """
    library: Any
    if distribution() == xllamacpp.PACKAGE:
        library = xllamacpp.load()
    else:
        library = importlib.import_module("llama_cpp")
    last = 0

    def log(level: int, text: bytes, _: Any) -> None:
        nonlocal last
        last = last if level == _CONTINUED else level
        line = " ".join(text.decode(errors="replace").replace("==", "").split())
        if line and last == _ERROR:
            _errors.append(line)
        _LOG.debug(line)

    _callbacks.append(library.llama_log_callback(log))
    library.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


def shared_library() -> ctypes.CDLL:
    """The shared library of `binding`, in which ggml's functions are found too. Raises InputError as `binding`."""
    library = binding()
    return library.handle if hasattr(library, "handle") else library.llama_cpp._lib


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
