"""MLX's checkpoints, which mlx-lm opens on Apple's processors and, more slowly, on Linux.

A linear layer with weights of shape (out, in), and a table of embeddings alike, are stored as

    weight  uint32 (out, in * bits / 32)  codes, packed along the inputs, lowest bits first
    scales  fp16   (out, groups)
    biases  fp16   (out, groups)

and stand for ``codes * scales + biases``. Groups have 32, 64 or 128 weights. Larger ones are stored as several of 128,
64 or 32, whichever is the largest that divides them, with the same scale.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from gyroquant.formats.base import Format, FormatCapabilities, WeightType
from gyroquant.formats.checkpoint import DecodedTables, dtype_name, pack_words, write_rest, write_tensors
from gyroquant.formats.mlx.runtime import MlxRuntime
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed import PackedStore

_GROUPS = (128, 64, 32)


class Mlx(Format):
    """An MLX checkpoint. Every rounded layer has its own bits and group size.

    Scales are those of the saved model. Biases are minus zero point times scale, rounded to fp16. They are exact where
    the zero point is a power of two, as on symmetric grids that are not mid-rise. What a bias is off is at most 2^-11
    of it.
    """

    name = "mlx"
    title = "MLX"
    runtime = MlxRuntime
    usage = (
        '```python\nfrom mlx_lm import generate, load\n\nmodel, tokenizer = load("FOLDER")\n'
        'print(generate(model, tokenizer, prompt="..."))\n```'
    )
    capabilities = FormatCapabilities(
        weights=(WeightType("affine", bits=(2, 3, 4, 5, 6, 8), midrise=True, float_zero=True, block=_GROUPS[-1]),),
        model_types=(
            *("cohere", "cohere2", "ernie4_5", "gemma3_text", "glm4", "granite", "helium", "llama", "mistral"),
            *("nemotron", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2"),
        ),
        tables=True,
        decodes=True,
        unties=True,
    )

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        decoded, largest = DecodedTables(self, store), 0.0
        kinds: dict[str, tuple[int, int]] = {}

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            nonlocal largest
            if op in decoded:
                return decoded.tensors(op, weight)
            kinds[op.module] = weight.grid.bits, _group(weight)
            exact = weight.dequantize()
            largest = max(largest, float((_stored(weight) - exact).abs().max() / exact.abs().max().clamp_min(1e-30)))
            return {f"{op.module}.{part}": tensor for part, tensor in _arrays(weight).items()}

        write_tensors(store, folder, encode)
        folder.merge()
        write_rest(store, folder, store.dtype, more={"quantization": _quantization(kinds)})
        facts = {"layers": len(kinds), "dtype": dtype_name(store.dtype), "deviation": largest}
        return facts | decoded.facts()

    def weight_in_file(self, store: PackedStore, name: str) -> Tensor | None:
        weight = store.quantized(name)
        return store.graph.op(name).to_param(_stored(weight))


def _group(weight: QuantizedWeight) -> int:
    """The number of weights that share a scale in the file."""
    size = weight.grid.group_of(weight.codes.shape[1])
    return next(group for group in _GROUPS if size % group == 0)


def _biases(weight: QuantizedWeight) -> Tensor:
    return (-weight.params.zero * weight.params.scale).half()


def _stored(weight: QuantizedWeight) -> Tensor:
    """The numbers that the file stands for, shape (rows, columns), fp32."""
    rows, columns = weight.codes.shape
    codes = weight.codes.view(rows, weight.params.scale.shape[1], -1).float()
    return (codes * weight.params.scale + _biases(weight).float()).view(rows, columns)


def _arrays(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that are stored for a layer."""
    columns = weight.codes.shape[1]
    repeats = columns // _group(weight) // weight.params.scale.shape[1]
    words = pack_words(weight.codes, weight.grid.bits).T.contiguous()
    scales, biases = (
        part.squeeze(-1).half().repeat_interleave(repeats, 1) for part in (weight.params.scale, _biases(weight))
    )
    return {"weight": words.view(torch.uint32), "scales": scales, "biases": biases}


def _quantization(kinds: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The entry of config.json: the most frequent bits and group size, and those of every layer."""

    def described(kind: tuple[int, int]) -> dict[str, Any]:
        return {"group_size": kind[1], "bits": kind[0], "mode": "affine"}

    usual = Counter(kinds.values()).most_common(1)[0][0]
    return described(usual) | {module: described(kind) for module, kind in kinds.items()}
