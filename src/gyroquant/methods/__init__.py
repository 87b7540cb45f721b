"""Methods: they choose the map to fold at a site. Each method has its own file.

All classes are available here by name, also those of plug-ins: ``gyroquant.methods.Hadamard(random_signs=True)``.
"""

from typing import TYPE_CHECKING, Any

from gyroquant.methods.base import BlockwiseMethod, Context, Method

if TYPE_CHECKING:  # for editors and type checkers; at run time they come from the registry
    from gyroquant.methods.across_heads import AcrossHeads
    from gyroquant.methods.awq import Awq
    from gyroquant.methods.butterfly import Butterfly
    from gyroquant.methods.duquant import DuQuant
    from gyroquant.methods.hadamard import Hadamard
    from gyroquant.methods.identity import Identity
    from gyroquant.methods.leading import Leading
    from gyroquant.methods.oscar import KeyPCA, Oscar
    from gyroquant.methods.pca import HeadPCA
    from gyroquant.methods.permutations import MassDiff, RandomPermutation, SortedByMagnitude, Zigzag
    from gyroquant.methods.random_orthogonal import RandomOrthogonal
    from gyroquant.methods.rope_pairs import PairPCA
    from gyroquant.methods.smooth import Smooth
    from gyroquant.methods.spectral import SpectralScale
    from gyroquant.methods.stored import Stored
    from gyroquant.methods.unit_scale import UnitScale
    from gyroquant.methods.walsh import Walsh
    from gyroquant.methods.wush import Wush

__all__ = [
    "AcrossHeads",
    "Awq",
    "BlockwiseMethod",
    "Butterfly",
    "Context",
    "DuQuant",
    "Hadamard",
    "HeadPCA",
    "Identity",
    "KeyPCA",
    "Leading",
    "MassDiff",
    "Method",
    "Oscar",
    "PairPCA",
    "RandomOrthogonal",
    "RandomPermutation",
    "Smooth",
    "SortedByMagnitude",
    "SpectralScale",
    "Stored",
    "UnitScale",
    "Walsh",
    "Wush",
    "Zigzag",
]


def __getattr__(name: str) -> Any:
    return Method.registry.class_named(name)
