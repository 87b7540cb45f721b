"""GGUF files of tiny models, and files read by their specification and the published layouts of blocks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import saved_models
import tiny_models
import torch

from gyroquant.models.stores.packed import PackedStore


def write_gguf(path: Path, kind: str = "F32") -> torch.nn.Module:
    """A tiny Llama as a GGUF file, with llama.cpp's names and its order of query and key rows."""
    model = tiny_models.build("llama")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "head_count": 4,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(96)])
    writer.add_token_merges(["w 1"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                value = value.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(value.shape)
        value = np.ascontiguousarray(value)
        target = names.get_name(name, (".weight",))
        if kind != "F32" and value.ndim == 2:
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, gguf.quantize(value, quant), raw_dtype=quant)
        else:
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def written(store: PackedStore, out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Writes a model; returns the facts, the file's metadata and its tensors as (type id, values)."""
    facts = saved_models.written("gguf", store, out)
    assert [path.name for path in out.iterdir()] == [facts["file"]] == ["model.gguf"]
    return facts, *read_back(out / "model.gguf")


class Bytes:
    """The bytes of a file, read one value after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, length = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(length)]
        return self.take("BbHhIif?__Qqd"[kind])


K_QUANTS = (10, 11, 12, 13, 14, 23, 34, 35)  # and the ternary types


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, np.ndarray]]]:
    """A file's metadata and its tensors, by the specification: (type id, decoded fp32 values)."""
    file = Bytes(path.read_bytes())
    assert [file.take("I"), file.take("I")] == [0x46554747, 3]
    tensors, keys = file.take("Q"), file.take("Q")
    metadata = {}
    for _ in range(keys):
        key = file.string()
        metadata[key] = file.value(file.take("I"))
    table = []
    for _ in range(tensors):
        name = file.string()
        shape = [file.take("Q") for _ in range(file.take("I"))][::-1]
        table.append((name, shape, file.take("I"), file.take("Q")))
    start = -(-file.at // 32) * 32
    ends = [offset for *_, offset in table[1:]] + [len(file.data) - start]
    found = {}
    for (name, shape, kind, offset), end in zip(table, ends, strict=True):
        values, size = decoded(kind, file.data[start + offset :], shape)
        assert offset % 32 == 0
        assert end == offset + -(-size // 32) * 32, name
        found[name] = kind, values
    return metadata, found


def decoded(kind: int, data: bytes, shape: list[int]) -> tuple[np.ndarray, int]:
    """The values of a tensor and the bytes that it takes."""
    count = int(np.prod(shape))
    if kind in (0, 1, 30):
        stored = np.frombuffer(data, {0: "<f4", 1: "<f2", 30: "<u2"}[kind], count)
        plain = (stored.astype("<u4") << 16).view("<f4") if kind == 30 else stored.astype("<f4")
        return plain.reshape(shape), stored.nbytes
    if kind in K_QUANTS:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        blocks = np.frombuffer(data, np.uint8, count // block * size).reshape(-1, size)
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind)).reshape(shape), blocks.size
    block, size = {2: (32, 18), 3: (32, 20), 6: (32, 22), 8: (32, 34), 20: (32, 18), 42: (64, 18)}[kind]
    blocks = np.frombuffer(data, np.uint8, count // block * size).reshape(-1, size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == 8:
        values = scale * blocks[:, 2:].view(np.int8)
    elif kind == 42:
        values = scale * (np.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(-1, 64) - 1.0)
    elif kind == 6:
        highest = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
        codes = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], 1) + 16.0 * highest
        values = scale * (codes - 16)
    elif kind == 20:
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.IQ4_NL)
    else:
        codes = blocks[:, size - 16 :]
        codes = np.concatenate([codes & 15, codes >> 4], 1).astype(np.float32)
        offset = blocks[:, 2:4].copy().view("<f2").astype(np.float32) if kind == 3 else -8 * scale
        values = scale * codes + offset
    return values.astype(np.float32).reshape(shape), blocks.size
