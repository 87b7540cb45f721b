"""Number grids: the numbers that can be stored, how they are fitted and packed, and the bits they take."""

from gyroquant.grids.base import (
    Grid,
    GroupParams,
    QuantizedWeight,
    grid_from,
    joined,
    stored_bits,
    straight_through,
)
from gyroquant.grids.basis import Basis
from gyroquant.grids.floating import Fp4Grid, Fp8Grid
from gyroquant.grids.half_scale import HalfScaleGrid
from gyroquant.grids.integer import IntegerGrid
from gyroquant.grids.microscaling import Mxfp4Grid, Nvfp4Grid

__all__ = [
    "Basis",
    "Fp4Grid",
    "Fp8Grid",
    "Grid",
    "GroupParams",
    "HalfScaleGrid",
    "IntegerGrid",
    "Mxfp4Grid",
    "Nvfp4Grid",
    "QuantizedWeight",
    "grid_from",
    "joined",
    "stored_bits",
    "straight_through",
]
