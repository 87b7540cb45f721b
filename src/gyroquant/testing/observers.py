"""The contract of observers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import Observer
from gyroquant.testing.contract import Contract, require

OBSERVER: Contract[Observer] = Contract("observer", Observer, lambda observer: type(observer).__module__)
_N = 256


def held_tensors(holder: Any) -> list[Tensor]:
    """The tensors in the attributes of an object and of its observers."""
    parts = [value for value in vars(holder).values() if isinstance(value, Tensor)]
    return parts + [t for value in vars(holder).values() if isinstance(value, Observer) for t in held_tensors(value)]


@OBSERVER.check()
def check_an_observer_is_as_large_as_it_says(observer: Observer) -> None:
    """The tensors that it holds take 0.4 to 1.1 times `size_in_bytes`."""
    for _ in range(4):
        observer(torch.randn(300, _N))
    held = sum(tensor.numel() * tensor.element_size() for tensor in held_tensors(observer))
    declared = observer.size_in_bytes(_N)
    require(
        0.4 * declared <= held <= 1.1 * declared + 64,
        f"it holds {held} bytes for vectors of {_N} numbers, but size_in_bytes says {declared}",
    )


def check_observer(observer: Observer | type[Observer]) -> None:
    """Runs all checks of an observer. An instance must be unused and made for vectors of 256 numbers.

    Raises AssertionError, which names the class, what is wrong and what to do.
    """
    OBSERVER.run(observer)
