"""Which tensors of a GGUF file hold the parameters of a model: names, rows and their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.gguf.targets import Target, target_of
from gyroquant.models.graph.heads import Heads, heads_of
from gyroquant.models.stores.packed import PackedStore

Rows = Tensor | slice
_ALL = slice(None)
_SUFFIXES = (".weight", ".bias")
_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|up_proj|down_proj)(_bias)?")
# Tensors that llama.cpp computes with in fp32, or that decide which experts run.
_IN_FP32 = ("ffn_gate_inp", "shortconv.conv", "_exps.bias", "ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm")


class Piece(NamedTuple):
    """A tensor of the file, and what it holds of a parameter.

    tensor: its name.
    shape: its shape: rows and columns, with the number of experts before them, or a vector.
    rows: the rows that it holds, of each expert, in their order. For a vector, its entries.
    change: what is done to numbers that are not rounded, in fp32. None: nothing.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: Rows = _ALL
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def in_fp32(self) -> bool:
        """Whether the tensor has to be fp32."""
        return len(self.shape) == 1 or any(part in self.tensor for part in _IN_FP32)


def tensor_pieces(store: PackedStore) -> dict[str, tuple[Piece, ...]]:
    """The pieces of every parameter of a model. Raises InputError for a parameter that llama.cpp has no place for."""
    return _Plan(store).pieces()


class _Plan:
    def __init__(self, store: PackedStore):
        self.store, self.config = store, store.config
        self.target: Target = target_of(store.config)
        self.heads: Heads = heads_of(store.config)
        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.target.name)
        self._names = gguf.get_tensor_name_map(number, len(store.graph.blocks))

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        found = {name: tuple(self._pieces(name)) for name in self.store.shapes}
        tied = [name for name in self.store.tied.values() if self.target.own_head is None]
        for name in tied:
            found[name] = (*found[name], found[name][0]._replace(tensor="output.weight"))
        return found

    def _pieces(self, name: str) -> Iterator[Piece]:
        match = _EXPERTS.fullmatch(name)
        if match is not None:
            yield from self._experts(name, match[1], bool(match[2]))
        elif ".shared_mlp.input_linear." in name:  # gate and up of Granite's shared experts, one after the other
            rows = self._matrix(name)[1] // 2
            block = self._block(name)
            for part, start in (("gate", 0), ("up", rows)):
                shape = (rows, self._matrix(name)[2])
                yield Piece(f"{block}ffn_{part}_shexp.weight", shape, slice(start, start + rows))
        else:
            yield self._plain(name)

    def _experts(self, name: str, part: str, bias: bool) -> Iterator[Piece]:
        """The pieces of stacked experts. A matrix that holds gate and up becomes two."""
        block, kind = self._block(name), "bias" if bias else "weight"
        experts, rows, columns = (*self.store.shapes[name], 0) if bias else self._matrix(name)
        if part != "gate_up_proj":
            shape = (experts, rows) if bias else (experts, rows, columns)
            yield Piece(f"{block}ffn_{part.removesuffix('_proj')}_exps.{kind}", shape)
            return
        half = rows // 2
        alternating = self.target.name == "gpt-oss"
        parts = (slice(0, None, 2), slice(1, None, 2)) if alternating else (slice(0, half), slice(half, rows))
        for letter, chosen in zip(("gate", "up"), parts, strict=True):
            shape = (experts, half) if bias else (experts, half, columns)
            yield Piece(f"{block}ffn_{letter}_exps.{kind}", shape, chosen)

    def _plain(self, name: str) -> Piece:
        module, _, kind = name.rpartition(".")
        part, shape = module.rpartition(".")[2], self.store.shapes[name]
        if self.store.graph.find_op(name) is not None:
            shape = self._matrix(name)[1:]
        tensor = self._name(name)
        change = self.target.changes.get(tensor.rpartition("blk.")[2].partition(".")[2])
        if change is not None:
            return Piece(tensor, tuple(change(torch.ones(shape), self.config).shape), change=self._changed(change))
        if self.target.norm_offset and kind == "weight" and "norm" in part:
            return Piece(tensor, shape, change=lambda values: values + self.target.norm_offset)
        if len(shape) == 3 and shape[1] == 1:  # a convolution of each coordinate
            return Piece(tensor, (shape[0], shape[2]), change=lambda values: values.flatten(1))
        if shape[0] == 1 and len(shape) == 2:  # a row that llama.cpp keeps as a vector
            return Piece(tensor, shape[1:], change=lambda values: values.reshape(-1))
        return Piece(tensor, shape, self._order(part))

    def _changed(self, change: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda values: change(values, self.config)

    def _order(self, part: str) -> Rows:
        """The order of rows that RoPE of llama.cpp needs. In our order, the first half of each head is paired with the
        second. GPT-NeoX has queries, keys and values head by head, its file one kind after the other.
        """
        heads = {"q_proj": self.heads.queries, "k_proj": self.heads.shared}.get(part)
        if self.target.neighbours and heads is not None:
            rows = torch.arange(heads * self.heads.size)
            return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)
        if part == "query_key_value" and self.target.name == "gptneox":
            rows = torch.arange(3 * self.heads.queries * self.heads.size)
            return rows.view(self.heads.queries, 3, -1).transpose(0, 1).reshape(-1)
        return _ALL

    def _matrix(self, name: str) -> tuple[int, int, int]:
        """The numbers of experts (1 without), of rows of each and of columns of a matrix."""
        op = self.store.graph.op(name)
        return op.numel // (op.out_features * op.in_features), op.out_features, op.in_features

    def _name(self, name: str) -> str:
        for ours, theirs in self.target.names.items():
            if ours in name:
                return self._block(name) + theirs + (name.rpartition(".")[2] if theirs.endswith(".") else "")
        if name.endswith(_SUFFIXES):
            spellings = [name]
        elif name.endswith("_bias"):
            spellings = [name.removesuffix("_bias") + ".bias", f"{name}.bias"]
        else:
            spellings = [f"{name}.weight"]
        found = next((x for spelling in spellings if (x := self._names.get_name(spelling, _SUFFIXES))), None)
        if found is None:
            raise InputError(f"llama.cpp has no place for {name} of {self.config.model_type}")
        return found

    def _block(self, name: str) -> str:
        match = re.search(r"\.(\d+)\.", name)
        return f"blk.{match[1]}." if match else ""
