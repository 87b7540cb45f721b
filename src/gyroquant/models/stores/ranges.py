"""Checks that a dtype can hold parameters: no number is too large, and none loses most of its digits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gyroquant.errors import InputError

_MAX_ERROR = 2.0**-8  # relative to the root mean square: the error of bfloat16; that of float16 is 2^-11 in its range


@dataclass
class Ranges:
    """The error of storing parameters in a dtype. Parameters are added piece by piece, while they are read."""

    dtype: torch.dtype
    largest: dict[str, float] = field(default_factory=dict)
    _unit: dict[str, float] = field(default_factory=dict)
    _squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, piece: Tensor) -> None:
        """Adds a piece of a parameter, fp32."""
        if not piece.numel():
            return
        largest = float(piece.abs().max())
        self.largest[name] = max(largest, self.largest.get(name, 0.0))
        if not 0 < largest < self._limit:
            return
        unit = self._unit.setdefault(name, largest)  # squares of the smallest numbers underflow in fp32
        lost, whole = self._squares.get(name, (0.0, 0.0))
        error = ((piece.to(self.dtype).float() - piece) / unit).square().sum(dtype=torch.float64)
        self._squares[name] = lost + float(error), whole + float((piece / unit).square().sum(dtype=torch.float64))

    @property
    def _limit(self) -> float:
        return float(torch.finfo(self.dtype).max)

    def _relative_error(self, name: str) -> float:
        """The error of a parameter in this dtype, relative to its root mean square."""
        lost, whole = self._squares.get(name, (0.0, 0.0))
        return (lost / whole) ** 0.5 if whole > 0 else 0.0

    def check(self, names: Iterable[str]) -> list[str]:
        """Raises InputError if the dtype cannot hold a parameter of these names.

        Biases that are too small for the dtype are no error, because what they are added to is much larger. Returns a
        note on each of them.
        """
        names = list(names)
        dtype = str(self.dtype).removeprefix("torch.")
        remedy = "choose another dtype with --save-dtype bfloat16 or float32"
        large = [name for name in names if self.largest.get(name, 0.0) > self._limit]
        if large:
            listed = "; ".join(f"{name} holds values up to {self.largest[name]:.4g}" for name in large[:4])
            raise InputError(f"{listed}: too large for {dtype}, whose maximum is {self._limit:.6g}; {remedy}")
        small = [name for name in names if self._relative_error(name) > _MAX_ERROR]
        texts = [
            f"{name} is off by {100 * self._relative_error(name):.2g} % in {dtype}, because its values are very small"
            for name in small
        ]
        biases = [text for name, text in zip(small, texts, strict=True) if name.endswith("bias")]
        others = [text for name, text in zip(small, texts, strict=True) if not name.endswith("bias")]
        if others:
            raise InputError(f"{'; '.join(others[:4])}: {remedy}")
        return [f"{text}; --save-dtype bfloat16 or float32 keeps it" for text in biases]
