"""Invertible linear maps with structure: what a basis is changed by. They know no model."""

from gyroquant.maps.base import Map, dump, load
from gyroquant.maps.butterfly import Butterfly, butterfly
from gyroquant.maps.compose import Across, BlockDiagonal, Product, blocks, fixing_ones, product
from gyroquant.maps.construct import factors, largest_constructible, next_power_of_two
from gyroquant.maps.elementary import (
    Dense,
    Diagonal,
    Householder,
    Identity,
    Permutation,
    Signs,
    random_orthogonal,
    random_signs,
)
from gyroquant.maps.hadamard import Hadamard, Walsh, hadamard, sequency_order, walsh
from gyroquant.maps.rotary import PairRotation

__all__ = [
    "Across",
    "BlockDiagonal",
    "Butterfly",
    "Dense",
    "Diagonal",
    "Hadamard",
    "Householder",
    "Identity",
    "Map",
    "PairRotation",
    "Permutation",
    "Product",
    "Signs",
    "Walsh",
    "blocks",
    "butterfly",
    "dump",
    "factors",
    "fixing_ones",
    "hadamard",
    "largest_constructible",
    "load",
    "next_power_of_two",
    "product",
    "random_orthogonal",
    "random_signs",
    "sequency_order",
    "walsh",
]
