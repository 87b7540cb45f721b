"""The contract of observers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import Observer
from gyroquant.testing.contract import Contract, require

OBSERVER: Contract[Observer] = Contract("observer", Observer, lambda observer: type(observer).__module__)
_N = 256


def held_tensors(thing: Any) -> list[Tensor]:
    """The tensors that an object keeps, and those of its observers."""
    parts = [value for value in vars(thing).values() if isinstance(value, Tensor)]
    return parts + [t for value in vars(thing).values() if isinstance(value, Observer) for t in held_tensors(value)]


@OBSERVER.check()
def check_an_observer_is_as_large_as_it_says(observer: Observer) -> None:
    """`size_in_bytes` is the memory of the tensors that it holds, within a factor of two and a half, and not less."""
    for _ in range(4):
        observer(torch.randn(300, _N))
    held = sum(tensor.numel() * tensor.element_size() for tensor in held_tensors(observer))
    said = observer.size_in_bytes(_N)
    require(
        0.4 * said <= held <= 1.1 * said + 64,
        f"it holds {held} bytes for vectors of {_N} numbers, but size_in_bytes says {said}",
    )


def check_observer(observer: Observer | type[Observer]) -> None:
    """Checks all that an observer must satisfy. An instance must be made for vectors of 256 numbers and be unused.
    Raises AssertionError, naming the class, what is wrong and what to do.
    """
    OBSERVER.run(observer)
