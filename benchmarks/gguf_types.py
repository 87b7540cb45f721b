"""Errors of layers in the types of llama.cpp: rounded by llama-quantize's own code, and by ours.

    python benchmarks/gguf_types.py MODEL --blocks 0 13 27 --text calibration.txt --validation validation.txt
    python benchmarks/gguf_types.py                                 # squared errors of both on normal numbers

For each type, the squared error of the layers' outputs on held-out text, relative to the outputs, in the mean of all
linear layers of some blocks. Blocks read what the unrounded model gives them. Of every matrix the first `--rows` rows
are rounded; rows do not depend on each other. "Theirs" is `ggml_quantize_chunk` of ik_llama.cpp, from the wheel
ik-llama-cpp-python, with the mean squares of the inputs on the calibration text as the importance matrix, which is
what llama-quantize runs. Ours is in the same bytes: to nearest, with GPTQ and refinement, and the same after random
signs and a Hadamard matrix on the inputs, whose second moments are those of the same text.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from math import log10
from pathlib import Path
from statistics import fmean, geometric_mean
from time import process_time
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from gyroquant.calibration.observers import SecondMoments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.grids import Grid, IqGrid, IqkGrid, KQuantGrid, KtGrid, SuperBlockGrid
from gyroquant.grids.error import weight_error
from gyroquant.maps import hadamard
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.stores.gguf.ik_types import IK_TYPES, decode_ik
from gyroquant.models.stores.source import open_model
from gyroquant.rounding import InputStatistics, Refine, output_error
from gyroquant.rounding.base import output_energy
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.layers import LayerGroup
from gyroquant.rounding.solvers.gptq import Sweep
from gyroquant.rounding.solvers.rtn import RoundToNearest

TYPES: list[SuperBlockGrid] = [
    IqGrid(bits=2, two_bits="IQ2_XXS"),
    IqGrid(bits=2),
    KQuantGrid(bits=2),
    IqGrid(bits=3),
    KQuantGrid(bits=3),
    KQuantGrid(four_bits="IQ4_XS"),
]
COLUMNS = ("theirs", "nearest", "gptq", "rotated")


class Theirs:
    """The quantizer of ik_llama.cpp, through the library in its wheel."""

    def __init__(self) -> None:
        import ik_llama_cpp

        self._library = ctypes.CDLL(str(Path(ik_llama_cpp.__file__).parent / "lib" / "libggml.so"))
        init = self._library.ggml_init  # fills tables; without it everything decodes to 0
        init.argtypes, init.restype = [_InitParams], ctypes.c_void_p
        init(_InitParams(1 << 20, None, False))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        numbers, count = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, numbers, ctypes.c_void_p, count, count, count, numbers]

    def __call__(self, name: str, weight: Tensor, importance: Tensor) -> Tensor:
        """A matrix, shape (rows, columns), rounded to a type; importance of shape (columns,)."""
        rows, columns = weight.shape
        if name in IK_TYPES:
            number, line = IK_TYPES[name].id, IK_TYPES[name].row + columns // 256 * IK_TYPES[name].size
        else:
            kind = getattr(gguf.GGMLQuantizationType, name)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            number, line = int(kind), columns // block * size
        source, factors = (np.ascontiguousarray(x.float().numpy()) for x in (weight, importance))
        target = np.zeros((rows, line), np.uint8)
        pointers = (x.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for x in (source, factors))
        first, second = pointers
        written = self._quantize(number, first, target.ctypes.data, 0, rows, columns, second)
        assert written == target.nbytes, (name, written, target.nbytes)
        decoded = decode_ik(target, name) if name in IK_TYPES else gguf.quants.dequantize(target, kind)
        return torch.from_numpy(decoded.astype(np.float32))


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def layers(
    model: Path, texts: Sequence[Path], windows: int, seqlen: int, blocks: Sequence[int], rows: int
) -> Iterator[tuple[str, Tensor, list[InputStatistics]]]:
    """Of each linear layer of some blocks: its name, its first rows, the second moments of its input on each text."""
    store = open_model(model)
    runner, tokenizer = BlockRunner.of(store), store.tokenizer()
    streams = []
    for text in texts:
        ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
        whole = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
        tokens = whole[:: max(1, len(whole) // windows)][:windows]
        streams.append(Stream(runner, tokens, store.read(store.graph.outer_params()), torch.float32))
    with evaluating(store.skeleton()):
        for index in range(max(blocks) + 1):
            group = store.graph.blocks[index]
            tensors = {name: tensor.float() for name, tensor in store.read(group.params()).items()}
            seen = []
            for stream in streams:
                if index in blocks:
                    with observing(store.skeleton(), group, [], SecondMoments) as observed:
                        stream.observe(index, tensors)
                    seen.append(LayerGroup(group, {op.weight: op for op in group.linears}, tensors, observed, []))
                stream.run(index, tensors)
            if not seen:
                continue
            for key, ops in seen[0].by_shared_input().items():
                statistics = [layer.statistics(key) for layer in seen]
                for op in ops:
                    yield op.name, seen[0].matrix(op)[:rows], [s for s in statistics if s is not None]


def _solved(weight: Tensor, grid: Grid, statistics: InputStatistics, factor: Tensor) -> Tensor:
    """The matrix after GPTQ and refinement."""
    solved = Sweep(weight, grid, torch.arange(weight.shape[1]), False).run(factor)
    return Refine(passes=2).run(weight, solved, statistics).dequantize()


def errors(theirs: Theirs, weight: Tensor, calibration: InputStatistics, held_out: InputStatistics) -> dict[str, Any]:
    """The squared error of the outputs for each type and way, and their energy."""
    columns = weight.shape[1]
    signs = torch.randint(2, (columns,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    rotation = hadamard(columns)

    def rotated(matrix: Tensor) -> Tensor:
        return rotation.apply(matrix.float() * signs)

    moments = calibration.second_moments.float()
    turned = InputStatistics(rotated(rotated(moments).T), calibration.count)
    turned_weight, energy = rotated(weight), output_energy(weight, held_out)
    found: dict[str, Any] = {"energy": energy}
    factors = [inverse_factor(s.second_moments, 0.01) for s in (calibration, turned)]  # the same for all types
    for grid in TYPES:
        name = grid.type_name
        ours = _solved(turned_weight, grid, turned, factors[1])
        plain = _solved(weight, grid, calibration, factors[0])
        rounded = {
            "theirs": theirs(name, weight, moments.diagonal() / calibration.count),
            "nearest": RoundToNearest().solve(weight, grid).dequantize(),
            "gptq": plain,
            "rotated": rotation.inverse().apply(ours) * signs,
        }
        found[name] = {way: energy * output_error(weight, matrix, held_out) for way, matrix in rounded.items()}
    return found


def report(found: dict[str, dict[str, Any]]) -> None:
    """Prints the mean of the layers' relative errors, and the geometric mean of their ratios, for each type."""
    print("\n| type | bits | " + " | ".join(COLUMNS) + " | rotated / theirs | worst layer |")
    print("|---|--:|" + "--:|" * (len(COLUMNS) + 2))
    for grid in TYPES:
        kind = grid.type_name
        share = {way: fmean(layer[kind][way] / layer["energy"] for layer in found.values()) for way in COLUMNS}
        ratios = [layer[kind]["rotated"] / layer[kind]["theirs"] for layer in found.values()]
        cells = " | ".join(f"{100 * share[way]:.3g} %" for way in COLUMNS)
        bits = grid.code_bits + grid.group_bits / grid.group_size
        print(f"| {kind} | {bits} | {cells} | {geometric_mean(ratios):.2f} | {max(ratios):.2f} |", flush=True)


