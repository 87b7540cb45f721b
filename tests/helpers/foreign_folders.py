"""Folders as other programs quantize them, written tensor by tensor from the definitions of their formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Encoded = tuple[dict[str, Tensor], Tensor]
"""What is stored of a layer, by the ends of its names, and the weight that this means, fp32."""
Encoder = Callable[[Tensor, torch.Generator], Encoded]


def folder(source: Path, out: Path, settings: Any, encode: Encoder) -> dict[str, Tensor]:
    """A copy of a model's folder with the layers of its blocks encoded; returns what their weights are then."""
    shutil.copytree(source, out)
    tensors, meant, generator = load_file(out / "model.safetensors"), {}, torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        stored, meant[name] = encode(tensors.pop(name), generator)
        tensors |= {
            name.removesuffix("weight") + end: array.clone(memory_format=torch.contiguous_format)
            for end, array in stored.items()
        }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    describe(out, {"quantization_config": settings})
    return meant


def describe(out: Path, changes: Mapping[str, Any]) -> None:
    """Changes settings in config.json."""
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plain(source: Path, out: Path, weights: Mapping[str, Tensor]) -> Path:
    """A copy of a model's folder with these weights, as plain numbers."""
    shutil.copytree(source, out)
    save_file(
        load_file(out / "model.safetensors") | dict(weights), out / "model.safetensors", metadata={"format": "pt"}
    )
    return out


def stream(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as rows of int32 words: one stream of bits, the lowest first."""
    planes = (codes.numpy().astype(np.int64)[..., None] >> np.arange(bits)) & 1
    rows = planes.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], -rows.shape[-1] % 32), np.uint8)], -1)
    return torch.from_numpy(np.packbits(rows, axis=-1, bitorder="little").view(np.int32).copy())


def drawn(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=generator)


def scales(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales in fp16, no two alike."""
    return (0.01 + 0.05 * torch.rand(shape, generator=generator)).half()


def gptq(bits: int, group: int, minus_one: bool, order: bool = False, with_index: bool = True) -> Encoder:
    """GPTQ's layout 1 (`minus_one`) or 2; zero points reach from 0 to the largest code.

    Layout 1 as GPTQModel writes it: one is taken from each field of a word at once, so that 0 borrows from the next.
    """

    def encode(weight: Tensor, generator: torch.Generator) -> Encoded:
        outputs, inputs = weight.shape
        codes, zeros = drawn((inputs, outputs), bits, generator), drawn((inputs // group, outputs), bits, generator)
        scale = scales(zeros.shape, generator)
        index = torch.arange(inputs) // group
        index = index[torch.randperm(inputs, generator=generator)] if order else index
        words = stream(zeros, bits)
        if minus_one and 32 % bits == 0:
            ones = sum(1 << at for at in range(0, 32, bits))
            words = torch.from_numpy((words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
        elif minus_one:
            words = stream((zeros - 1) % (1 << bits), bits)
        stored = {"qweight": stream(codes.T, bits).T, "qzeros": words, "scales": scale}
        stored |= {"g_idx": index.int()} if with_index else {}
        return stored, ((codes - zeros[index]) * scale.float()[index]).T.contiguous()

    return encode


def awq(bits: int, group: int) -> Encoder:
    """AutoAWQ's layout for GEMM kernels."""

    def shuffled(codes: Tensor) -> Tensor:
        return stream(codes.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), bits)

    def encode(weight: Tensor, generator: torch.Generator) -> Encoded:
        outputs, inputs = weight.shape
        codes, zeros = drawn((inputs, outputs), bits, generator), drawn((inputs // group, outputs), bits, generator)
        scale = scales(zeros.shape, generator)
        index = torch.arange(inputs) // group
        stored = {"qweight": shuffled(codes), "qzeros": shuffled(zeros), "scales": scale}
        return stored, ((codes - zeros[index]) * scale.float()[index]).T.contiguous()

    return encode


def fp8(block: tuple[int, int] | None, scale_name: str = "weight_scale_inv", **beside: Tensor) -> Encoder:
    """Floats of 8 bits with a scale for each block, or one for all; what is `beside` is stored with each layer."""

    def encode(weight: Tensor, generator: torch.Generator) -> Encoded:
        rows, columns = weight.shape
        high, wide = block or (rows, columns)
        grid = scales((-(-rows // high), -(-columns // wide)), generator).float()
        codes = (40 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)
        meant = codes.float() * grid.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        return {"weight": codes, scale_name: grid if block else grid.reshape(())} | beside, meant

    return encode


NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nf4(block: int, nested: bool, storage: torch.dtype = torch.uint8) -> Encoder:
    """bitsandbytes' NF4: blocks of the flat tensor, the upper half of a byte first; `nested` rounds the maxima too."""

    def encode(weight: Tensor, generator: torch.Generator) -> Encoded:
        count = weight.numel()
        codes, blocks = drawn((count,), 4, generator), -(-count // block)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [*weight.shape]}
        stored = {"weight": ((codes[::2] << 4) | codes[1::2]).to(torch.uint8).view(storage).reshape(-1, 1)}
        if nested:
            state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": 0.25}
            steps, small = torch.rand(256, generator=generator), drawn((blocks,), 8, generator)
            outer = torch.rand(-(-blocks // 8), generator=generator)
            largest = steps[small] * outer.repeat_interleave(8)[:blocks] + 0.25
            stored |= {"weight.absmax": small.to(torch.uint8), "weight.nested_absmax": outer}
            stored["weight.nested_quant_map"] = steps
        else:
            largest = torch.rand(blocks, generator=generator)
            stored["weight.absmax"] = largest
        stored["weight.quant_map"] = NF4
        data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored["weight.quant_state.bitsandbytes__nf4"] = data
        return stored, (NF4[codes] * largest.repeat_interleave(block)[:count]).reshape(weight.shape)

    return encode


def int8(weight: Tensor, generator: torch.Generator) -> Encoded:
    """bitsandbytes' int8: rows times SCB over 127."""
    codes, largest = drawn(tuple(weight.shape), 8, generator) - 128, torch.rand(len(weight), generator=generator)
    stored = {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes * largest[:, None] / 127


def packed(bits: int, group: int, symmetric: bool, padded: bool = False, order: bool = False) -> Encoder:
    """compressed-tensors' pack-quantized; `padded` as until 0.17, with whole codes in each word."""

    def words(codes: Tensor) -> Tensor:
        each = 32 // bits
        if not padded:
            return stream(codes, bits)
        filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
        sums = (filled.long() << (torch.arange(each) * bits)).sum(-1)
        return torch.from_numpy(sums.numpy().astype(np.uint32).view(np.int32))

    def encode(weight: Tensor, generator: torch.Generator) -> Encoded:
        rows, columns = weight.shape
        codes, groups = drawn((rows, columns), bits, generator), columns // group
        middle = 1 << (bits - 1)
        zeros = torch.full((rows, groups), middle) if symmetric else drawn((rows, groups), bits, generator)
        scale = scales((rows, groups), generator)
        index = torch.arange(columns) // group
        index = index[torch.randperm(columns, generator=generator)] if order else index
        stored = {"weight_packed": words(codes), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
        stored |= {} if symmetric else {"weight_zero_point": words(zeros.T).T}
        stored |= {"weight_g_idx": index.int()} if order else {}
        return stored, (codes - zeros[:, index]) * scale.float()[:, index]

    return encode


def scheme(bits: int, group: int = 32, symmetric: bool = True, **changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    return settings | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}} | changes
