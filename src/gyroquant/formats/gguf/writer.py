"""GGUF, the file of llama.cpp: weights, settings and tokenizer in one.

A row of a rounded matrix is cut into blocks. Each block has an fp16 scale d, followed by its packed codes q:

    Q2_0  (q - 1) * d   in blocks of 64, four codes a byte, lowest bits first
    Q4_0  (q - 8) * d   in blocks of 32, two codes a byte: the first half of a block low, the second half high
    Q4_1  q * d + m     like Q4_0, with an fp16 offset m after d
    Q5_0  (q - 16) * d  like Q4_0, with the highest bits of all codes in four bytes after d
    Q8_0  q * d         in blocks of 32, one signed code a byte
    IQ4_NL  t[q] * d    like Q4_0, with numbers from a table

The K-quants, the ternary types and the IQ types with super-blocks are in `k_quants`, the types of ik_llama.cpp in
`ik_blocks`.

Our weights are whole multiples of their scale, or odd multiples of half of it, and the types without m hold them
exactly. 4-bit codes with zero points need m, a zero point times a scale, which is rounded to fp16. Groups larger than a
block repeat their scale.

A rounded embedding or head that no type holds is decoded to F16, or to F32 if fp16 cannot hold its largest weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, FormatCapabilities, Layer, ModelRequirements, WeightType, requirements_of
from gyroquant.formats.gguf.header import GGUF_FILE, why_not_llama_cpp
from gyroquant.formats.gguf.ik_blocks import encode_ik, ik_deviation
from gyroquant.formats.gguf.k_quants import encode_iq, encode_k_quant, encode_ternary
from gyroquant.formats.gguf.llama_cpp_runtime import LlamaCppRuntime
from gyroquant.formats.gguf.rope import describe_rope, full_rope, rope_tensors
from gyroquant.formats.gguf.targets import TARGETS, Target, target_of, target_problems
from gyroquant.formats.gguf.tensors import Piece, tensor_pieces
from gyroquant.formats.gguf.tokenizer import add_tokenizer
from gyroquant.formats.gguf.tokenizer_check import compare_tokenizers
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import GroupParams, IqGrid, IqkGrid, KQuantGrid, KtGrid, QuantizedWeight, TernaryGrid, stored_bits
from gyroquant.models.graph.heads import heads_of
from gyroquant.models.stores.gguf.ik_types import IK_TYPES
from gyroquant.models.stores.packed import PackedStore

_ROWS = 4096  # rows that are compared at once when a dtype is chosen
_ROUND_AGAIN = " (--requantize TYPE has llama.cpp round it again, which loses more)"
_KINDS = ("symmetric", "asymmetric", "midrise")
_FRACTIONS = ("_scale", "softcapping", "epsilon", "clamp_kqv", "freq_base_swa")  # keys whose values are not whole
_RESERVED = ("phi-3", "phi3", "modern-bert")  # for models with such a name, llama.cpp changes rules of special tokens


class _Type(NamedTuple):
    """A type of tensors.

    id: its number in GGUF files.
    file_type: the `file_type` of files that consist mostly of it.
    block: numbers in a block.
    size: bytes in a block.
    row: bytes before the blocks of a row.
    """

    id: int
    file_type: int
    block: int
    size: int
    row: int = 0


_TYPES = {
    "F32": _Type(0, 0, 1, 4),
    "F16": _Type(1, 1, 1, 2),
    "BF16": _Type(30, 32, 1, 2),
    "Q4_0": _Type(2, 2, 32, 18),
    "Q4_1": _Type(3, 3, 32, 20),
    "Q5_0": _Type(6, 8, 32, 22),
    "Q8_0": _Type(8, 7, 32, 34),
    "IQ4_NL": _Type(20, 25, 32, 18),
    "Q2_K": _Type(10, 10, 256, 84),
    "Q3_K": _Type(11, 12, 256, 110),
    "Q4_K": _Type(12, 15, 256, 144),
    "Q5_K": _Type(13, 17, 256, 176),
    "Q6_K": _Type(14, 18, 256, 210),
    "IQ4_XS": _Type(23, 30, 256, 136),
    "IQ2_XXS": _Type(16, 19, 256, 66),
    "IQ2_XS": _Type(17, 20, 256, 74),
    "IQ2_S": _Type(22, 28, 256, 82),
    "IQ3_XXS": _Type(18, 23, 256, 98),
    "IQ3_S": _Type(21, 26, 256, 110),
    "TQ1_0": _Type(34, 36, 256, 54),
    "TQ2_0": _Type(35, 37, 256, 66),
    "Q2_0": _Type(42, 41, 64, 18),  # newer than the enumerations of the gguf package
    **{name: _Type(kind.id, kind.file_type, 256, kind.size, kind.row) for name, kind in IK_TYPES.items()},
}


def _holds(name: str, bits: tuple[int, ...], *kinds: str) -> WeightType:
    chosen: dict[str, Any] = {kind: kind in kinds for kind in _KINDS}
    return WeightType(name, bits, **chosen, block=_TYPES[name].block)


def _k_quant(name: str, bits: int) -> WeightType:
    return WeightType(name, (bits,), k_quant=True, block=_TYPES[name].block)


class Gguf(Format):
    """One file, `model.gguf`, with rounded weights as codes and all others exactly, as plain numbers."""

    name = "gguf"
    title = "GGUF (llama.cpp)"
    runtime = LlamaCppRuntime
    usage = "```sh\nllama-cli -m FOLDER/model.gguf\n```"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    capabilities = FormatCapabilities(
        weights=(  # the smallest first
            _holds("Q2_0", (2,), "symmetric"),
            _holds("Q2_0", (1,), *_KINDS),
            _holds("Q4_0", (1, 2, 3), *_KINDS),
            _holds("Q4_0", (4,), "symmetric"),
            WeightType("IQ4_NL", (4,), table="iq4_nl", block=_TYPES["IQ4_NL"].block),
            _holds("Q4_1", (4,), "asymmetric"),
            _holds("Q5_0", (4,), "midrise"),
            _holds("Q5_0", (5,), "symmetric"),
            _holds("Q8_0", (5, 6, 7), *_KINDS),
            _holds("Q8_0", (8,), "symmetric"),
            *(_k_quant(f"Q{bits}_K", bits) for bits in (2, 3, 4, 5, 6)),
            _k_quant("IQ4_XS", 4),
            *(_k_quant(name, 2) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S")),
            *(_k_quant(name, 3) for name in ("IQ3_XXS", "IQ3_S")),
            *(_k_quant(name, 2) for name in ("TQ1_0", "TQ2_0")),
            *(_k_quant(name, int(name[2])) for name in IK_TYPES),
        ),
        model_types=tuple(TARGETS),
        experts=True,
        tables=True,
        decodes=True,
        unties=True,
    )

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        supported = needs.config is not None and needs.model_type in TARGETS
        settings = (*target_problems(needs.config), *_head_problems(needs)) if supported else ()
        return [*super().incompatibilities(needs), *settings]

    def decoded(self, needs: ModelRequirements) -> dict[str, str]:
        return {name: text.removesuffix(_ROUND_AGAIN) for name, text in super().decoded(needs).items()}

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns the number of tensors of each type, the largest deviation of a rounded weight
        relative to the largest weight of its tensor, and notes. Raises InputError for scales and offsets that fp16
        cannot hold.
        """
        needs = requirements_of(store)
        reasons, layers = self.decoded(needs), self.packed(needs).layers
        rounded = {layer.name: kind.name for layer in layers if (kind := self.capabilities.type_of(layer))}
        tables = {name: _DecodedTable(store, name) for name in reasons}
        rounded |= {name: table.kind for name, table in tables.items()}
        types = {name: rounded.get(name) or plain_type(store, name) for name in store.shapes}
        deviation, described = write_file(store, folder.partial / GGUF_FILE, types)
        if tables:
            deviation = max(deviation, *(table.deviation for table in tables.values()))
            described["decoded"] = {name: f"{table}: {reasons[name]}" for name, table in tables.items()}
        pieces = tensor_pieces(store)
        written = [_kind(piece, kind) for name, kind in types.items() for piece in pieces[name]]
        counts = dict(Counter(written).most_common())
        return {"file": GGUF_FILE, "types": counts, "deviation": deviation, **described}

    def weight_in_file(self, store: PackedStore, name: str) -> Tensor | None:
        op, weight = store.graph.op(name), store.quantized(name)
        if name in self.decoded(requirements_of(store)):
            return _DecodedTable(store, name).written
        kind = self.capabilities.type_of(Layer(name, weight.grid, op.in_features))
        return op.to_param(_decoded_q4_1(weight)) if kind is not None and kind.name == "Q4_1" else None

    def _layers(self, layers: Iterable[Layer]) -> Iterable[tuple[str, str]]:
        layers = list(layers)
        for kind, text in super()._layers(layers):
            yield kind, text + _ROUND_AGAIN
        for layer in layers:
            name = getattr(layer.grid, "type_name", "")
            if layer.table and name in IK_TYPES and IK_TYPES[name].factor != 1:
                text = f"ik_llama.cpp looks up other numbers in an embedding of {name} than it multiplies by"
                yield "looked up", f"{text} ({layer.name}): take another grid for embeddings"


