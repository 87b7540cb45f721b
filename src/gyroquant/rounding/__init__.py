"""Rounding solvers: weights + statistics of their input + a grid -> codes. One file each."""

from importlib import import_module
from pkgutil import iter_modules

from gyroquant.rounding.activations import Activations, Ignore, KvCache
from gyroquant.rounding.allocate import Allocate
from gyroquant.rounding.base import InputStatistics, Solver, output_error, weight_error
from gyroquant.rounding.basis import WeightBasis
from gyroquant.rounding.refine import Refine
from gyroquant.rounding.signround import SignRound
from gyroquant.rounding.target import Target

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Activations",
    "Allocate",
    "Ignore",
    "InputStatistics",
    "KvCache",
    "Refine",
    "SignRound",
    "Solver",
    "Target",
    "WeightBasis",
    "output_error",
    "weight_error",
]
