"""Invertible linear maps with structure, which change a basis. They do not depend on a model."""

from gyroquant.maps.base import Identity, Map, Product, dump, load, product
from gyroquant.maps.butterfly import Butterfly, butterfly
from gyroquant.maps.compose import BlockDiagonal, KroneckerLeft, blocks, preserve_mean
from gyroquant.maps.construct import factors, largest_constructible, next_power_of_two
from gyroquant.maps.elementary import (
    Dense,
    Diagonal,
    Householder,
    Permutation,
    Signs,
    random_orthogonal,
    random_signs,
)
from gyroquant.maps.hadamard import Hadamard, Walsh, hadamard, sequency_order, walsh
from gyroquant.maps.rotary import PairRotation

__all__ = [
    "BlockDiagonal",
    "Butterfly",
    "Dense",
    "Diagonal",
    "Hadamard",
    "Householder",
    "Identity",
    "KroneckerLeft",
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
    "hadamard",
    "largest_constructible",
    "load",
    "next_power_of_two",
    "preserve_mean",
    "product",
    "random_orthogonal",
    "random_signs",
    "sequency_order",
    "walsh",
]
