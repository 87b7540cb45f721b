"""Makes the parameters of transformers from the tensors of a GGUF file, and checks that no tensor is left over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.graph.heads import heads_of
from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.stores.gguf.architectures import GgufArchitecture, has_bias
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.rope import FREQS, LONG, SHORT

_READ_WITH_CONFIG = (FREQS, LONG, SHORT)
_IGNORED = re.compile(r".*\.input_scale")  # llama.cpp loads it, but does not compute with it
_CONV1D = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


class Piece(NamedTuple):
    """A tensor of the file, or a slice of its rows. If the tensor holds experts: of the rows of each expert."""

    tensor: str
    rows: slice = slice(None)


class TensorPlan:
    """Makes the parameters of a model from the tensors of a file.

    Raises InputError if a parameter has no tensor, if shapes do not fit, and if no parameter uses a tensor: llama.cpp
    does not open such a file, and without the tensor it would be another model.
    """

    def __init__(self, file: GgufFile, architecture: GgufArchitecture, config: Any, shapes: Mapping[str, Shape]):
        self.file, self.architecture, self.config, self.shapes = file, architecture, config, shapes
        self.heads = heads_of(config)
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._pieces = {name: self._find_pieces(name) for name in shapes}
        self._check_unused_tensors()

    def tensors(self) -> dict[str, str]:
        """The parameter that each used tensor of the file belongs to. If it holds several, the first of them."""
        owners: dict[str, str] = {}
        for name, pieces in self._pieces.items():
            for piece in pieces or ():
                owners.setdefault(piece.tensor, name)
                if (scale := _second_scale(piece.tensor)) in self.file.tensors:
                    owners.setdefault(scale, name)
        return owners

    def read(self, name: str) -> Tensor:
        """A parameter in fp32."""
        pieces = self._pieces[name]
        if pieces is None:
            return torch.zeros(self.shapes[name])
        arrays = [self._piece(piece) for piece in pieces]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2 if arrays[0].ndim > 1 else 0)
        return torch.from_numpy(np.ascontiguousarray(self._to_transformers_layout(name, whole)))

    def _piece(self, piece: Piece) -> np.ndarray:
        entry = self.file.tensors[piece.tensor]
        if len(entry.shape) == 3:
            values = self.file.values(piece.tensor)[:, piece.rows]
        else:
            values = self.file.values(piece.tensor, piece.rows)
        scale = _second_scale(piece.tensor)
        if scale in self.file.tensors:
            factor = self.file.values(scale).reshape(-1)  # one number, or one for each expert
            values = values * factor.reshape(-1, 1, 1) if len(factor) > 1 else values * factor[0]
        return values

    def _to_transformers_layout(self, name: str, values: np.ndarray) -> np.ndarray:
        """The values of a parameter in the layout of transformers."""
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        if self.architecture.norm_offset and kind == "weight" and "norm" in part:
            values = values - np.float32(self.architecture.norm_offset)
        if self.architecture.permuted and part in ("q_proj", "k_proj"):
            heads = self.heads.queries if part == "q_proj" else self.heads.shared
            values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
        if part == "query_key_value":  # the file: q of all heads, then k, then v; transformers: q, k and v of each head
            values = values.reshape(3, self.heads.queries, -1, *values.shape[1:]).swapaxes(0, 1)
        if _CONV1D.fullmatch(name):
            values = values.T
        return values.reshape(self.shapes[name])

    def _find_pieces(self, name: str) -> tuple[Piece, ...] | None:
        """The pieces of a parameter; None for a bias that the file leaves out, which is zero.

        Raises InputError if the file lacks a piece, or if shapes do not fit.
        """
        for pieces in self._candidates(name):
            if all(piece.tensor in self.file.tensors for piece in pieces):
                self._check_shape(name, pieces)
                return pieces
        if name.endswith(".bias") and self.architecture.optional_biases and "norm" not in name.split(".")[-2]:
            return None
        first = next(self._candidates(name), ())
        expected = f" ({', '.join(piece.tensor for piece in first)})" if first else ""
        raise InputError(
            f"{self.file.path} lacks {name}{expected} of {self.config.model_type}: convert the model again"
        )

    def _candidates(self, name: str) -> Iterator[tuple[Piece, ...]]:
        """The pieces that may hold a parameter: one tuple for each way in which a file may store it."""
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        block = f"blk.{number[1]}." if (number := re.search(r"\.(\d+)\.", name)) else ""
        if module.endswith(".mlp.experts"):
            parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[kind]
            yield tuple(Piece(f"{block}ffn_{letter}_exps.weight") for letter in parts)
            if len(parts) == 2:
                yield (Piece(f"{block}ffn_gate_up_exps.weight"),)
            return
        if (mapped := self._names.get_name(name, (".weight", ".bias"))) is not None:
            yield (Piece(mapped),)
        queries, keys = self.heads.queries * self.heads.size, self.heads.shared * self.heads.size
        if part in ("q_proj", "k_proj", "v_proj"):
            start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[part]
            rows = slice(start, start + (queries if part == "q_proj" else keys))
            yield (Piece(f"{block}attn_qkv.{kind}", rows),)
        if part == "qkv_proj":
            yield tuple(Piece(f"{block}attn_{letter}.{kind}") for letter in "qkv")

    def _check_shape(self, name: str, pieces: tuple[Piece, ...]) -> None:
        count = sum(self._numbers(piece) for piece in pieces)
        expected = int(np.prod(self.shapes[name]))
        if count != expected:
            raise InputError(
                f"{self.file.path}: {', '.join(piece.tensor for piece in pieces)} has {count} numbers, but by its "
                f"metadata {name} has shape {tuple(self.shapes[name])}: convert the model again"
            )
        last = {self.file.tensors[piece.tensor].shape[-1] for piece in pieces}
        width = self.shapes[name][0 if _CONV1D.fullmatch(name) else -1]
        if self.shapes[name][0] > 1 and len(self.shapes[name]) > 1 and last != {width}:
            raise InputError(
                f"{self.file.path}: {pieces[0].tensor} has rows of {max(last)}, but by its metadata {name} has shape "
                f"{tuple(self.shapes[name])}: convert the model again"
            )

    def _numbers(self, piece: Piece) -> int:
        shape = self.file.tensors[piece.tensor].shape
        axis = 1 if len(shape) == 3 else 0
        rows = range(*piece.rows.indices(shape[axis]))
        return int(np.prod(shape)) // shape[axis] * len(rows)

    def _check_unused_tensors(self) -> None:
        """Raises InputError for tensors that no parameter uses."""
        claimed = {piece.tensor for pieces in self._pieces.values() for piece in pieces or ()}
        scales = {_second_scale(name) for name in claimed} & set(self.file.tensors)
        if scales and not self.architecture.scales:
            raise InputError(
                f"{self.file.path} has {min(scales)}, a second scale, which llama.cpp does not apply everywhere in the "
                f"architecture {self.architecture.name}: start from the model in safetensors"
            )
        for scale in scales:
            name = scale.removesuffix("scale") + "weight"
            entry = self.file.tensors[name]
            if self.file.tensors[scale].numbers not in (1, entry.shape[0] if len(entry.shape) == 3 else 1):
                raise InputError(
                    f"{self.file.path}: {scale} has {self.file.tensors[scale].numbers} numbers, not one: fetch it again"
                )
        rest = set(self.file.tensors) - claimed - scales - set(_READ_WITH_CONFIG)
        rest = {name for name in rest if not _IGNORED.fullmatch(name)}
        rest |= {name for name in claimed if has_bias(name, self.architecture.no_biases)}
        if rest:
            more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
            raise InputError(
                f"{self.file.path} has {', '.join(sorted(rest)[:4])}{more}, which {self.config.model_type} "
                "has no place for, and without which it would be another model: start from the model in safetensors"
            )


def _second_scale(name: str) -> str:
    """The name of a weight's second scale: one number for the whole weight, or one for each of its experts."""
    return name.removesuffix("weight") + "scale" if name.endswith(".weight") else ""
