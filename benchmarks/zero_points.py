"""Zero points that are no codes in OpenVINO and ONNX Runtime: as numbers, or as codes with a correction.

    python benchmarks/zero_points.py [--shape 4096 2048] [--groups 64 128] [--bits 2 4 8] [--rounds 15]

One product of random weights on one thread. A zero point that is a number (`float_zero`) or lies between two codes
(`midrise`) can be stored as it is, or a code takes its place and what that leaves out is added from the sums of the
inputs. Both are built by the operations of the formats, and timed in turn with the asymmetric integer grid of the same
bits and group size, as the runtime runs them by default. A cell has, for calls of 1 and of 64 rows, the median over
rounds of the time divided by that of the integer grid in the same round, and the largest error relative to the largest
exact result. Ratios below 1 are faster than the integer grid. What the formats write is bold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gyroquant.grids import EvenGrid, FloatZeroGrid, IntegerGrid, QuantizedWeight

Run = Callable[[Tensor], Tensor]
CALLS = (1, 64)


def weight_of(grid: EvenGrid, shape: tuple[int, int]) -> QuantizedWeight:
    """Random codes with plausible scales and zero points."""
    rows, columns = shape
    draw = torch.Generator().manual_seed(0)
    groups = (rows, columns // grid.group_of(columns), 1)
    codes = torch.randint(2**grid.bits, shape, generator=draw).to(torch.uint8)
    middle = (2**grid.bits - 1) / 2
    zero = middle + 0.3 * torch.randn(groups, generator=draw)
    if isinstance(grid, IntegerGrid) and grid.symmetric:
        zero = torch.full(groups, middle)
    params = grid.round_params(0.01 + 0.01 * torch.rand(groups, generator=draw), zero)
    return QuantizedWeight(grid, codes, params)


def in_openvino(weight: QuantizedWeight, corrected: bool | None) -> Run:
    """The product in OpenVINO. `corrected`: whether a code takes the place of zero points; None: what we write."""
    import openvino as ov

    from gyroquant.formats.openvino.operations import OpenVinoOperations

    class Chosen(OpenVinoOperations):
        def corrected(self, grid: EvenGrid) -> bool:
            return super().corrected(grid) if corrected is None else corrected

    x = ov.opset13.parameter([-1, weight.codes.shape[1]], ov.Type.f32)
    model = ov.Model([ov.opset13.multiply(Chosen().rounded(x, weight), ov.opset13.constant(1.0, ov.Type.f32))], [x])
    request = ov.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1}).create_infer_request()
    return lambda inputs: torch.from_numpy(request.infer({0: inputs.numpy()})[0])


def in_onnx(weight: QuantizedWeight, corrected: bool | None) -> Run:
    """The same in ONNX Runtime. Raises ValueError where it has no kernel for zero points that are numbers."""
    if weight.grid.bits == 8 and corrected is False:
        raise ValueError("ONNX Runtime takes zero points that are numbers at 2 and 4 bits only")
    import onnxruntime as ort
    from onnx import TensorProto, helper

    from gyroquant.formats.onnx.decoder import OPSETS
    from gyroquant.formats.onnx.operations import OnnxOperations, Value

    class Chosen(OnnxOperations):
        def corrected(self, grid: EvenGrid) -> bool:
            return super().corrected(grid) if corrected is None else corrected

        def coded(self, x: Value, weight: QuantizedWeight) -> Value:
            y = super().coded(x, weight)
            if corrected is False:
                block = self.nodes[-1].attribute
                size = next(a.i for a in block if a.name == "block_size")
                zero = weight.params.zero[..., 0].repeat_interleave(weight.grid.group_size // size, 1)
                self.nodes[-1].input.append(self.constant(zero).name)
            return y

    ops = Chosen()
    y = ops.rounded(Value("x", 2), weight)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.codes.shape[1]])
    out = helper.make_tensor_value_info(y.name, TensorProto.FLOAT, None)
    graph = helper.make_graph(ops.nodes, "one", [given], [out], ops.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in OPSETS.items()], ir_version=11)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"x": inputs.numpy()})[0])


RUNTIMES = {"openvino": in_openvino, "onnxruntime": in_onnx}


def row_of(build: Any, bits: int, group: int, shape: tuple[int, int], rounds: int) -> list[str]:
    """The cells of one width and group size: midrise and float_zero, each as numbers and corrected."""
    integer = weight_of(IntegerGrid(bits=bits, group_size=group), shape)
    kinds = (
        weight_of(IntegerGrid(bits=bits, group_size=group, symmetric=True, midrise=True), shape),
        weight_of(FloatZeroGrid(bits=bits, group_size=group), shape),
    )
    inputs = [torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)) for rows in CALLS]
    runs: list[Run | None] = [build(integer, None)]
    errors, chosen = [0.0], [False]
    for weight in kinds:
        ours = build(weight, None)(inputs[1])
        for corrected in (False, True):
            try:
                runs.append(build(weight, corrected))
            except ValueError:
                runs.append(None)
                errors.append(0.0)
                chosen.append(False)
                continue
            found, exact = runs[-1](inputs[1]), inputs[1] @ weight.dequantize().T
            errors.append(float((found - exact).abs().max() / exact.abs().max()))
            chosen.append(torch.equal(found, ours))
    times: list[list[list[float]]] = [[[] for _ in CALLS] for _ in runs]
    for _ in range(rounds):
        for run, lists in zip(runs, times, strict=True):
            for x, seconds in zip(inputs, lists, strict=True):
                if run is not None:
                    seconds.append(timed(run, x))
    return [cell(times[i], times[0], errors[i], chosen[i]) for i in range(1, len(runs))]


def timed(run: Run, x: Tensor) -> float:
    """Seconds of one call. Single rows are too quick to be timed once."""
    repeats = 8 if len(x) == 1 else 1
    started = time.perf_counter()
    for _ in range(repeats):
        run(x)
    return (time.perf_counter() - started) / repeats


def cell(times: list[list[float]], integer: list[list[float]], error: float, chosen: bool) -> str:
    if not times[0]:
        return "refused"
    ratios = [
        statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(times, integer, strict=True)
    ]
    text = f"{' / '.join(f'{ratio:.2f}' for ratio in ratios)}, {error:.0e}"
    return f"**{text}**" if chosen else text


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 2048))
    parser.add_argument("--groups", type=int, nargs="+", default=(64, 128))
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {version(name)}" for name in (*RUNTIMES, "torch")), end="\n\n")
    print(
        "| runtime | bits, group | midrise, number | midrise, corrected | float_zero, number | float_zero, corrected |"
    )
    print("|---|---|--:|--:|--:|--:|")
    for name, build in RUNTIMES.items():
        for bits in given.bits:
            for group in given.groups:
                cells = row_of(build, bits, group, tuple(given.shape), given.rounds)
                print(f"| {name} | {bits}, {group} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
