"""Compresses the weights of a model with NNCF, saves it as OpenVINO IR, and decodes the IR to plain weights.

Run with the interpreter of NNCF's environment: python -I nncf.py --model FOLDER --tokens FILE --files FOLDER --dense
FOLDER --mode INT4_ASYM --group-size 64 [--awq] [--scale-estimation] [--gptq] --report FILE. Never imports gyroquant.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.perf_counter()
CHECKED = 32  # tokens on which the decoded weights are compared
PREFIX = "self.decoder."  # prefix of parameter names in the graph of `Logits`
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight")  # weights that are not in a block
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def arguments() -> argparse.Namespace:
    """The arguments of the script."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "files", "dense", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--group-size", type=int, required=True)
    for name in ("awq", "scale-estimation", "gptq"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def peak_memory() -> int:
    """The peak resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def graph_of(model: Any) -> Any:
    """The graph of a model without a KV cache: from ids, shape (1, length), to logits."""
    import openvino as ov
    import torch

    class Logits(torch.nn.Module):
        def __init__(self, decoder: Any):
            super().__init__()
            self.decoder = decoder

        def forward(self, input_ids: Any) -> Any:
            length = input_ids.shape[1]
            hidden = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
            positions = torch.arange(length)[None]
            return self.decoder(
                input_ids, attention_mask=hidden[None, None], position_ids=positions, use_cache=False
            ).logits

    with torch.no_grad():
        example = {"input_ids": torch.arange(8)[None]}
        return ov.convert_model(Logits(model), example_input=example, input=[("input_ids", [1, -1])])


def compress(graph: Any, tokens: Any, given: argparse.Namespace) -> Any:
    """The graph with rounded weights. Embedding and head have the type that NNCF gives them by default (8 bits)."""
    import nncf

    calibrated = given.awq or given.scale_estimation or given.gptq
    texts = [{"input_ids": row[None].numpy()} for row in tokens]
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode[given.mode],
        ratio=1.0,
        group_size=given.group_size,
        all_layers=False,
        dataset=nncf.Dataset(texts) if calibrated else None,
        subset_size=len(texts),
        awq=given.awq,
        scale_estimation=given.scale_estimation,
        gptq=given.gptq,
    )


def decoded(node: Any) -> tuple[Any, int]:
    """The fp32 value of a constant, or of a piece of graph that decodes one, and its stored bytes."""
    import numpy as np

    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_data(dtype=np.float32), node.get_byte_size()
    first, size = decoded(node.input_value(0).get_node())
    if kind == "Convert":
        return first, size
    if kind == "Reshape":
        return first.reshape(node.get_output_shape(0)), size
    if kind in ("Subtract", "Multiply"):
        second, more = decoded(node.input_value(1).get_node())
        return (np.subtract if kind == "Subtract" else np.multiply)(first, second), size + more
    raise SystemExit(f"the IR decodes a weight with {kind}, which this script does not support")


def awq_scales(matmul: Any) -> tuple[Any, str]:
    """The scales by which AWQ multiplies the inputs of a layer, and the name of that node; (None, "") without AWQ."""
    todo = [matmul.input_value(0).get_node()]
    for node in todo:
        if node.get_type_name() != "Multiply":
            continue
        if node.get_friendly_name().endswith("awq_mul"):
            return decoded(node.input_value(1).get_node())[0].reshape(-1), node.get_friendly_name()
        if node is todo[0]:
            todo += [value.get_node() for value in node.input_values()]
    return None, ""


def rounded_weights(graph: Any) -> dict[str, tuple[Any, int]]:
    """Every rounded weight of a graph by its parameter's name: its values times AWQ's scales, and its bytes.

    A table of embeddings is the first input of a Gather, the weight of a layer the second input of a MatMul.
    """
    weights: dict[str, tuple[Any, int]] = {}
    used: set[str] = set()
    for matmul in graph.get_ordered_ops():
        if matmul.get_type_name() not in ("MatMul", "Gather"):
            continue
        layer = matmul.get_type_name() == "MatMul"
        node = matmul.input_value(int(layer)).get_node()
        codes = node
        while codes.get_type_name() != "Constant" and codes.get_input_size():
            codes = codes.input_value(0).get_node()
        name = codes.get_friendly_name()
        if codes is node or not name.startswith(PREFIX) or codes.get_element_type().get_type_name() in ("f16", "f32"):
            continue
        weight, size = decoded(node)
        scales, inserted = awq_scales(matmul) if layer else (None, "")
        if scales is not None:
            weight, used = weight * scales, used | {inserted}
        weights[name.removeprefix(PREFIX)] = weight, size
    every = {node.get_friendly_name() for node in graph.get_ops() if node.get_friendly_name().endswith("awq_mul")}
    if every - used:
        raise SystemExit(f"AWQ inserted {sorted(every - used)[0]}, which does not lead to a rounded layer")
    return weights


def reload_error(path: Path, model: Any, tokens: Any) -> float:
    """The relative error of logits between the IR, run by OpenVINO in fp32, and the plain weights."""
    import openvino as ov
    import torch

    ids = tokens[:1, :CHECKED]
    expected = ov.Core().compile_model(str(path), "CPU", EXACT)({"input_ids": ids.numpy()})[0]
    expected = torch.from_numpy(expected.copy()).double()
    with torch.no_grad():
        logits = model(ids).logits.double()
    return float((logits - expected).norm() / expected.norm())


def main() -> None:
    """Compresses, saves, reads back, compares, reports."""
    given = arguments()
    import openvino as ov
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(given.tokens)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    path = given.files / "openvino_model.xml"
    ov.save_model(compress(graph_of(model), tokens, given), str(path), compress_to_fp16=False)
    seconds, peak = time.perf_counter() - START, peak_memory()

    weights = rounded_weights(ov.Core().read_model(str(path)))
    linears = {
        f"model.layers.{name}.weight": module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    inside = {name: weight for name, weight in weights.items() if name not in OUTSIDE}
    if set(inside) != set(linears):
        different = sorted(set(inside) ^ set(linears))
        raise SystemExit(f"NNCF rounded {len(inside)} layers, the blocks have {len(linears)}; {different[0]} differs")
    for name, (weight, _) in weights.items():
        parameter = model.get_parameter(name)
        parameter.data = torch.from_numpy(weight).view_as(parameter).float().contiguous()
    model.save_pretrained(given.dense)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.dense)
    report = {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "stored_bytes": sum(size for _, size in inside.values()),
        "weights": sum(weight.size for weight, _ in inside.values()),
        "reload_error": reload_error(path, model, tokens),
        "versions": {name: version(name) for name in ("nncf", "openvino", "torch", "transformers")}
        | {"python": platform.python_version()},
    }
    given.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
