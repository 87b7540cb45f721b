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

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gyroquant.errors import InputError
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType, needs_of
from gyroquant.grids import QuantizedWeight
from gyroquant.models.packed import PackedStore

FILE = "model.gguf"
_ROWS = 4096  # looked at together when a dtype is chosen
_KINDS = ("symmetric", "asymmetric", "midrise")


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
    packages = ("gguf",)
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
        types = {name: rounded.get(name) or _plain_type(store, name) for name in store.shapes}
        sizes = [{kind: prod(store.shapes[name])} for name, kind in rounded.items()]
        main = sum(map(Counter, sizes), Counter[str]()).most_common(1)[0][0]
        with closing(gguf.GGUFWriter(None, _ARCHITECTURES[store.config.model_type])) as writer:
            notes = _describe(writer, store, _TYPES[main].file_type)
            notes += _add_tokenizer(writer, store)
            deviation = _write_tensors(writer, store, types, folder)
        counts = dict(Counter(types.values()).most_common())
        return {"file": FILE, "types": counts, "deviation": deviation, "notes": notes}


def _refusals(config: Any) -> Iterable[str]:
    """What llama.cpp would run otherwise than a model is meant."""
    name, rope = _ARCHITECTURES[config.model_type], config.rope_parameters
    if config.hidden_act != "silu":
        yield f"llama.cpp runs {name} with the activation silu, not {config.hidden_act}"
    kinds = ("default", "linear", "llama3") if name == _LLAMA else ("default", "linear")
    if rope["rope_type"] not in kinds:
        yield f"llama.cpp has RoPE of type {', '.join(kinds)} for {name}, not of type {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1:
        yield f"llama.cpp turns whole heads of {name}, here RoPE turns a part of them"
    if getattr(config, "attention_bias", False) and name != _LLAMA:
        yield f"llama.cpp has no place for the biases (attention_bias) of {config.model_type}"


def _describe(writer: gguf.GGUFWriter, store: PackedStore, file_type: int) -> list[str]:
    """Writes everything about a model but its weights and its tokenizer. Returns what there is to note."""
    config, graph, rope = store.config, store.graph, store.config.rope_parameters
    writer.add_type("model")
    writer.add_name(store.folder.resolve().name)
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
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    text = f"llama.cpp attends to all tokens, not to the last {window}: longer texts come out otherwise"
    return [text] if window < config.max_position_embeddings else []


def _frequencies(store: PackedStore) -> dict[str, Tensor]:
    """What the frequencies of RoPE are divided by, where there is more to it than one factor."""
    rope, width = store.config.rope_parameters, store.graph.head_dim
    if rope["rope_type"] != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](store.config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {"rope_freqs.weight": (plain / scaled.double()).float()}


def _plain_type(store: PackedStore, name: str) -> str:
    """The smallest type that holds a parameter exactly; fp32 for vectors, as llama.cpp wants it."""
    tensor = store.read([name])[name]
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)) if tensor.dim() > 1 else ():
        if all(torch.equal(rows.to(dtype).double(), rows.double()) for rows in tensor.split(_ROWS)):
            return kind
    return "F32"


def _write_tensors(
    writer: gguf.GGUFWriter, store: PackedStore, types: Mapping[str, str], folder: OutputFolder
) -> float:
    """Writes everything into the file, one tensor after the other. Returns the largest relative deviation."""
    label = _ARCHITECTURES[store.config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == label)
    names = gguf.get_tensor_name_map(architecture, len(store.graph.blocks))
    extra = _frequencies(store)
    table = [(name, "F32", tuple(tensor.shape)) for name, tensor in extra.items()]
    table += [(names.get_name(name, (".weight", ".bias")), types[name], store.shapes[name]) for name in types]
    for name, kind, shape in table:
        number, _, block, size = _TYPES[kind]  # a type that is given counts, the numpy dtype does not
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // block * size, number)
    writer.write_header_to_file(folder.partial / FILE)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(_plain(tensor, "F32"))
    largest = 0.0
    for name, kind in types.items():
        order = _row_order(store, name) if label == _LLAMA else slice(None)
        if name in store.description["tensors"]:
            data, deviation = _encode(name, kind, store.quantized(name), order)
            largest = max(largest, deviation)
        else:
            data = _plain(store.read([name])[name][order], kind)
        writer.write_tensor_data(data)
    return largest


def _row_order(store: PackedStore, name: str) -> Tensor | slice:
    """The order of rows in which the pairs that RoPE turns are neighbours, for weights and biases of queries and keys;
    all as they are for others. Here the first half of each head is paired with the second.
    """
    heads = {"q_proj": store.graph.heads, "k_proj": store.graph.kv_heads}.get(name.split(".")[-2])
    if heads is None:
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


def _add_tokenizer(writer: gguf.GGUFWriter, store: PackedStore) -> list[str]:
    """Writes the tokenizer. Where it cannot be expressed exactly, the file says that there is none: nobody would notice
    a nearly right one. Returns what there is to note.
    """
    notes: list[str] = []
    try:
        fields = _vocabulary(store.tokenizer(), store.config, notes)
    except InputError as error:
        fields = {"tokenizer_model": "none"}
        notes = [f"the file has no tokenizer, so that llama.cpp takes and gives token ids only: {error}"]
    for field, value in fields.items():
        getattr(writer, f"add_{field}")(value)
    return notes


