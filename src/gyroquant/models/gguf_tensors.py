"""Which tensors of a GGUF file make which parameters of transformers, and that none is left over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.gguf_architectures import GgufArchitecture, has_bias
from gyroquant.models.gguf_file import GgufFile
from gyroquant.models.gguf_rope import FREQS, LONG, SHORT
from gyroquant.models.graph import Shape

_READ_ELSEWHERE = (FREQS, LONG, SHORT)  # with the configuration
_UNUSED = re.compile(r".*\.input_scale")  # llama.cpp loads it and computes without
_CONV1D = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


class Piece(NamedTuple):
    """A tensor of the file, or some of its rows (of those of each expert, where it holds experts)."""

    tensor: str
    rows: slice = slice(None)


class TensorPlan:
    """How the parameters of a model are made of the tensors of a file.

    Raises InputError where a parameter has no tensor, where shapes do not fit, and for a tensor of which nothing is
    made: llama.cpp opens no such file, and leaving it out would be another model.
    """

    def __init__(self, file: GgufFile, described: GgufArchitecture, config: Any, shapes: Mapping[str, Shape]):
        self.file, self.described, self.config, self.shapes = file, described, config, shapes
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == described.name)
        self._names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._pieces = {name: self._found(name) for name in shapes}
        self._account()

    def read(self, name: str) -> Tensor:
        """A parameter in fp32."""
        pieces = self._pieces[name]
        if pieces is None:
            return torch.zeros(self.shapes[name])
        made = [self._piece(piece) for piece in pieces]
        whole = made[0] if len(made) == 1 else np.concatenate(made, axis=-2 if made[0].ndim > 1 else 0)
        return torch.from_numpy(np.ascontiguousarray(self._turned(name, whole)))

    def _piece(self, piece: Piece) -> np.ndarray:
        entry = self.file.tensors[piece.tensor]
        if len(entry.shape) == 3:
            values = self.file.values(piece.tensor)[:, piece.rows]
        else:
            values = self.file.values(piece.tensor, piece.rows)
        scale = _scale_of(piece.tensor)
        if scale in self.file.tensors:
            factor = self.file.values(scale).reshape(-1)  # one number, or one for each expert
            values = values * factor.reshape(-1, 1, 1) if len(factor) > 1 else values * factor[0]
        return values

    def _turned(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values in the order and the sense that transformers has them."""
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        if self.described.norm_offset and kind == "weight" and "norm" in part:
            values = values - np.float32(self.described.norm_offset)
        if self.described.permuted and part in ("q_proj", "k_proj"):
            heads = self.heads if part == "q_proj" else self.kv_heads
            values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
        if part == "query_key_value":  # of all heads one after the other: q, k and v of each
            values = values.reshape(3, self.heads, -1, *values.shape[1:]).swapaxes(0, 1)
        if _CONV1D.fullmatch(name):
            values = values.T
        return values.reshape(self.shapes[name])

    def _found(self, name: str) -> tuple[Piece, ...] | None:
        """The pieces of a parameter; None for a bias that the file leaves out, which is zero."""
        for pieces in self._candidates(name):
            if all(piece.tensor in self.file.tensors for piece in pieces):
                self._check_shape(name, pieces)
                return pieces
        if name.endswith(".bias") and self.described.optional_biases and "norm" not in name.split(".")[-2]:
            return None
        first = next(self._candidates(name), ())
        wanted = f" ({', '.join(piece.tensor for piece in first)})" if first else ""
        raise InputError(f"{self.file.path} lacks {name}{wanted} of {self.config.model_type}")

    def _candidates(self, name: str) -> Iterator[tuple[Piece, ...]]:
        """The ways in which a file may hold a parameter."""
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        block = f"blk.{number[1]}." if (number := re.search(r"\.(\d+)\.", name)) else ""
        if module.endswith(".mlp.experts"):
            parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[kind]
            yield tuple(Piece(f"{block}ffn_{one}_exps.weight") for one in parts)
            if len(parts) == 2:
                yield (Piece(f"{block}ffn_gate_up_exps.weight"),)
            return
        if (mapped := self._names.get_name(name, (".weight", ".bias"))) is not None:
            yield (Piece(mapped),)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if part in ("q_proj", "k_proj", "v_proj"):
            start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[part]
            rows = slice(start, start + (queries if part == "q_proj" else keys))
            yield (Piece(f"{block}attn_qkv.{kind}", rows),)
        if part == "qkv_proj":
            yield tuple(Piece(f"{block}attn_{one}.{kind}") for one in "qkv")

    def _check_shape(self, name: str, pieces: tuple[Piece, ...]) -> None:
        found = sum(self._numbers(piece) for piece in pieces)
        wanted = int(np.prod(self.shapes[name]))
        if found != wanted:
            raise InputError(
                f"{self.file.path}: {', '.join(piece.tensor for piece in pieces)} has {found} numbers, but by its "
                f"metadata {name} is of shape {tuple(self.shapes[name])}"
            )
        last = {self.file.tensors[piece.tensor].shape[-1] for piece in pieces}
        width = self.shapes[name][0 if _CONV1D.fullmatch(name) else -1]
        if self.shapes[name][0] > 1 and len(self.shapes[name]) > 1 and last != {width}:
            raise InputError(
                f"{self.file.path}: {pieces[0].tensor} has rows of {max(last)}, but by its metadata {name} is of shape "
                f"{tuple(self.shapes[name])}"
            )

    def _numbers(self, piece: Piece) -> int:
        shape = self.file.tensors[piece.tensor].shape
        axis = 1 if len(shape) == 3 else 0
        rows = range(*piece.rows.indices(shape[axis]))
        return int(np.prod(shape)) // shape[axis] * len(rows)

    def _account(self) -> None:
        """Refuses tensors of which nothing is made."""
        claimed = {piece.tensor for pieces in self._pieces.values() for piece in pieces or ()}
        scales = {_scale_of(name) for name in claimed} & set(self.file.tensors)
        if scales and not self.described.scales:
            raise InputError(
                f"{self.file.path} has {min(scales)}, a second scale, which llama.cpp does not apply everywhere in the "
                f"architecture {self.described.name}: start from the model in safetensors"
            )
        for scale in scales:
            name = scale.removesuffix("scale") + "weight"
            entry = self.file.tensors[name]
            if self.file.tensors[scale].numbers not in (1, entry.shape[0] if len(entry.shape) == 3 else 1):
                raise InputError(f"{self.file.path}: {scale} has {self.file.tensors[scale].numbers} numbers, not one")
        rest = set(self.file.tensors) - claimed - scales - set(_READ_ELSEWHERE)
        rest = {name for name in rest if not _UNUSED.fullmatch(name)}
        rest |= {name for name in claimed if has_bias(name, self.described.no_biases)}
        if rest:
            more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
            raise InputError(
                f"{self.file.path} has {', '.join(sorted(rest)[:4])}{more}, of which {self.config.model_type} makes "
                f"nothing: without it, it would be another model"
            )


def _scale_of(name: str) -> str:
    """What the second scale of a weight is called: one number for all of it, or for each of its experts."""
    return name.removesuffix("weight") + "scale" if name.endswith(".weight") else ""
