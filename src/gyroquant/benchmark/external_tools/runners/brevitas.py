"""Quantizes a model with brevitas_ptq_llm, the program of Brevitas for language models, and writes codes and scales.

Run with the interpreter of Brevitas's environment: python -I brevitas.py --model FOLDER --tokens FILE --files FOLDER
--dense FOLDER "--options=OPTIONS OF brevitas_ptq_llm" --report FILE. Never imports gyroquant.

Brevitas simulates: its layers keep fp32 weights and round them in every forward pass. Its exporters for language models
need other runtimes or do not support these grids. So this script writes what such a grid stores: packed codes and, for
each group, an fp16 scale and a zero point with as many bits as a code. It computes the plain weights from these.
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
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def arguments() -> argparse.Namespace:
    """The arguments of the script."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "files", "dense", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--options", type=str.split, required=True)
    return parser.parse_args()


def peak_memory() -> int:
    """The peak resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def quantized(given: argparse.Namespace, tokens: Any) -> Any:
    """The model that brevitas_ptq_llm returns.

    The program accepts only names of data sets, and moves blocks to a GPU by name. Both functions are replaced: one
    returns our tokens, the other one leaves blocks where they are.
    """
    from brevitas_examples.common.parse_utils import parse_args
    from brevitas_examples.llm import main
    from brevitas_examples.llm.llm_quant import gpxq

    main.get_dataset_for_model = lambda **_: [{"input_ids": row[None].numpy()} for row in tokens]
    gpxq.send_to_device = lambda module, _: module
    options = ["--model", str(given.model), "--dtype", "float32", *given.options]
    options += ["--nsamples", str(len(tokens)), "--seqlen", str(tokens.shape[1])]
    args, extra = parse_args(main.create_args_parser(), options)
    return main.quantize_llm(args, extra)[1].eval()


def packed(values: Any, bits: int) -> Any:
    """Small integers as a dense bit stream, lowest bit first."""
    import numpy as np

    table = (values.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(table.astype(np.uint8), bitorder="little")


def stored(layer: Any) -> tuple[dict[str, Any], Any]:
    """The stored arrays of a layer by name (codes, scales, zeros), and the weight that they decode to."""
    import numpy as np
    import torch

    weight = layer.quant_weight()
    bits = int(weight.bit_width)
    scale = getattr(weight, "scale_", weight.scale).detach().reshape(len(layer.weight), -1, 1).half()
    zero = getattr(weight, "zero_point_", weight.zero_point).detach().round()
    low = -(2 ** (bits - 1)) if weight.signed else 0
    codes = weight.int().detach().int().reshape(*scale.shape[:2], -1) - low
    arrays = {"codes": packed(codes.numpy().astype(np.uint8), bits), "scales": scale.numpy()}
    if weight.signed:
        zero = torch.zeros(1)
    else:
        zero = zero.reshape(scale.shape)
        arrays["zeros"] = packed(zero.numpy().astype(np.uint8), bits)
    for name, numbers in (("codes", codes), ("zero points", zero)):
        if numbers.min() < 0 or numbers.max() >= 2**bits:
            raise SystemExit(f"Brevitas has {name} that do not fit {bits} bits")
    return arrays, ((codes + low - zero) * scale.float()).reshape(layer.weight.shape)


def stored_model(model: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The stored arrays of a quantized model, its plain weights, both by name, and the size of its rounded weights."""
    import torch
    from brevitas.nn import QuantLinear

    layers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    size, weights = 0, 0
    for name, layer in layers.items():
        parts, plain[name] = stored(layer)
        arrays |= {f"{name}_{part}": torch.from_numpy(array) for part, array in parts.items()}
        size += sum(array.nbytes for array in parts.values())
        weights += layer.weight.numel()
    inner = tuple(name.removesuffix("weight") for name in layers)
    for name, value in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inner) or name.endswith(".bias"):
            plain[name] = value.detach().clone()
    for name, value in plain.items():
        if name not in layers and (name != HEAD or not torch.equal(value, plain[EMBEDDING])):
            arrays[name] = value
    return arrays, plain, {"stored_bytes": size, "weights": weights, "layers": len(layers)}


def dense_model(model: Any, plain: dict[str, Any]) -> Any:
    """A model of transformers with plain weights. If a rotation untied the head, it is a parameter of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config
    config.tie_word_embeddings = config.tie_word_embeddings and torch.equal(plain[HEAD], plain[EMBEDDING])
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(plain)
    dense.tie_weights()
    return dense.eval()


def main() -> None:
    """Quantizes, saves, computes the plain weights, compares, reports."""
    given = arguments()
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokens = load_file(given.tokens)["tokens"]
    model = quantized(given, tokens)
    with torch.no_grad():
        arrays, plain, sizes = stored_model(model)
    save_file(arrays, given.files / "model.safetensors")
    seconds, peak = time.perf_counter() - START, peak_memory()
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    if len(linears) != sizes["layers"]:
        raise SystemExit(f"Brevitas rounded {sizes['layers']} of the {len(linears)} linear layers in the blocks")
    with torch.no_grad():
        expected = model(tokens[:1, :CHECKED]).logits.double()
        dense = dense_model(model, plain)
        decoded = dense(tokens[:1, :CHECKED]).logits.double()
    dense.save_pretrained(given.dense)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.dense)
    names = ("brevitas", "torch", "transformers")
    report = {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        **sizes,
        "reload_error": float((decoded - expected).norm() / expected.norm()),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }
    given.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
