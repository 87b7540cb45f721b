"""Solvers: they choose codes from weights, statistics of their input, and a grid. Each has one file.

This package has their classes as attributes, those of plug-ins too:
``gyroquant.rounding.solvers.Gptq(act_order=True)``.
"""

from typing import TYPE_CHECKING, Any

from gyroquant.rounding.base import Solver

if TYPE_CHECKING:  # for editors and type checkers; at run time the registry finds them
    from gyroquant.rounding.solvers.auto_round import AutoRound
    from gyroquant.rounding.solvers.gptaq import Gptaq
    from gyroquant.rounding.solvers.gptq import Gptq
    from gyroquant.rounding.solvers.qronos import Qronos
    from gyroquant.rounding.solvers.rtn import RoundToNearest

__all__ = ["AutoRound", "Gptaq", "Gptq", "Qronos", "RoundToNearest"]


def __getattr__(name: str) -> Any:
    return Solver.registry.class_named(name)
