"""Rounding: solvers that choose codes from weights, input statistics and a grid, and the steps around a solver."""

from gyroquant.rounding.activations import Activations, Ignore, KvCache
from gyroquant.rounding.base import InputStatistics, Solver, output_error
from gyroquant.rounding.bit_allocation import Allocate
from gyroquant.rounding.guided import Guided
from gyroquant.rounding.steps.gumbel import GumbelSoftmax
from gyroquant.rounding.steps.low_rank import LowRank
from gyroquant.rounding.steps.refine import Refine
from gyroquant.rounding.steps.signround import SignRound
from gyroquant.rounding.steps.target import Target
from gyroquant.rounding.weight_basis import WeightBasis

__all__ = [
    "Activations",
    "Allocate",
    "Guided",
    "GumbelSoftmax",
    "Ignore",
    "InputStatistics",
    "KvCache",
    "LowRank",
    "Refine",
    "SignRound",
    "Solver",
    "Target",
    "WeightBasis",
    "output_error",
]