def normal(theirs: Theirs) -> None:
    """Prints the squared errors of both on normal numbers, without importance, and the speed of ours: millions of
    weights a second of the processor, scales and codes together. In dB, errors are relative to those of the best code
    of as many bits, 4^-bits.
    """
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    print("| type | true bits | theirs | ours to nearest | ratio | theirs, dB | ours, dB | M weights/s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for grid in [*TYPES, *more_types()]:
        RoundToNearest().solve(weight[:8], grid)  # compiles what numba compiles
        start = process_time()
        solved = RoundToNearest().solve(weight, grid)
        speed, bits = weight.numel() / (process_time() - start) / 1e6, solved.bits / weight.numel()
        both = theirs(grid.type_name, weight, torch.ones(1024)), solved.dequantize()
        first, second = (weight_error(weight, rounded) for rounded in both)
        over = " | ".join(f"{10 * log10(error * 4**bits):.2f}" for error in (first, second))
        cells = f"{bits:.4f} | {100 * first:.3g} % | {100 * second:.3g} % | {second / first:.3f} | {over}"
        print(f"| {grid.type_name} | {cells} | {speed:.2f} |", flush=True)


def more_types() -> list[SuperBlockGrid]:
    """The types that are left out of the comparison on layers."""
    others = [IqGrid(bits=2, two_bits="IQ2_S"), IqGrid(bits=3, three_bits="IQ3_S")]
    own = [*IqkGrid.examples(), *KtGrid.examples()]
    return [*others, *(KQuantGrid(bits=bits) for bits in (4, 5, 6)), *own]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print({name: version(name) for name in ("ik-llama-cpp-python", "gguf", "torch")}, flush=True)
    theirs, found = Theirs(), dict[str, dict[str, Any]]()
    if given.model is None:
        normal(theirs)
        return
    texts = (given.text, given.validation)
    for name, weight, both in layers(given.model, texts, given.windows, given.seqlen, given.blocks, given.rows):
        found[name] = errors(theirs, weight, *both)
        print(
            name,
            {kind: f"{e['rotated'] / e['theirs']:.3f}" for kind, e in found[name].items() if kind != "energy"},
            flush=True,
        )
    report(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
