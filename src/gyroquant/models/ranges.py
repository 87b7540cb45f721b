"""Whether a dtype holds the numbers of parameters: none too large for it, none that it would lose most digits of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gyroquant.errors import InputError

_LOST = 2.0**-8  # of the root mean square: as much as bfloat16 may be off; float16 loses 2^-11 where it loses no digits


@dataclass
class Ranges:
    """What storing parameters in a dtype would do to them. They are added piece by piece, while they are read."""

    dtype: torch.dtype
    largest: dict[str, float] = field(default_factory=dict)
    _unit: dict[str, float] = field(default_factory=dict)
    _squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, piece: Tensor) -> None:
        """Takes note of some numbers of a parameter, fp32."""
        if not piece.numel():
            return
        largest = float(piece.abs().max())
        self.largest[name] = max(largest, self.largest.get(name, 0.0))
        if not 0 < largest < self._limit:
            return
        unit = self._unit.setdefault(name, largest)  # fp32 has no squares of the smallest numbers
        lost, whole = self._squares.get(name, (0.0, 0.0))
        away = ((piece.to(self.dtype).float() - piece) / unit).square().sum(dtype=torch.float64)
        self._squares[name] = lost + float(away), whole + float((piece / unit).square().sum(dtype=torch.float64))

    @property
    def _limit(self) -> float:
        return float(torch.finfo(self.dtype).max)

    def _loses(self, name: str) -> float:
        lost, whole = self._squares.get(name, (0.0, 0.0))
        return (lost / whole) ** 0.5 if whole > 0 else 0.0

    def check(self, names: Iterable[str]) -> list[str]:
        """Raises InputError for those of some parameters that the dtype does not hold. Returns what to say of biases
        that are too small for it, which hardly matter beside what they are added to.
        """
        names = list(names)
        dtype = str(self.dtype).removeprefix("torch.")
        remedy = "choose another dtype with --save-dtype bfloat16 or float32"
        large = [name for name in names if self.largest.get(name, 0.0) > self._limit]
        if large:
            found = "; ".join(f"{name} holds values up to {self.largest[name]:.4g}" for name in large[:4])
            raise InputError(f"{found}: too large for {dtype}, which ends at {self._limit:.6g}; {remedy}")
        small = [name for name in names if self._loses(name) > _LOST]
        said = [
            f"{name} is off by {100 * self._loses(name):.2g} % in {dtype}, its values are so small" for name in small
        ]
        biases = [text for name, text in zip(small, said, strict=True) if name.endswith("bias")]
        others = [text for name, text in zip(small, said, strict=True) if not name.endswith("bias")]
        if others:
            raise InputError(f"{'; '.join(others[:4])}: {remedy}")
        return [f"{text}; --save-dtype bfloat16 or float32 keeps it" for text in biases]
