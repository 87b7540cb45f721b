"""llama.cpp from the prebuilt package xllamacpp, through ctypes, under the names of llama-cpp-python.

The package's extension module exports llama.cpp's C functions. The package does not describe their structs, so the
layouts are stated here, each field with its default value. llama.cpp itself gives the defaults, and they are compared:
a version with another layout has other values at these offsets and is refused.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gyroquant.errors import InputError

PACKAGE = "xllamacpp"
_TESTED = "2026.10.11549"
_F16 = 1  # of ggml's types
_MODEL: tuple[tuple[str, Any, Any], ...] = (  # llama_model_params: name, type, default
    ("devices", c_void_p, None),
    ("tensor_buft_overrides", c_void_p, None),
    ("n_gpu_layers", c_int32, -1),
    ("split_mode", c_int32, 1),
    ("load_mode", c_int32, -1),
    ("lazy_mode", c_int32, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("check_tensors", c_bool, False),
    ("use_extra_bufts", c_bool, True),
    ("no_host", c_bool, False),
    ("no_alloc", c_bool, False),
    ("load_mtp", c_bool, False),
)
_CONTEXT: tuple[tuple[str, Any, Any], ...] = (  # llama_context_params
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_rs_seq", c_uint32, 0),
    ("n_outputs_max", c_uint32, 0),
    ("n_outputs_max_per_seq", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("ctx_type", c_int32, 0),
    ("rope_scaling_type", c_int32, -1),
    ("pooling_type", c_int32, -1),
    ("attention_type", c_int32, -1),
    ("flash_attn_type", c_int32, -1),
    ("rope_freq_base", c_float, 0),
    ("rope_freq_scale", c_float, 0),
    ("yarn_ext_factor", c_float, -1),
    ("yarn_attn_factor", c_float, -1),
    ("yarn_beta_fast", c_float, -1),
    ("yarn_beta_slow", c_float, -1),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int32, _F16),
    ("type_v", c_int32, _F16),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
    ("unused", ctypes.c_uint64, 0),  # among the four before the booleans is a new one; gyroquant uses none of them
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("no_perf", c_bool, True),
    ("op_offload", c_bool, True),
    ("swa_full", c_bool, True),
    ("kv_unified", c_bool, False),
    ("samplers", c_void_p, None),
    ("n_samplers", ctypes.c_size_t, 0),
    ("ctx_other", c_void_p, None),
)

_BATCH: dict[str, Any] = {  # llama_batch; a new one for tokens has all but the count and embeddings
    "n_tokens": c_int32,
    "token": ctypes.POINTER(c_int32),
    "embd": ctypes.POINTER(c_float),
    "pos": ctypes.POINTER(c_int32),
    "n_seq_id": ctypes.POINTER(c_int32),
    "seq_id": ctypes.POINTER(ctypes.POINTER(c_int32)),
    "logits": ctypes.POINTER(c_int8),
}


# A version may append fields. llama.cpp then fills them with its defaults, and gets them back, in the last field here.
class _ModelParams(ctypes.Structure):
    _fields_ = [*((name, kind) for name, kind, _ in _MODEL), ("appended", ctypes.c_ubyte * 256)]


class _ContextParams(ctypes.Structure):
    _fields_ = [*((name, kind) for name, kind, _ in _CONTEXT), ("appended", ctypes.c_ubyte * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [*_BATCH.items()]


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # the result, then the arguments
    "llama_backend_init": (None,),
    "llama_batch_free": (None, _Batch),
    "llama_batch_init": (_Batch, c_int32, c_int32, c_int32),
    "llama_context_default_params": (_ContextParams,),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_detokenize": (c_int32, c_void_p, ctypes.POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool),
    "llama_free": (None, c_void_p),
    "llama_get_logits_ith": (ctypes.POINTER(c_float), c_void_p, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextParams),
    "llama_log_set": (None, _LogCallback, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_model_chat_template": (c_char_p, c_void_p, c_char_p),
    "llama_model_default_params": (_ModelParams,),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelParams),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, ctypes.POINTER(c_int32), c_int32, c_bool, c_bool),
    "llama_vocab_bos": (c_int32, c_void_p),
    "llama_vocab_eos": (c_int32, c_void_p),
    "llama_vocab_get_text": (c_char_p, c_void_p, c_int32),
    "llama_vocab_is_eog": (c_bool, c_void_p, c_int32),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_type": (c_int32, c_void_p),
}
_CONSTANTS = {
    "GGML_TYPE_F32": 0,
    "LLAMA_FLASH_ATTN_TYPE_DISABLED": 0,
    "LLAMA_LOAD_MODE_NONE": 0,
    "LLAMA_VOCAB_TYPE_NONE": 0,
}


def load() -> Any:
    """The C functions and constants that gyroquant uses, by the names of llama-cpp-python; `handle` is the library.

    Raises InputError, with the version of xllamacpp and the remedy, if it cannot be loaded, if it lacks a function, and
    if its structs have another layout.
    """
    handle = _library()
    try:
        functions = {name: _function(handle, name) for name in _FUNCTIONS}
    except AttributeError as error:
        raise _unknown(f"it does not export a function of llama.cpp ({error})") from error
    library = SimpleNamespace(handle=handle, llama_token=c_int32, llama_log_callback=_LogCallback, **functions)
    vars(library).update(_CONSTANTS)
    _check("llama_model_params", library.llama_model_default_params(), _MODEL)
    _check("llama_context_params", library.llama_context_default_params(), _CONTEXT)
    batch = library.llama_batch_init(1, 0, 1)
    filled = [name for name in _BATCH if getattr(batch, name)]
    if filled != [name for name in _BATCH if name not in ("n_tokens", "embd")]:
        raise _unknown(f"its llama_batch has another layout (a new one has {', '.join(filled) or 'nothing'})")
    library.llama_batch_free(batch)
    return library


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = sorted(path for folder in folders for path in folder.glob(f"{PACKAGE}.*.so"))
    if not files:
        raise _unknown("it has no shared library for this system")
    try:
        return ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise InputError(f"{PACKAGE} {version(PACKAGE)} cannot be loaded: {error}") from error


def _function(handle: ctypes.CDLL, name: str) -> Any:
    function = getattr(handle, name)
    function.restype, *function.argtypes = _FUNCTIONS[name]
    return function


def _check(struct: str, defaults: ctypes.Structure, layout: tuple[tuple[str, Any, Any], ...]) -> None:
    for name, _, expected in layout:
        value = getattr(defaults, name)
        if value != expected:
            raise _unknown(f"its {struct} has another layout or other defaults ({name} is {value}, not {expected})")


def _unknown(reason: str) -> InputError:
    return InputError(
        f"{PACKAGE} {version(PACKAGE)} does not fit gyroquant: {reason}; "
        f"pip install {PACKAGE}=={_TESTED}, or build llama-cpp-python"
    )
