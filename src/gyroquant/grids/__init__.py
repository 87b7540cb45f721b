"""Number grids: the numbers that can be stored, how they are fitted and packed, and the bits they take."""

from gyroquant.grids.additive import AdditiveGrid
from gyroquant.grids.base import (
    Grid,
    GroupParams,
    LeadingOrder,
    QuantizedWeight,
    grid_from,
    joined,
    stored_bits,
    straight_through,
)
from gyroquant.grids.basis import Basis
from gyroquant.grids.e8p import E8pGrid
from gyroquant.grids.entropy import code_bits, code_entropy
from gyroquant.grids.even import EvenGrid
from gyroquant.grids.float_zero import FloatZeroGrid
from gyroquant.grids.floating import Fp4Grid, Fp8Grid
from gyroquant.grids.half_scale import HalfScaleGrid
from gyroquant.grids.int_float import If4Grid, MxIf4Grid
from gyroquant.grids.integer import IntegerGrid
from gyroquant.grids.iq import IqGrid
from gyroquant.grids.iq_kt import KtGrid
from gyroquant.grids.iqk import IqkGrid
from gyroquant.grids.k_quants import KQuantGrid
from gyroquant.grids.leading import LeadingGrid, leading_columns
from gyroquant.grids.lookup import LookupGrid
from gyroquant.grids.low_rank import LowRankFactors
from gyroquant.grids.microscaling import Mxfp4Grid, Nvfp4Grid
from gyroquant.grids.mixed_rows import MixedRowsGrid
from gyroquant.grids.real_zero import RealZeroGrid
from gyroquant.grids.super_block import SuperBlockGrid
from gyroquant.grids.ternary import TernaryGrid
from gyroquant.grids.tiled import TiledGrid
from gyroquant.grids.trellis import TrellisGrid

__all__ = [
    "AdditiveGrid",
    "Basis",
    "E8pGrid",
    "EvenGrid",
    "FloatZeroGrid",
    "Fp4Grid",
    "Fp8Grid",
    "Grid",
    "GroupParams",
    "HalfScaleGrid",
    "If4Grid",
    "IntegerGrid",
    "IqGrid",
    "IqkGrid",
    "KQuantGrid",
    "KtGrid",
    "LeadingGrid",
    "LeadingOrder",
    "LookupGrid",
    "LowRankFactors",
    "MixedRowsGrid",
    "MxIf4Grid",
    "Mxfp4Grid",
    "Nvfp4Grid",
    "QuantizedWeight",
    "RealZeroGrid",
    "SuperBlockGrid",
    "TernaryGrid",
    "TiledGrid",
    "TrellisGrid",
    "code_bits",
    "code_entropy",
    "grid_from",
    "joined",
    "leading_columns",
    "stored_bits",
    "straight_through",
]
