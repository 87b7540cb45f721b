"""GGUF, the file of llama.cpp: weights, settings and tokenizer in one.

A row of a rounded matrix is cut into blocks. Each block has an fp16 scale d, followed by its packed codes q:

    Q2_0  (q - 1) * d in blocks of 64, four codes a byte, lowest bits first
    Q4_0  (q - 8) * d in blocks of 32, two codes a byte: the first half of a block low, the second half high
    Q4_1  q * d + m   like Q4_0, with an fp16 offset m after d
    Q8_0  q * d       in blocks of 32, one signed code a byte

Our weights are whole multiples of their scale, or odd multiples of half of it, and the types without m hold them
exactly. 4-bit codes with zero points need m, a zero point times a scale, which is rounded to fp16. Groups larger than a
block repeat their scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, FormatCapabilities, Layer, ModelRequirements, WeightType, requirements_of
from gyroquant.formats.gguf.header import GGUF_FILE
from gyroquant.formats.gguf.llama_cpp_runtime import LlamaCppRuntime
from gyroquant.formats.gguf.rope import describe_rope, rope_problems, rope_tensors
from gyroquant.formats.gguf.tokenizer import add_tokenizer
from gyroquant.formats.gguf.tokenizer_check import compare_tokenizers
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import QuantizedWeight
from gyroquant.models.stores.packed import PackedStore

_ROWS = 4096  # rows that are compared at once when a dtype is chosen
_KINDS = ("symmetric", "asymmetric", "midrise")
_RESERVED = ("phi-3", "phi3", "modern-bert")  # for models with such a name, llama.cpp changes rules of special tokens


# llama.cpp's name of a model type. In its "llama", RoPE turns neighbouring coordinates, so the rows of queries and keys
# are put in that order. This architecture may also have factors of RoPE's frequencies, and biases.
_LLAMA = "llama"
_ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": "qwen2", "qwen3": "qwen3"}


class _Type(NamedTuple):
    """A type of tensors.

    id: its number in GGUF files.
    file_type: the `file_type` of files that consist mostly of it.
    block: numbers in a block.
    size: bytes in a block.
    """

    id: int
    file_type: int
    block: int
    size: int


_TYPES = {
    "F32": _Type(0, 0, 1, 4),
    "F16": _Type(1, 1, 1, 2),
    "BF16": _Type(30, 32, 1, 2),
    "Q4_0": _Type(2, 2, 32, 18),
    "Q4_1": _Type(3, 3, 32, 20),
    "Q8_0": _Type(8, 7, 32, 34),
    "Q2_0": _Type(42, 41, 64, 18),  # newer than the enumerations of the gguf package
}


def _holds(name: str, bits: tuple[int, ...], *kinds: str) -> WeightType:
    chosen = {kind: kind in kinds for kind in _KINDS}
    return WeightType(name, bits, **chosen, block=_TYPES[name].block)


class Gguf(Format):
    """One file, `model.gguf`, with rounded weights as codes and all others exactly, as plain numbers."""

    name = "gguf"
    title = "GGUF (llama.cpp)"
    runtime = LlamaCppRuntime
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    capabilities = FormatCapabilities(
        weights=(  # the smallest first
            _holds("Q2_0", (2,), "symmetric"),
            _holds("Q2_0", (1,), *_KINDS),
            _holds("Q4_0", (1, 2, 3), *_KINDS),
            _holds("Q4_0", (4,), "symmetric"),
            _holds("Q4_1", (4,), "asymmetric"),
            _holds("Q8_0", (4,), "midrise"),
            _holds("Q8_0", (5, 6, 7), *_KINDS),
            _holds("Q8_0", (8,), "symmetric"),
        ),
        model_types=tuple(_ARCHITECTURES),
    )

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        supported = needs.config is not None and needs.model_type in _ARCHITECTURES
        return [*super().incompatibilities(needs), *(_unsupported_settings(needs.config) if supported else ())]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns the number of tensors of each type, the largest deviation of a rounded weight
        relative to the largest weight of its tensor, and notes. Raises InputError for scales and offsets that fp16
        cannot hold.
        """
        layers = requirements_of(store).layers
        rounded = {layer.name: kind.name for layer in layers if (kind := self.capabilities.type_of(layer))}
        types = {name: rounded.get(name) or plain_type(store, name) for name in store.shapes}
        deviation, described = write_file(store, folder.partial / GGUF_FILE, types)
        counts = dict(Counter(types.values()).most_common())
        return {"file": GGUF_FILE, "types": counts, "deviation": deviation, **described}

    def _layers(self, layers: Iterable[Layer]) -> Iterable[tuple[str, str]]:
        for kind, text in super()._layers(layers):
            yield kind, f"{text} (--requantize TYPE has llama.cpp round it again, which loses more)"