class _DecodedTable:
    """A rounded embedding or head as plain numbers: their type, the numbers as they are written, their largest error
    relative to the largest number, and, as text, what that costs.
    """

    def __init__(self, store: PackedStore, name: str):
        weight = store.quantized(name)
        exact = store.graph.op(name).to_param(weight.dequantize())
        self.kind = "F16" if float(exact.abs().max()) <= torch.finfo(torch.float16).max else "F32"
        self.written = exact.half().float() if self.kind == "F16" else exact
        self.deviation = float((self.written - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
        self._sizes = exact.numel() * _TYPES[self.kind].size, stored_bits(weight.pack()) // 8

    def __str__(self) -> str:
        return f"as {self.kind}, {self._sizes[0]} bytes in place of {self._sizes[1]}"


def write_file(store: PackedStore, path: Path, types: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
    """Writes a model into one file. `types` gives the type of each tensor. Rounded tensors are written as codes or, in
    a plain type, decoded. Returns the largest relative deviation, and the notes and the comparison of tokens.
    """
    sizes: Counter[str] = Counter()
    for name in store.description["tensors"]:
        sizes[types[name]] += prod(store.shapes[name])
    main = sizes.most_common(1)[0][0]
    with closing(gguf.GGUFWriter(None, target_of(store.config).name)) as writer:
        notes = _describe(writer, store, _TYPES[main].file_type)
        tokenizer, more = add_tokenizer(writer, store)
        deviation = _write_tensors(writer, store, types, path)
    if reason := why_not_llama_cpp(path):
        more.append(f"{reason}. gyroquant's reader of GGUF checks it")
    if tokenizer is None:
        return deviation, {"notes": notes + more, "tokenizer": None}
    facts, differences = compare_tokenizers(path, tokenizer)
    return deviation, {"notes": notes + more + differences, "tokenizer": facts}


def _head_problems(needs: ModelRequirements) -> Iterable[str]:
    """Whether llama.cpp takes the embedding as the head of an architecture although the model has a head of its own."""
    own = not needs.config.tie_word_embeddings or needs.tie_points
    if TARGETS[needs.model_type].own_head is False and own:
        yield (
            f"llama.cpp always takes the embedding as the head of {needs.model_type}, and this model has a head of its "
            "own, or maps around its last norm that need one; leave R1 out of the recipe"
        )


def _describe(writer: gguf.GGUFWriter, store: PackedStore, file_type: int) -> list[str]:
    """Writes all metadata of a model except the tokenizer. Returns notes."""
    config = store.config
    target = target_of(config)
    writer.add_type("model")
    name = store.folder.resolve().name
    if not any(part in name.lower() for part in _RESERVED):
        writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in _settings(store, target).items():
        _add(writer, f"{target.name}.{key}", value)
    notes = describe_rope(writer, config) if target.rope else []
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    note = f"llama.cpp attends to all tokens, not to the last {window}: longer texts give other results"
    return [*notes, note] if window < config.max_position_embeddings and not target.windows else notes


def _settings(store: PackedStore, target: Target) -> dict[str, Any]:
    """The settings of an architecture, by their keys without its name. Those of the target replace the usual ones."""
    config, heads = store.config, heads_of(store.config)
    key, epsilon = target.epsilon
    widths = (getattr(config, name, None) for name in ("intermediate_size", "n_inner"))
    found = {
        "block_count": len(store.graph.blocks),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": next(filter(None, widths), 4 * config.hidden_size),
        "attention.head_count": heads.queries,
        "attention.head_count_kv": heads.shared,
        "attention.key_length": heads.size,
        "attention.value_length": heads.size,
        "vocab_size": config.vocab_size,
    }
    if key:
        found[key] = float(getattr(config, epsilon))
    if target.rope:
        found["rope.dimension_count"] = int(heads.size * full_rope(config).get("partial_rotary_factor", 1.0))
    return found | target.settings(config)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int) and not key.endswith(_FRACTIONS):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def plain_type(store: PackedStore, name: str) -> str:
    """The smallest type that holds a parameter exactly. Vectors are fp32, as llama.cpp requires."""
    tensor = store.read([name])[name]
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)) if tensor.dim() > 1 else ():
        if all(torch.equal(rows.to(dtype).double(), rows.double()) for rows in tensor.split(_ROWS)):
            return kind
    return "F32"


