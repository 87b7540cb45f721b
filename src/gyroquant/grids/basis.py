"""Bases of the inputs in which weights are rounded. Decoding undoes the basis, so nothing of it runs with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.maps import hadamard


@dataclass(frozen=True)
class Basis:
    """``pad(W) H diag(s)``, shape (rows, order), is rounded in place of W, shape (rows, columns).

    H is the normalised Hadamard matrix of that order. `pad` adds columns of zeros. `scale` is s, shape (parts, order),
    with one row for each of the equal parts of W's rows: fp32 numbers that fp16 holds exactly. None means 1 everywhere.
    """

    columns: int
    order: int
    scale: Tensor | None = None

    def encode(self, weight: Tensor) -> Tensor:
        """The weight in this basis, shape (rows, order)."""
        moved = hadamard(self.order).apply(_padded(weight, self.order))
        return moved if self.scale is None else self._scaled(moved, self.scale)

    def decode(self, moved: Tensor) -> Tensor:
        """The inverse of `encode`, shape (rows, columns). The added columns are dropped last."""
        plain = moved if self.scale is None else self._scaled(moved, 1 / self.scale)
        return hadamard(self.order).inverse().apply(plain)[:, : self.columns].contiguous()

    def second_moments(self, gram: Tensor) -> Tensor:
        """Second moments, shape (columns, columns), transformed into this basis: shape (order, order), fp64.

        Also for the second moments of input errors. fp64, because second moments of padded inputs are singular.
        """
        scale = torch.ones(1, self.order) if self.scale is None else self.scale
        if len(scale) != 1:
            raise ValueError("second moments belong to one input, but this basis has a scale for several parts")
        inverse = 1 / scale.double()
        return spectrum(gram.double(), self.order) * inverse * inverse.T

    def _scaled(self, rows: Tensor, scale: Tensor) -> Tensor:
        return (rows.view(len(scale), -1, self.order) * scale.to(rows)[:, None]).view(rows.shape)

    def describe(self) -> dict[str, Any]:
        """The description of the basis in a saved model."""
        return {"order": self.order}

    def pack(self) -> dict[str, Tensor]:
        """The arrays stored for the basis."""
        return {} if self.scale is None else {"basis": self.scale.half()}

    @staticmethod
    def unpack(spec: dict[str, Any], arrays: dict[str, Tensor], columns: int) -> Basis:
        """The basis from the results of `describe` and `pack`. Raises InputError if they contradict each other."""
        order, scale = int(spec["order"]), arrays.get("basis")
        if order < columns or (scale is not None and scale.shape[1:] != (order,)):
            raise InputError(
                f"a basis of order {order} does not fit the arrays stored for a weight of {columns} columns"
            )
        return Basis(columns, order, None if scale is None else scale.float())


def _padded(x: Tensor, order: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, order - x.shape[-1]))


def spectrum(gram: Tensor, order: int) -> Tensor:
    """Second moments, shape (columns, columns), of inputs padded with zeros and rotated by H: (order, order)."""
    rotation = hadamard(order)
    half = rotation.apply(_padded(gram, order))
    return rotation.apply(_padded(half.T.contiguous(), order)).T.contiguous()
