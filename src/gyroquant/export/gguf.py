"""GGUF, the file of llama.cpp: weights, settings and tokenizer in one.

A row of a rounded matrix is cut into blocks, each with an fp16 scale d in front of its packed codes q:

    Q2_0  (q - 1) * d in blocks of 64, four codes a byte, lowest bits first
    Q4_0  (q - 8) * d in blocks of 32, two codes a byte: the first half of a block low, the second half high
    Q4_1  q * d + m   likewise, with an fp16 offset m behind d
    Q8_0  q * d       in blocks of 32, one signed code a byte

Our numbers are whole multiples of their scale, or odd ones of half of it, and fit the types without m exactly; m, which
4 bits with zero points need, is a zero point times a scale, rounded. Groups larger than a block repeat their scale.
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
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Layer, Needs, WeightType, needs_of
from gyroquant.export.gguf_rope import describe_rope, rope_problems, rope_tensors
from gyroquant.export.gguf_tokenizer import add_tokenizer
from gyroquant.export.gguf_tokenizer_check import compare_tokenizers
from gyroquant.grids import QuantizedWeight
from gyroquant.models.packed import PackedStore

FILE = "model.gguf"
_ROWS = 4096  # looked at together when a dtype is chosen
_KINDS = ("symmetric", "asymmetric", "midrise")
_MEANINGFUL = ("phi-3", "phi3", "modern-bert")  # by such a name, llama.cpp changes the rules of special tokens


# What llama.cpp calls a model type. What runs as its "llama" has RoPE turn neighbours, so that rows of queries and keys
# are put in that order, may have factors for its frequencies, and may have biases.
_LLAMA = "llama"
_ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": "qwen2", "qwen3": "qwen3"}


class _Type(NamedTuple):
    """A way in which numbers are stored: its id, the `file_type` of files that consist mostly of it, and how many
    numbers and bytes a block has.
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
    """One file, `model.gguf`, with rounded weights as codes and all others as plain numbers that hold them exactly."""

    name = "gguf"
    title = "GGUF (llama.cpp)"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    carries = Carries(
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

    def problems(self, needs: Needs) -> list[str]:
        known = needs.config is not None and needs.model_type in _ARCHITECTURES
        return [*super().problems(needs), *(_refusals(needs.config) if known else ())]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns the number of tensors of each type, the largest deviation of a rounded weight
        relative to the largest weight of its tensor, and what there is to note. Raises InputError for scales and
        offsets that fp16 does not hold.
        """
        rounded = {one.name: kind.name for one in needs_of(store).layers if (kind := self.carries.type_of(one))}
        types = {name: rounded.get(name) or plain_type(store, name) for name in store.shapes}
        deviation, described = write_file(store, folder.partial / FILE, types)
        counts = dict(Counter(types.values()).most_common())
        return {"file": FILE, "types": counts, "deviation": deviation, **described}

    def _layers(self, layers: Iterable[Layer]) -> Iterable[tuple[str, str]]:
        for kind, text in super()._layers(layers):
            yield kind, f"{text} (--requantize TYPE has llama.cpp round it again, which loses more)"


def write_file(store: PackedStore, path: Path, types: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
    """Writes a model into one file, each tensor as its type, rounded ones as codes or as the numbers that these stand
    for. Returns the largest relative deviation, and what there is to note, with how its tokens compare.
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


def _refusals(config: Any) -> Iterable[str]:
    """What llama.cpp would run otherwise than a model is meant."""
    name = _ARCHITECTURES[config.model_type]
    if config.hidden_act != "silu":
        yield f"llama.cpp runs {name} with the activation silu, not {config.hidden_act}"
    yield from rope_problems(config, name, tensors=name == _LLAMA)
    if getattr(config, "attention_bias", False) and name != _LLAMA:
        yield f"llama.cpp has no place for the biases (attention_bias) of {config.model_type}"


def _describe(writer: gguf.GGUFWriter, store: PackedStore, file_type: int) -> list[str]:
    """Writes everything about a model but its weights and its tokenizer. Returns what there is to note."""
    config, graph = store.config, store.graph
    writer.add_type("model")
    name = store.folder.resolve().name
    if not any(part in name.lower() for part in _MEANINGFUL):
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
    text = f"llama.cpp attends to all tokens, not to the last {window}: longer texts come out otherwise"
    return [*notes, text] if window < config.max_position_embeddings else notes


def plain_type(store: PackedStore, name: str) -> str:
    """The smallest type that holds a parameter exactly; fp32 for vectors, as llama.cpp wants it."""
    tensor = store.read([name])[name]
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)) if tensor.dim() > 1 else ():
        if all(torch.equal(rows.to(dtype).double(), rows.double()) for rows in tensor.split(_ROWS)):
            return kind
    return "F32"


