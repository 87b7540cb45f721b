"""gyroquant: rotation-based post-training quantization that is proved, CPU-first and exact about bits."""

from gyroquant import maps
from gyroquant.api import evaluate, load, quantize
from gyroquant.comparison import compare
from gyroquant.deploy import export, verify_export
from gyroquant.environment import gyroquant_version
from gyroquant.errors import (
    GyroquantError,
    InputError,
    MapError,
    ProofError,
    RecipeError,
    UnsupportedModelError,
)
from gyroquant.models.kv_cache import PackedKVCache
from gyroquant.models.prove import Proof
from gyroquant.pipeline import transform
from gyroquant.recipe import Recipe, load_recipe
from gyroquant.verification import verify

__version__ = gyroquant_version()

__all__ = [
    "GyroquantError",
    "InputError",
    "MapError",
    "PackedKVCache",
    "Proof",
    "ProofError",
    "Recipe",
    "RecipeError",
    "UnsupportedModelError",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "maps",
    "quantize",
    "transform",
    "verify",
    "verify_export",
]
