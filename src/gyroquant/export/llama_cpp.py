"""llama.cpp through its Python binding, silenced, and its quantizer."""

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
_ERROR, _CONTINUED = 4, 5  # of ggml's levels
_LOG = logging.getLogger("gyroquant.llama_cpp")  # everything that llama.cpp says, at the level DEBUG
_PREFIX = "LLAMA_FTYPE_MOSTLY_"
_complaints: list[str] = []
_callbacks: list[Any] = []  # which llama.cpp calls as long as the process lives


@cache
def binding() -> Any:
    """The package llama_cpp, silenced. Raises InputError where it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise InputError('llama.cpp is not installed: pip install "gyroquant[llama-cpp]"') from error
    last = 0

    def said(level: int, text: bytes, _: Any) -> None:
        nonlocal last
        last = last if level == _CONTINUED else level
        line = " ".join(text.decode(errors="replace").replace("==", "").split())
        if line and last == _ERROR:
            _complaints.append(line)
        _LOG.debug(line)

    _callbacks.append(llama_cpp.llama_log_callback(said))
    llama_cpp.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def complained() -> str:
    """What llama.cpp has complained of since it was last asked."""
    found = " ".join(_complaints)
    _complaints.clear()
    return found


class Vocabulary:
    """The tokenizer of a GGUF file in llama.cpp, without the weights. Raises InputError where it does not open it."""

    def __init__(self, path: Path):
        self.library = binding()
        settings = self.library.llama_model_default_params()
        settings.vocab_only = True
        complained()
        self._model = self.library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise InputError(f"llama.cpp does not open {path}: {complained()}")
        weakref.finalize(self, self.library.llama_model_free, self._model)
        self.vocab = self.library.llama_model_get_vocab(self._model)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text, with those that the file puts around one; special ones are known by their names."""
        return tokenize(self.library, self.vocab, text, add_special=True)


def tokenize(library: Any, vocab: Any, text: str, add_special: bool) -> list[int]:
    """The tokens of a text by a vocabulary of llama.cpp; special ones are known by their names."""
    data = text.encode()
    room = len(data) + 8
    ids = (library.llama_token * room)()
    return list(ids[: library.llama_tokenize(vocab, data, len(data), ids, room, add_special, True)])


def file_types() -> dict[str, int]:
    """The types that llama.cpp's quantizer is asked for, with their numbers. Raises InputError as `binding`."""
    found = {name.removeprefix(_PREFIX): kind for name, kind in vars(binding()).items() if name.startswith(_PREFIX)}
    return found | {"F32": 0}


def rewrite(source: Path, target: Path, kind: str) -> None:
    """Has llama.cpp's quantizer write a GGUF file again, with tensors of another type. Raises InputError with what it
    says where it does not.
    """
    library = binding()
    settings = library.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = file_types()[kind], torch.get_num_threads(), True
    complained()
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise InputError(f"llama.cpp does not write {kind}: {complained()}")
