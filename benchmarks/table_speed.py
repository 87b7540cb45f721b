"""Speed and memory of one rounded table of embeddings with its tied head: each width, in OpenVINO and ONNX Runtime.

    python benchmarks/table_speed.py --out FOLDER [--words 49152] [--hidden 576] [--group 64] [--runs 100]

A graph looks a token up and multiplies its row by the table. Every row of the output is a process of its own, which
opens the file and runs one token again and again. Times are the shortest run, so that what else the machine does counts
little. Memory is the peak of the process less what it held before it opened the file. "16 bits" is a table that is not
rounded. OpenVINO runs at its defaults, and for 4 and 2 bits also without rounding activations, which our files ask for
if the model has layers of few bits. At 2 bits its defaults fail; in fp32 inference, it runs with activations of 8 bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gyroquant.grids import IntegerGrid, QuantizedWeight
from gyroquant.system.environment import forget_peak, peak_memory_bytes

EXACT = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
ROUNDED = {"INFERENCE_PRECISION_HINT": "f32"}
ROWS: list[tuple[str, int, dict[str, str]]] = [  # format, bits (16: not rounded), settings of OpenVINO
    *(("openvino", bits, {}) for bits in (16, 8, 4)),
    ("openvino", 4, EXACT),
    ("openvino", 2, EXACT),
    ("openvino", 2, ROUNDED),
    *(("onnx", bits, {}) for bits in (16, 8, 4, 2)),
]


def rounded_table(words: int, hidden: int, group: int, bits: int) -> QuantizedWeight:
    """A random table, symmetric, rounded to nearest."""
    grid = IntegerGrid(bits=bits, group_size=group, symmetric=True, scale="minmax")
    values = torch.randn(words, hidden, generator=torch.Generator().manual_seed(0)).view(words, -1, group)
    params = grid.fit(values)
    return QuantizedWeight(grid, grid.encode(values, params).view(words, hidden), params)


def outputs(ops: Any, ids: Any, given: argparse.Namespace, bits: int) -> Any:
    """The logits of the token ids, in the operations of a format."""
    if bits == 16:
        numbers = torch.randn(given.words, given.hidden, generator=torch.Generator().manual_seed(0)).half()
        table = ops.numbers(numbers)
        return ops.product(ops.gathered(table, ids), table, transposed=True)
    table = rounded_table(given.words, given.hidden, given.group, bits)
    return ops.rounded(ops.looked_up(ids, table), table)


def write_openvino(path: Path, given: argparse.Namespace, bits: int) -> None:
    """Writes the graph as OpenVINO IR."""
    import numpy as np
    import openvino as ov

    from gyroquant.formats.openvino.operations import OpenVinoOperations

    ids = ov.opset13.parameter([-1, -1], np.int64)
    ov.save_model(ov.Model([outputs(OpenVinoOperations(), ids, given, bits)], [ids]), path, compress_to_fp16=False)


def write_onnx(path: Path, given: argparse.Namespace, bits: int) -> None:
    """Writes the graph as ONNX, with its constants beside it."""
    from onnx import TensorProto, helper

    from gyroquant.formats.onnx.decoder import OPSETS
    from gyroquant.formats.onnx.layout import DATA
    from gyroquant.formats.onnx.operations import OnnxOperations, Value

    with (path.parent / DATA).open("wb") as data:
        ops = OnnxOperations(data)
        logits = outputs(ops, Value("ids", 2), given, bits)
    sides = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])]
    ends = [helper.make_tensor_value_info(logits.name, TensorProto.FLOAT, None)]
    graph = helper.make_graph(ops.nodes, "table", sides, ends, ops.constants)
    opsets = [helper.make_opsetid(*opset) for opset in OPSETS.items()]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())


def measured(path: str, settings: dict[str, str], runs: int) -> dict[str, float]:
    """The shortest time of one token, in milliseconds, and the memory, in MB, of a graph in this process."""
    import numpy as np

    ids = np.array([[5]])
    if path.endswith(".xml"):
        import openvino as ov

        core = ov.Core()
        core.available_devices  # noqa: B018 - loads the plugin, which is not the model's
        before = _memory()
        request = core.compile_model(path, "CPU", settings).create_infer_request()
        run = lambda: request.infer([ids])  # noqa: E731
    else:
        import onnxruntime as ort

        before = _memory()
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        run = lambda: session.run(None, {"ids": ids})  # noqa: E731
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return {"ms": 1e3 * min(times), "MB": (peak_memory_bytes() - before) / 1e6}


def _memory() -> int:
    forget_peak()
    return peak_memory_bytes()


def main() -> None:
    """Writes what is missing, measures each row in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for option, value in (("--words", 49152), ("--hidden", 576), ("--group", 64), ("--runs", 100)):
        parser.add_argument(option, type=int, default=value)
    given = parser.parse_args()
    print("| | ms a token | MB of memory | MB of files |\n|---|--:|--:|--:|")
    for kind, bits, settings in ROWS:
        folder = given.out / f"{kind}_{bits}"
        path = folder / ("table.xml" if kind == "openvino" else "model.onnx")
        if not folder.exists():
            folder.mkdir(parents=True)
            (write_openvino if kind == "openvino" else write_onnx)(path, given, bits)
        request = json.dumps([str(path), settings, given.runs])
        command = [sys.executable, __file__, "--measure", request]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        how = "".join(f", {key}={value}" for key, value in settings.items())
        print(f"| {kind}, {bits} bits{how} | {figures['ms']:.2f} | {figures['MB']:.0f} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(*json.loads(sys.argv[2]))))
    else:
        main()