def write_file(store: PackedStore, path: Path, types: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
    """Writes a model into one file. `types` gives the type of each tensor. Rounded tensors are written as codes or, in
    a plain type, decoded. Returns the largest relative deviation, and the notes and the comparison of tokens.
    """
    sizes: Counter[str] = Counter()
    for name in store.description["tensors"]:
        sizes[types[name]] += prod(store.shapes[name])
    main = sizes.most_common(1)[0][0]
    with closing(gguf.GGUFWriter(None, _ARCHITECTURES[store.config.model_type])) as writer:
        notes = _describe(writer, store, _TYPES[main].file_type)
        tokenizer, more = add_tokenizer(writer, store)
        deviation = _write_tensors(writer, store, types, path)
    if tokenizer is None:
        return deviation, {"notes": notes + more, "tokenizer": None}
    facts, differences = compare_tokenizers(path, tokenizer)
    return deviation, {"notes": notes + more + differences, "tokenizer": facts}


def _unsupported_settings(config: Any) -> Iterable[str]:
    """The settings of a model that llama.cpp would not follow, one sentence each."""
    name = _ARCHITECTURES[config.model_type]
    if config.hidden_act != "silu":
        yield f"llama.cpp does not support the activation {config.hidden_act} for {name}; it supports silu"
    yield from rope_problems(config, name, tensors=name == _LLAMA)
    if getattr(config, "attention_bias", False) and name != _LLAMA:
        yield f"llama.cpp does not support the biases (attention_bias) of {config.model_type}"


def _describe(writer: gguf.GGUFWriter, store: PackedStore, file_type: int) -> list[str]:
    """Writes all metadata of a model except the tokenizer. Returns notes."""
    config, graph = store.config, store.graph
    writer.add_type("model")
    name = store.folder.resolve().name
    if not any(part in name.lower() for part in _RESERVED):
        writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(graph.blocks))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(graph.hidden)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(graph.heads)
    writer.add_head_count_kv(graph.kv_heads)
    writer.add_key_length(graph.head_dim)
    writer.add_value_length(graph.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(graph.head_dim)
    notes = describe_rope(writer, config)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    note = f"llama.cpp attends to all tokens, not to the last {window}: longer texts give other results"
    return [*notes, note] if window < config.max_position_embeddings else notes


def plain_type(store: PackedStore, name: str) -> str:
    """The smallest type that holds a parameter exactly. Vectors are fp32, as llama.cpp requires."""
    tensor = store.read([name])[name]
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)) if tensor.dim() > 1 else ():
        if all(torch.equal(rows.to(dtype).double(), rows.double()) for rows in tensor.split(_ROWS)):
            return kind
    return "F32"


def tensor_names(store: PackedStore) -> dict[str, str]:
    """llama.cpp's name of every parameter of a model."""
    label = _ARCHITECTURES[store.config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == label)
    names = gguf.get_tensor_name_map(architecture, len(store.graph.blocks))
    return {name: names.get_name(name, (".weight", ".bias")) for name in store.shapes}


def _write_tensors(writer: gguf.GGUFWriter, store: PackedStore, types: Mapping[str, str], path: Path) -> float:
    """Writes the header, the metadata and all tensors to the file. Returns the largest relative deviation."""
    names = tensor_names(store)
    extra = rope_tensors(store.config, store.graph.head_dim)
    table = [(name, "F32", tuple(tensor.shape)) for name, tensor in extra.items()]
    table += [(names[name], types[name], store.shapes[name]) for name in types]
    for name, kind, shape in table:
        number, _, block, size = _TYPES[kind]  # with `number`, the writer ignores the numpy dtype
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // block * size, number)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(_plain(tensor, "F32"))
    largest = 0.0
    for name, kind in types.items():
        order = _row_order(store, name)
        if _TYPES[kind].block > 1:
            data, deviation = _encode(name, kind, store.quantized(name), order)
            largest = max(largest, deviation)
        else:
            data = _plain(store.read([name])[name][order], kind)
        writer.write_tensor_data(data)
    return largest