def tensor_names(store: PackedStore) -> dict[str, str]:
    """llama.cpp's name of every parameter of a model. Of a parameter that becomes several tensors, the first."""
    return {name: pieces[0].tensor for name, pieces in tensor_pieces(store).items()}


def _write_tensors(writer: gguf.GGUFWriter, store: PackedStore, types: Mapping[str, str], path: Path) -> float:
    """Writes the header, the metadata and all tensors to the file. Returns the largest relative deviation."""
    pieces = tensor_pieces(store)
    target = target_of(store.config)
    extra = rope_tensors(store.config, heads_of(store.config).size) if target.rope else {}
    table = [(name, "F32", tuple(tensor.shape)) for name, tensor in extra.items()]
    table += [(piece.tensor, _kind(piece, types[name]), piece.shape) for name in types for piece in pieces[name]]
    for name, kind, shape in table:
        own = _TYPES[kind]  # with its number, the writer ignores the numpy dtype
        size = prod(shape) // own.block * own.size + prod(shape[:-1]) * own.row
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, own.id)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(_plain(tensor, "F32"))
    largest = 0.0
    for name, kind in types.items():
        for piece in pieces[name]:
            if _TYPES[_kind(piece, kind)].block > 1:
                data, deviation = _encode(name, kind, _chosen(store, name, piece))
                largest = max(largest, deviation)
            else:
                data = _plain(_chosen_numbers(store, name, piece), _kind(piece, kind))
            writer.write_tensor_data(data)
    return largest


