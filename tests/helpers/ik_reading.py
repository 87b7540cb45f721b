"""Single numbers of blocks of ik_llama.cpp's types, by their published layouts, and the program itself."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TWO, THREE = (-31, -13, 1, 17), (-63, -40, -23, -10, 1, 13, 28, 47)
FOUR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IDS = {"IQ2_K": 137, "IQ3_K": 138, "IQ4_K": 139, "IQ4_KS": 144, "IQ2_KS": 145, "IQ3_KS": 156}
IDS |= {"IQ2_KT": 153, "IQ3_KT": 154, "IQ4_KT": 155}


def one_number(kind: str, block: bytes, j: int) -> int:
    """Number j of a block without its fp16 or fp32 number, in units of that number."""
    return globals()[f"_{kind.lower()}"](block, j)


def _bit(data: bytes, place: int) -> int:
    return data[place // 8] >> place % 8 & 1


def _nibble(data: bytes, place: int) -> int:
    return data[place // 2] >> 4 * (place % 2) & 15


def _two(data: bytes, j: int) -> int:
    return data[j // 128 * 32 + j % 32] >> 2 * (j // 32 % 4) & 3


def _iq2_k(b: bytes, j: int) -> int:
    return (_nibble(b[2:10], j // 16) - 8) * (TWO[_two(b[10:], j)] + 5 * _bit(b, j // 16))


def _iq2_ks(b: bytes, j: int) -> int:
    scale = (_nibble(b[2:6], j // 32) | _bit(b, 8 + j // 32) << 4) - 16
    return scale * (TWO[_two(b[6:], j)] + 5 * _bit(b, j // 32))


def _three(low: bytes, high: bytes, j: int) -> int:
    return THREE[_two(low, j) | (high[j % 32] >> j // 32 & 1) << 2]


def _iq3_k(b: bytes, j: int) -> int:
    scale = (2 * _nibble(b[4:12], j // 16) + 1) * (1 - 2 * _bit(b[2:4], j // 16))
    return scale * (_three(b[12:76], b[76:], j) + 4 * _bit(b, j // 16))


def _iq3_ks(b: bytes, j: int) -> int:
    group = j // 32
    scale = (b[2 + group % 4] >> 4 * (group // 4) & 15 | _bit(b, group) << 4) - 16
    return scale * (_three(b[6:70], b[70:], j) + 4 * _bit(b, 8 + group))


def _four(data: bytes, j: int) -> int:
    return FOUR[data[j // 32 * 16 + j % 16] >> 4 * (j // 16 % 2) & 15]


def _iq4_k(b: bytes, j: int) -> int:
    group = j // 16
    scale = (_nibble(b[6:14], group) | (b[2 + group // 4] >> 2 * (group % 4) & 3) << 4) - 32
    return scale * (_four(b[14:], j) + 4 * _bit(b, group))


def _iq4_ks(b: bytes, j: int) -> int:
    return ((b[j // 32] & 254) - 127) * (_four(b[8:], j) + 4 * (b[j // 32] & 1))


def coordinate(start: int, i: int) -> int:
    """Coordinate i of the point whose generator starts at a number."""
    for _ in range(i + 1):
        start = start * 0xCBAC1FED % 2**32
    return sum(byte & 63 for byte in start.to_bytes(4, "little")) - 126


def _place(data: bytes, j: int) -> int:
    return 4096 + int.from_bytes(data[j // 8 * 2 : j // 8 * 2 + 2], "little")


def _iq2_kt(b: bytes, j: int) -> int:
    return FOUR[b[j // 32 % 4] >> 4 * (j // 128) & 15] * coordinate(_place(b[4:], j), j % 8)


def _iq3_kt(b: bytes, j: int) -> int:
    size = abs(coordinate(_place(b[4:68], j), j % 8))
    return (b[j // 32 % 4] >> 4 * (j // 128) & 15) * size * (1 - 2 * (b[68 + j % 32] >> j // 32 & 1))


def _iq4_kt(b: bytes, j: int) -> int:
    group, point = j // 32, j // 4
    word = int.from_bytes(b[4 * group : 4 * group + 4], "little")
    place = (
        b[32 + point] | (b[96 + point % 32] >> 4 * (point // 32) & 15) << 8 | (word >> 8 + 3 * (point % 8) & 7) << 12
    )
    return ((word >> 1 & 127) - 64) * coordinate(place + 4096 + 32768 * (word & 1), j % 4)


class _Settings(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("ik_llama_cpp")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    library = ctypes.CDLL(str(Path(folder) / "lib" / "libggml.so"))
    library.ggml_init.argtypes, library.ggml_init.restype = [_Settings], ctypes.c_void_p
    library.ggml_init(_Settings(1 << 20, None, False))  # fills tables; without it everything decodes to 0
    return library


def decoded_by_the_program(kind: str, rows: np.ndarray, columns: int) -> np.ndarray:
    """Rows of bytes, shape (rows, bytes), decoded by ik_llama.cpp itself, fp32."""
    decode = getattr(_library(), f"dequantize_row_{kind.lower()}")
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    out = np.empty((len(rows), columns), np.float32)
    for row, numbers in zip(np.ascontiguousarray(rows), out, strict=True):
        decode(row.ctypes.data, numbers.ctypes.data, columns)
    return out


_RUN = """
import sys
import numpy as np
from ik_llama_cpp import _internals as library
ids = list(map(int, sys.argv[3:]))
model = library.IkModel(sys.argv[1])
context = library.IkContext(model, n_ctx=256, n_threads=1, flash_attn=False)
batch = library.make_batch_range(ids)
for i in range(len(ids)):
    batch.logits[i] = 1
assert not context.decode(batch)
rows = [np.ctypeslib.as_array(context.get_logits(i), (model.n_vocab,)) for i in range(len(ids))]
np.save(sys.argv[2], np.stack(rows))
"""


def logits_of_the_program(path: Path, ids: list[int]) -> np.ndarray:
    """The logits of ik_llama.cpp as it runs a file by default, (length, words); in a process of its own."""
    out = path.with_name("logits.npy")
    done = subprocess.run([sys.executable, "-c", _RUN, path, out, *map(str, ids)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.asarray(np.load(out))