def _row_order(store: PackedStore, name: str) -> Tensor | slice:
    """The order of rows that makes the pairs of RoPE neighbours, for weights and biases of queries and keys. In our
    order, the first half of each head is paired with the second. Other parameters, and architectures of llama.cpp in
    which RoPE turns halves, keep their order.
    """
    heads = {"q_proj": store.graph.heads, "k_proj": store.graph.kv_heads}.get(name.split(".")[-2])
    if heads is None or _ARCHITECTURES[store.config.model_type] != _LLAMA:
        return slice(None)
    rows = torch.arange(heads * store.graph.head_dim)
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _plain(tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor as plain numbers, little-endian."""
    if kind == "BF16":
        return tensor.bfloat16().contiguous().view(torch.int16).numpy().astype("<i2")
    return tensor.float().numpy().astype("<f2" if kind == "F16" else "<f4")


def _encode(name: str, kind: str, weight: QuantizedWeight, order: Tensor | slice) -> tuple[np.ndarray, float]:
    """A rounded matrix as the bytes of its blocks, shape (rows, bytes), and its largest deviation relative to its
    largest weight. Raises InputError for scales and offsets that fp16 cannot hold.
    """
    codes, scale, zero = weight.codes[order], weight.params.scale[order], weight.params.zero[order]
    half = 1 if torch.equal(zero, zero.round()) else 2  # numbers at odd multiples of half a step are counted in halves
    heads, deviation = [scale / half], 0.0
    if not torch.equal(heads[0].half().float(), heads[0]):
        raise InputError(
            f"{name} has a group whose scale is too small: GGUF needs half of it for midrise grids, and fp16 cannot "
            "hold that; leave midrise out of the recipe, or add the layer to weights.ignore"
        )
    blocks = codes.view(len(codes), -1, _TYPES[kind].block).to(torch.int16)
    repeat = blocks.shape[1] // scale.shape[1]
    steps = half * blocks - (half * zero).to(torch.int16).repeat_interleave(repeat, 1)
    if kind == "Q2_0":  # our steps are -2 .. 1 and the type has -1 .. 2, so steps and scale are negated
        steps, heads = -steps, [-heads[0]]
    if kind == "Q4_1":
        offset, other = -zero * scale, (15 - zero) * scale  # m, and m of codes counted from the other end
        flip = (other.half().float() - other).abs() < (offset.half().float() - offset).abs()
        steps = torch.where(flip.repeat_interleave(repeat, 1), 15 - blocks, blocks)
        exact = torch.where(flip, other, offset)
        heads = [torch.where(flip, -scale, scale), exact.half().float()]
        if not bool(heads[1].isfinite().all()):
            raise InputError(
                f"{name} has a group with an offset too large for fp16 (above 65504); add the layer to weights.ignore"
            )
        deviation = float((heads[1] - exact).abs().max() / weight.dequantize().abs().max().clamp_min(1e-30))
    numbers = [head.squeeze(-1).repeat_interleave(repeat, 1).numpy().astype("<f2") for head in heads]
    parts = (np.stack(numbers, -1).view(np.uint8), _pack(kind, steps).to(torch.uint8).numpy())
    return np.concatenate(parts, -1).reshape(len(codes), -1), deviation


def _pack(kind: str, steps: Tensor) -> Tensor:
    """Packs multiples of the scale, shape (rows, blocks, block), to the bytes of a type, (rows, blocks, bytes)."""
    if kind == "Q8_0":
        return steps & 0xFF
    if kind == "Q2_0":
        codes = (steps + 1).unflatten(-1, (-1, 4))
        return torch.stack([codes[..., i] << 2 * i for i in range(4)]).sum(0)
    low, high = (steps + (8 if kind == "Q4_0" else 0)).chunk(2, -1)
    return low | high << 4
