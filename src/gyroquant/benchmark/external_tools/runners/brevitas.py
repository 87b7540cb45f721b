"""Has Brevitas's front door for language models quantize a model, and writes what its layers then hold.

Run with the interpreter of Brevitas's environment: python -I brevitas.py --model FOLDER --tokens FILE --files FOLDER
--dense FOLDER "--options=OPTIONS OF brevitas_ptq_llm" --report FILE. Never imports gyroquant.

Brevitas simulates: its layers hold fp32 weights and round them as they run, and its exporters for language models need
other runtimes or have no such grid. So what a grid of its kind stores is written here: codes packed to their bits, an
fp16 scale a group and a zero point of as many bits as a code. The plain weights are computed from these.
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
CHECKED = 32  # tokens that what is read back is compared on
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def arguments() -> argparse.Namespace:
    """What the script was told."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "files", "dense", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--options", type=str.split, required=True)
    return parser.parse_args()


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def quantized(given: argparse.Namespace, tokens: Any) -> Any:
    """The model as the front door returns it. It can be told names of data sets only, and sends blocks to a GPU by
    name: both functions are replaced, by one that returns our tokens and one that leaves blocks where they are.
    """
    from brevitas_examples.common.parse_utils import parse_args
    from brevitas_examples.llm import main
    from brevitas_examples.llm.llm_quant import gpxq

    main.get_dataset_for_model = lambda **_: [{"input_ids": row[None].numpy()} for row in tokens]
    gpxq.send_to_device = lambda thing, _: thing
    options = ["--model", str(given.model), "--dtype", "float32", *given.options]
    options += ["--nsamples", str(len(tokens)), "--seqlen", str(tokens.shape[1])]
    args, extra = parse_args(main.create_args_parser(), options)
    return main.quantize_llm(args, extra)[1].eval()


def packed(values: Any, bits: int) -> Any:
    """Small numbers packed to their bits, lowest first."""
    import numpy as np

    table = (values.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(table.astype(np.uint8), bitorder="little")


def stored(layer: Any) -> tuple[dict[str, Any], Any]:
    """What a layer's grid stores, as arrays by part, and the weight that this stands for."""
    import numpy as np
    import torch

    held = layer.quant_weight()
    bits = int(held.bit_width)
    scale = getattr(held, "scale_", held.scale).detach().reshape(len(layer.weight), -1, 1).half()
    zero = getattr(held, "zero_point_", held.zero_point).detach().round()
    low = -(2 ** (bits - 1)) if held.signed else 0
    codes = held.int().detach().int().reshape(*scale.shape[:2], -1) - low
    arrays = {"codes": packed(codes.numpy().astype(np.uint8), bits), "scales": scale.numpy()}
    if held.signed:
        zero = torch.zeros(1)
    else:
        zero = zero.reshape(scale.shape)
        arrays["zeros"] = packed(zero.numpy().astype(np.uint8), bits)
    for name, numbers in (("codes", codes), ("zero points", zero)):
        if numbers.min() < 0 or numbers.max() >= 2**bits:
            raise SystemExit(f"Brevitas holds {name} that {bits} bits do not")
    return arrays, ((codes + low - zero) * scale.float()).reshape(layer.weight.shape)


def taken_apart(model: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Everything that a quantized model stores, its plain weights by name, and how many bits its rounded ones take."""
    import torch
    from brevitas.nn import QuantLinear

    layers = {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, QuantLinear)}
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
    """A model of transformers with plain weights; its head is a parameter of its own where a rotation untied it."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config
    config.tie_word_embeddings = config.tie_word_embeddings and torch.equal(plain[HEAD], plain[EMBEDDING])
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict(plain)
    made.tie_weights()
    return made.eval()


def main() -> None:
    """Quantizes, saves, computes the plain weights, compares, reports."""
    given = arguments()
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokens = load_file(given.tokens)["tokens"]
    model = quantized(given, tokens)
    with torch.no_grad():
        arrays, plain, sizes = taken_apart(model)
    save_file(arrays, given.files / "model.safetensors")
    seconds, peak = time.perf_counter() - START, peak_memory()
    blocks = [one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)]
    if len(blocks) != sizes["layers"]:
        raise SystemExit(f"Brevitas rounded {sizes['layers']} layers where the blocks have {len(blocks)}")
    with torch.no_grad():
        expected = model(tokens[:1, :CHECKED]).logits.double()
        dense = dense_model(model, plain)
        found = dense(tokens[:1, :CHECKED]).logits.double()
    dense.save_pretrained(given.dense)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.dense)
    names = ("brevitas", "torch", "transformers")
    report = {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        **sizes,
        "reload_error": float((found - expected).norm() / expected.norm()),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }
    given.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