def tensor_names(store: PackedStore) -> dict[str, str]:
    """What llama.cpp calls every parameter of a model."""
    label = _ARCHITECTURES[store.config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == label)
    names = gguf.get_tensor_name_map(architecture, len(store.graph.blocks))
    return {name: names.get_name(name, (".weight", ".bias")) for name in store.shapes}


def _write_tensors(writer: gguf.GGUFWriter, store: PackedStore, types: Mapping[str, str], path: Path) -> float:
    """Writes everything into the file, one tensor after the other. Returns the largest relative deviation."""
    names = tensor_names(store)
    extra = rope_tensors(store.config, store.graph.head_dim)
    table = [(name, "F32", tuple(tensor.shape)) for name, tensor in extra.items()]
    table += [(names[name], types[name], store.shapes[name]) for name in types]
    for name, kind, shape in table:
        number, _, block, size = _TYPES[kind]  # a type that is given counts, the numpy dtype does not
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
    """The order of rows in which the pairs that RoPE turns are neighbours, for weights and biases of queries and keys;
    all as they are for others, and where RoPE turns halves. Here the first half of each head is paired with the second.
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
    largest weight. Raises InputError for scales and offsets that fp16 does not hold.
    """
    codes, scale, zero = weight.codes[order], weight.params.scale[order], weight.params.zero[order]
    half = 1 if torch.equal(zero, zero.round()) else 2  # numbers at odd multiples of half a step are counted in halves
    heads, deviation = [scale / half], 0.0
    if not torch.equal(heads[0].half().float(), heads[0]):
        raise InputError(
            f"{name} has a group with so small a scale that fp16 does not hold half of it, which GGUF needs for "
            "midrise grids; leave midrise out, or add the layer to weights.ignore"
        )
    blocks = codes.view(len(codes), -1, _TYPES[kind].block).to(torch.int16)
    repeat = blocks.shape[1] // scale.shape[1]
    steps = half * blocks - (half * zero).to(torch.int16).repeat_interleave(repeat, 1)
    if kind == "Q2_0":  # steps -2 .. 1 of ours are 2 .. -1 by the negated scale, and the type has -1 .. 2
        steps, heads = -steps, [-heads[0]]
    if kind == "Q4_1":
        offset, other = -zero * scale, (15 - zero) * scale  # m, or that of codes and steps counted from the other end
        flip = (other.half().float() - other).abs() < (offset.half().float() - offset).abs()
        steps = torch.where(flip.repeat_interleave(repeat, 1), 15 - blocks, blocks)
        exact = torch.where(flip, other, offset)
        heads = [torch.where(flip, -scale, scale), exact.half().float()]
        if not bool(heads[1].isfinite().all()):
            raise InputError(f"{name} has a group with an offset too large for fp16 (above 65504)")
        deviation = float((heads[1] - exact).abs().max() / weight.dequantize().abs().max().clamp_min(1e-30))
    numbers = [head.squeeze(-1).repeat_interleave(repeat, 1).numpy().astype("<f2") for head in heads]
    parts = (np.stack(numbers, -1).view(np.uint8), _pack(kind, steps).to(torch.uint8).numpy())
    return np.concatenate(parts, -1).reshape(len(codes), -1), deviation


def _pack(kind: str, steps: Tensor) -> Tensor:
    """Numbers in units of the scale, shape (rows, blocks, block), as the bytes of a type, (rows, blocks, bytes)."""
    if kind == "Q8_0":
        return steps & 0xFF
    if kind == "Q2_0":
        codes = (steps + 1).unflatten(-1, (-1, 4))
        return torch.stack([codes[..., i] << 2 * i for i in range(4)]).sum(0)
    low, high = (steps + (8 if kind == "Q4_0" else 0)).chunk(2, -1)
    return low | high << 4