def _kind(piece: Piece, kind: str) -> str:
    return "F32" if piece.in_fp32 else kind


def _chosen(store: PackedStore, name: str, piece: Piece) -> QuantizedWeight:
    """The rows of a rounded matrix that a tensor of the file holds."""
    weight, op = store.quantized(name), store.graph.op(name)

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, op.out_features))[:, piece.rows].flatten(0, 1)

    params = GroupParams(rows(weight.params.scale), rows(weight.params.zero))
    return replace(weight, codes=rows(weight.codes), params=params)


def _chosen_numbers(store: PackedStore, name: str, piece: Piece) -> Tensor:
    """The numbers of a parameter that a tensor of the file holds."""
    tensor, op = store.read([name])[name], store.graph.find_op(name)
    if op is not None and op.entry.transposed:
        tensor = tensor.transpose(-1, -2)
    stacked = len(piece.shape) == 3 or piece.tensor.endswith("_exps.bias")
    chosen = tensor[:, piece.rows] if stacked else tensor[piece.rows]
    return (chosen if piece.change is None else piece.change(chosen.float())).reshape(piece.shape)


def _plain(tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor as plain numbers, little-endian."""
    if kind == "BF16":
        return tensor.bfloat16().contiguous().view(torch.int16).numpy().astype("<i2")
    return tensor.float().contiguous().numpy().astype("<f2" if kind == "F16" else "<f4")


def _encode(name: str, kind: str, weight: QuantizedWeight) -> tuple[np.ndarray, float]:
    """A rounded matrix as the bytes of its blocks, shape (rows, bytes), and its largest deviation relative to its
    largest weight. Raises InputError for scales and offsets that fp16 cannot hold.
    """
    if isinstance(weight.grid, IqGrid):
        return encode_iq(weight), 0.0
    if isinstance(weight.grid, TernaryGrid):
        return encode_ternary(weight), 0.0
    if isinstance(weight.grid, KQuantGrid):
        return encode_k_quant(weight), 0.0
    if isinstance(weight.grid, IqkGrid | KtGrid):
        return encode_ik(weight), ik_deviation(weight)
    codes, scale, zero = weight.codes, weight.params.scale, weight.params.zero
    half = 1 if torch.equal(zero, zero.round()) else 2  # numbers at odd multiples of half a step are counted in halves
    heads, deviation = [scale / half], 0.0
    if not torch.equal(heads[0].half().float(), heads[0]):
        raise InputError(
            f"{name} has a group whose scale is too small: GGUF needs half of it for midrise grids, and fp16 cannot "
            "hold that; leave midrise out of the recipe, or add the layer to weights.ignore"
        )
    blocks = codes.view(len(codes), -1, _TYPES[kind].block).to(torch.int16)
    repeat = blocks.shape[1] // scale.shape[1]
    steps = half * blocks - (half * zero).to(torch.int16).repeat_interleave(repeat, 1)  # codes, where zero is 0
    if kind == "Q2_0":  # our steps are -2 .. 1 and the type has -1 .. 2, so steps and scale are negated
        steps, heads = -steps, [-heads[0]]
    if kind == "Q4_1":
        flip, exact = _offsets(weight)
        steps = torch.where(flip.repeat_interleave(repeat, 1), 15 - blocks, blocks)
        heads = [torch.where(flip, -scale, scale), exact.half().float()]
        if not bool(heads[1].isfinite().all()):
            raise InputError(
                f"{name} has a group with an offset too large for fp16 (above 65504); add the layer to weights.ignore"
            )
        deviation = float((heads[1] - exact).abs().max() / weight.dequantize().abs().max().clamp_min(1e-30))
    numbers = [head.squeeze(-1).repeat_interleave(repeat, 1).numpy().astype("<f2") for head in heads]
    parts = (np.stack(numbers, -1).view(np.uint8), _pack(kind, steps).to(torch.uint8).numpy())
    return np.concatenate(parts, -1).reshape(len(codes), -1), deviation


def _offsets(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Whether the codes of each group of a Q4_1 matrix are counted from the other end, where fp16 holds the offset m
    better, and m.
    """
    scale, zero = weight.params.scale, weight.params.zero
    offset, other = -zero * scale, (15 - zero) * scale
    flip = (other.half().float() - other).abs() < (offset.half().float() - offset).abs()
    return flip, torch.where(flip, other, offset)


def _decoded_q4_1(weight: QuantizedWeight) -> Tensor:
    """The numbers that a Q4_1 matrix in a file stands for."""
    flip, exact = _offsets(weight)
    codes = weight.codes.unflatten(1, (exact.shape[1], -1)).float()
    scale = weight.params.scale
    values = torch.where(flip, 15 - codes, codes) * torch.where(flip, -scale, scale) + exact.half().float()
    return values.flatten(1)


def _pack(kind: str, steps: Tensor) -> Tensor:
    """Packs multiples of the scale, shape (rows, blocks, block), to the bytes of a type, (rows, blocks, bytes)."""
    if kind == "Q8_0":
        return steps & 0xFF
    if kind == "Q2_0":
        codes = (steps + 1).unflatten(-1, (-1, 4))
        return torch.stack([codes[..., i] << 2 * i for i in range(4)]).sum(0)
    low, high = (steps + {"Q4_0": 8, "Q4_1": 0, "IQ4_NL": 0, "Q5_0": 16}[kind]).chunk(2, -1)
    if kind != "Q5_0":
        return low | high << 4
    highest = (torch.cat((low, high), -1) >> 4).unflatten(-1, (4, 8))
    bits = torch.stack([highest[..., i] << i for i in range(8)]).sum(0)
    return torch.cat((bits, low & 15 | (high & 15) << 4), -1)
