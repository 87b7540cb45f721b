"""Bases of its inputs in which a weight is rounded, and from which it is decoded; nothing of them runs with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.maps import hadamard


@dataclass(frozen=True)
class Basis:
    """In place of W, of shape (rows, columns), ``pad(W) H diag(s)`` is rounded, of shape (rows, order).

    H is the normalised Hadamard matrix of that order, `pad` adds columns of zeros. `scale` is s, of shape (parts,
    order), one row for each equal part of the rows, fp32 numbers that fp16 holds; None is 1 everywhere.
    """

    columns: int
    order: int
    scale: Tensor | None = None

    def encode(self, weight: Tensor) -> Tensor:
        """The weight in this basis, shape (rows, order)."""
        moved = hadamard(self.order).apply(_padded(weight, self.order))
        return moved if self.scale is None else self._scaled(moved, self.scale)

    def decode(self, moved: Tensor) -> Tensor:
        """The inverse of `encode`, shape (rows, columns). Columns that were added are dropped at the very end."""
        plain = moved if self.scale is None else self._scaled(moved, 1 / self.scale)
        return hadamard(self.order).inverse().apply(plain)[:, : self.columns].contiguous()

    def second_moments(self, gram: Tensor) -> Tensor:
        """Second moments of an input, (columns, columns), in this basis, (order, order), or what drifts from them.

        fp64, since those of padded inputs are singular.
        """
        scale = torch.ones(1, self.order) if self.scale is None else self.scale
        if len(scale) != 1:
            raise ValueError("second moments belong to one input")
        inverse = 1 / scale.double()
        return spectrum(gram.double(), self.order) * inverse * inverse.T

    def _scaled(self, rows: Tensor, scale: Tensor) -> Tensor:
        return (rows.view(len(scale), -1, self.order) * scale.to(rows)[:, None]).view(rows.shape)

    def describe(self) -> dict[str, Any]:
        """What a saved model has to say of it."""
        return {"order": self.order}

    def pack(self) -> dict[str, Tensor]:
        """What is stored for it."""
        return {} if self.scale is None else {"basis": self.scale.half()}

    @staticmethod
    def unpack(spec: dict[str, Any], arrays: dict[str, Tensor], columns: int) -> Basis:
        """The basis that `describe` and `pack` gave. Raises InputError when they contradict each other."""
        order, scale = int(spec["order"]), arrays.get("basis")
        if order < columns or (scale is not None and scale.shape[1:] != (order,)):
            raise InputError(f"a basis of order {order} does not fit what is stored for a weight of {columns} columns")
        return Basis(columns, order, None if scale is None else scale.float())


def _padded(x: Tensor, order: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, order - x.shape[-1]))


def spectrum(gram: Tensor, order: int) -> Tensor:
    """Second moments, (columns, columns), of what they are the moments of, padded with zeros and rotated by H."""
    rotation = hadamard(order)
    half = rotation.apply(_padded(gram, order))
    return rotation.apply(_padded(half.T.contiguous(), order)).T.contiguous()
