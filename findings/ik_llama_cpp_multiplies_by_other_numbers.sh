#!/usr/bin/env bash
# ik_llama.cpp (the wheel ik-llama-cpp-python 0.1.5) on matrices of the types IQ2_KT and IQ3_KT.
#
# One would guess: a product with a rounded matrix is that of the numbers which the type's own decoder
# (dequantize_row_*) gives, up to the rounding of the other side to 8 bits: about half a percent.
#
# What really happens: on a processor with AVX2, products with IQ2_KT are 1.05 times and those with IQ3_KT 1.01 times
# as large. Other types are not scaled. Whoever reads such a file by the decoder gets another model than the program runs.
#
# Who meets it: people who convert these types to other formats, who compare them by decoded numbers, or who write them.
#
# Seen: 256 x 1024 normal numbers, rounded by the program, times 8 normal vectors. The best factor from decoded to multiplied: IQ2_KT
# 1.050, IQ3_KT 1.010; IQ4_KT, IQ2_K and IQ4_KS 1.000.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet numpy==2.4.6 ik-llama-cpp-python==0.1.5
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np

TYPES = {"IQ2_KT": 153, "IQ3_KT": 154, "IQ4_KT": 155, "IQ2_K": 137, "IQ4_KS": 144}
ROWS, COLUMNS, VECTORS, F32 = 256, 1024, 8, 0
FLOATS = ctypes.POINTER(ctypes.c_float)


class Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


folder = importlib.util.find_spec("ik_llama_cpp").submodule_search_locations[0]
library = ctypes.CDLL(str(Path(folder) / "lib" / "libggml.so"))


def function(name, result, *arguments):
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


pointer, number = ctypes.c_void_p, ctypes.c_int64
init = function("ggml_init", pointer, Parameters)
tensor = function("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, number, number)
data = function("ggml_get_data", pointer, pointer)
product = function("ggml_mul_mat", pointer, pointer, pointer, pointer)
graph = function("ggml_new_graph", pointer, pointer)
expand = function("ggml_build_forward_expand", None, pointer, pointer)
compute = function("ggml_graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int)
quantize = function("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, FLOATS, pointer, number, number, number, FLOATS)

random = np.random.default_rng(0)
weights = random.standard_normal((ROWS, COLUMNS), np.float32)
vectors = random.standard_normal((VECTORS, COLUMNS), np.float32)
importance = np.ones(COLUMNS, np.float32)
factors = {}
for name, kind in TYPES.items():
    context = init(Parameters(1 << 26, None, False))
    matrix, other = tensor(context, kind, COLUMNS, ROWS), tensor(context, F32, COLUMNS, VECTORS)
    size = quantize(kind, weights.ctypes.data_as(FLOATS), data(matrix), 0, ROWS, COLUMNS, importance.ctypes.data_as(FLOATS))
    ctypes.memmove(data(other), vectors.ctypes.data, vectors.nbytes)
    decoded = np.empty_like(weights)
    decode = function(f"dequantize_row_{name.lower()}", None, pointer, FLOATS, number)
    for row in range(ROWS):
        decode(data(matrix) + row * size // ROWS, decoded[row].ctypes.data_as(FLOATS), COLUMNS)
    result = product(context, matrix, other)
    steps = graph(context)
    expand(steps, result)
    compute(context, steps, 1)
    shown = np.ctypeslib.as_array((ctypes.c_float * (ROWS * VECTORS)).from_address(data(result))).reshape(VECTORS, ROWS)
    expected = vectors @ decoded.T
    factors[name] = float((shown * expected).sum() / (expected**2).sum())
    rest = float(np.linalg.norm(shown - factors[name] * expected) / np.linalg.norm(shown))
    print(f"{name}: {factors[name]:.4f} times the decoded numbers, and {rest:.4f} that this does not explain")
expected = {"IQ2_KT": 1.05, "IQ3_KT": 1.01}
if any(abs(factor - expected.get(name, 1.0)) > 0.003 for name, factor in factors.items()):
    sys.exit("the behaviour has changed")
print("behaves as described")
PYTHON
