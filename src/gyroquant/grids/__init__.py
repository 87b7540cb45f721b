"""Number grids: which numbers can be stored, how they are fitted, packed, and what they really cost."""

from gyroquant.grids.base import Grid, GroupParams, QuantizedWeight, grid_from, stored_bits
from gyroquant.grids.integer import IntegerGrid

__all__ = ["Grid", "GroupParams", "IntegerGrid", "QuantizedWeight", "grid_from", "stored_bits"]