def _vocabulary(tokenizer: Any, config: Any, notes: list[str]) -> dict[str, Any]:
    """A tokenizer under the names of the gguf package, with one token for each row of the embedding. Adds what there is
    to note. Raises InputError for a tokenizer that llama.cpp does not have.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    spec: Any = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    if spec["model"]["type"] != "BPE" or not spec["model"]["merges"]:
        raise InputError(f"its tokenizer (of type {spec['model']['type']}) is not one of BPE with merges")
    rows = config.vocab_size
    added = {one["id"]: one["special"] for one in spec["added_tokens"]}
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(gguf.TokenType.UNUSED)] * rows
    found = backend.get_vocab(with_added_tokens=True)
    for token, i in found.items():
        if i < rows:
            kind = gguf.TokenType.CONTROL if added.get(i) else gguf.TokenType.USER_DEFINED
            tokens[i], types[i] = token, int(kind if i in added else gguf.TokenType.NORMAL)
    if max(found.values()) >= rows:
        notes.append(f"tokens from {rows} on have no row in the embedding and were left out")
    fields: dict[str, Any] = {"token_list": tokens, "token_types": types}
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        number = getattr(config, f"{kind}_token_id", None) if number is None else number
        if isinstance(number, int) and number < rows:
            fields[f"{kind}_token_id"] = number
    around = backend.encode("").ids
    fields["add_bos_token"] = around[:1] == [fields.get("bos_token_id")]
    fields["add_eos_token"] = around[fields["add_bos_token"] :] == [fields.get("eos_token_id")]
    if len(around) != fields["add_bos_token"] + fields["add_eos_token"]:
        raise InputError(f"its tokenizer puts the tokens {around} around a text, not only bos and eos")
    if template := tokenizer.chat_template:
        named = template.items() if isinstance(template, dict) else ()
        fields["chat_template"] = [{"name": name, "template": text} for name, text in named] or template
    return (_sentencepiece if spec["model"]["byte_fallback"] else _byte_level)(spec, fields, notes)


# How words are cut out of a text: the steps of a pre-tokenizer, and whether words that are tokens are taken whole.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def _byte_level(spec: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The rest of a byte-level tokenizer: how it cuts out words, and its merges."""
    whole, normalizer = spec["pre_tokenizer"] or {"type": None}, spec["normalizer"]
    steps = tuple(_step(one) for one in whole.get("pretokenizers", [whole]))
    pre = _PRE.get((steps, spec["model"]["ignore_merges"]))
    if pre is None or normalizer not in (None, {"type": "NFC"}):
        raise InputError(f"llama.cpp does not cut out words as its tokenizer does: {json.dumps([normalizer, whole])}")
    if normalizer:
        notes.append("llama.cpp does not normalize text to NFC as the tokenizer does: give it text that is")
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        **fields,
        "token_merges": merges,
        "add_space_prefix": False,
    }


def _step(one: Mapping[str, Any]) -> str:
    if one["type"] == "ByteLevel" and not one["add_prefix_space"]:
        return "words" if one["use_regex"] else "bytes"
    if one["type"] == "Digits" and one["individual_digits"]:
        return "digits"
    regex = one["type"] == "Split" and one["behavior"] == "Isolated" and not one["invert"]
    return str(one["pattern"].get("Regex")) if regex else "unknown"


def _sentencepiece(spec: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The rest of a tokenizer as sentencepiece makes them: how it writes spaces, and the scores of its pieces. What
    makes the piece of the highest score is joined first, so merges have to be sorted by the piece that they make.
    """
    normalizer, whole = spec["normalizer"] or {"normalizers": []}, spec["pre_tokenizer"]
    steps = [tuple(one.values()) for one in normalizer.get("normalizers", [normalizer])]
    written = ("Replace", {"String": " "}, "\u2581")
    prefixed = whole is None and steps == [("Prepend", "\u2581"), written]
    if whole and whole["type"] == "Metaspace" and not whole["split"] and not steps:
        prefixed = whole["prepend_scheme"] != "never"
        if whole["prepend_scheme"] == "first":
            notes.append("llama.cpp puts a space in front of text behind special tokens too, the tokenizer does not")
    elif not prefixed and (whole is not None or steps != [written]):
        raise InputError(f"llama.cpp does not write spaces as its tokenizer does: {json.dumps([normalizer, whole])}")
    pieces = [piece for piece, _ in groupby("".join(pair) for pair in spec["model"]["merges"])]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    if len(ranks) != len(pieces):
        raise InputError("the merges of its tokenizer are not sorted by the pieces that they make, as llama.cpp's are")
    types = list(fields["token_types"])
    for i, token in enumerate(fields["token_list"]):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = int(gguf.TokenType.BYTE)
    if "unk_token_id" in fields:
        types[fields["unk_token_id"]] = int(gguf.TokenType.UNKNOWN)
    scores = [-float(ranks.get(token, len(ranks))) for token in fields["token_list"]]
    rest = {"token_types": types, "token_scores": scores, "add_space_prefix": prefixed}
    return {"tokenizer_model": "llama", **fields, **rest}
