"""gyroquant: rotation-based post-training quantization that is proved, CPU-first and exact about bits.

The public names are imported when they are first used (PEP 562), so that `import gyroquant` takes no time and needs
neither torch nor transformers. It still lets transformers open the folders that gyroquant packed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gyroquant.formats.transformers_hook import announce

if TYPE_CHECKING:
    from gyroquant import grids, maps, methods
    from gyroquant.api import evaluate, load, quantize
    from gyroquant.benchmark import compare
    from gyroquant.errors import (
        GyroquantError,
        InputError,
        MapError,
        ProofError,
        RecipeError,
        RenamedWarning,
        UnsupportedModelError,
    )
    from gyroquant.evaluation.diagnosis.options import ReportOptions
    from gyroquant.finetuning.scales import Finetune
    from gyroquant.finetuning.settings import Learn
    from gyroquant.formats.export import export
    from gyroquant.formats.push import push
    from gyroquant.grids.additive import AdditiveGrid
    from gyroquant.grids.e8p import E8pGrid
    from gyroquant.grids.float_zero import FloatZeroGrid
    from gyroquant.grids.floating import Fp4Grid, Fp8Grid
    from gyroquant.grids.int_float import If4Grid, MxIf4Grid
    from gyroquant.grids.integer import IntegerGrid
    from gyroquant.grids.iq import IqGrid
    from gyroquant.grids.iq_kt import KtGrid
    from gyroquant.grids.iqk import IqkGrid
    from gyroquant.grids.k_quants import KQuantGrid
    from gyroquant.grids.leading import LeadingGrid
    from gyroquant.grids.lookup import LookupGrid
    from gyroquant.grids.microscaling import Mxfp4Grid, Nvfp4Grid
    from gyroquant.grids.mixed_rows import MixedRowsGrid
    from gyroquant.grids.real_zero import RealZeroGrid
    from gyroquant.grids.ternary import TernaryGrid
    from gyroquant.grids.trellis import TrellisGrid
    from gyroquant.inspection.verify import verify
    from gyroquant.inspection.verify_export import verify_export
    from gyroquant.models.execution.kv_cache import PackedKVCache
    from gyroquant.models.folding.prove import Proof
    from gyroquant.pipeline.options import OutputOptions
    from gyroquant.pipeline.transform import transform
    from gyroquant.recipes.calibration import Calibration, ProofSettings
    from gyroquant.recipes.schema import (
        Embeddings,
        Head,
        Override,
        Recipe,
        Step,
        Weights,
        load_recipe,
    )
    from gyroquant.rounding.activations import Activations, KvCache
    from gyroquant.rounding.bit_allocation import Allocate
    from gyroquant.rounding.guided import Guided
    from gyroquant.rounding.solvers.auto_round import AutoRound
    from gyroquant.rounding.solvers.gptaq import Gptaq
    from gyroquant.rounding.solvers.gptq import Gptq
    from gyroquant.rounding.solvers.qronos import Qronos
    from gyroquant.rounding.solvers.rtn import RoundToNearest
    from gyroquant.rounding.steps.gumbel import GumbelSoftmax
    from gyroquant.rounding.steps.low_rank import LowRank
    from gyroquant.rounding.steps.refine import Refine
    from gyroquant.rounding.steps.signround import SignRound
    from gyroquant.rounding.steps.target import Target
    from gyroquant.rounding.weight_basis import WeightBasis
    from gyroquant.system.worker_pool import Workers

    __version__: str

__all__ = [
    "Activations",
    "AdditiveGrid",
    "Allocate",
    "AutoRound",
    "Calibration",
    "E8pGrid",
    "Embeddings",
    "Finetune",
    "FloatZeroGrid",
    "Fp4Grid",
    "Fp8Grid",
    "Gptaq",
    "Gptq",
    "Guided",
    "GumbelSoftmax",
    "GyroquantError",
    "Head",
    "If4Grid",
    "InputError",
    "IntegerGrid",
    "IqGrid",
    "IqkGrid",
    "KQuantGrid",
    "KtGrid",
    "KvCache",
    "LeadingGrid",
    "Learn",
    "LookupGrid",
    "LowRank",
    "MapError",
    "MixedRowsGrid",
    "MxIf4Grid",
    "Mxfp4Grid",
    "Nvfp4Grid",
    "OutputOptions",
    "Override",
    "PackedKVCache",
    "Proof",
    "ProofError",
    "ProofSettings",
    "Qronos",
    "RealZeroGrid",
    "Recipe",
    "RecipeError",
    "Refine",
    "RenamedWarning",
    "ReportOptions",
    "RoundToNearest",
    "SignRound",
    "Step",
    "Target",
    "TernaryGrid",
    "TrellisGrid",
    "UnsupportedModelError",
    "WeightBasis",
    "Weights",
    "Workers",
    "compare",
    "evaluate",
    "export",
    "grids",
    "load",
    "load_recipe",
    "maps",
    "methods",
    "push",
    "quantize",
    "transform",
    "verify",
    "verify_export",
]

_ROOMS = ("grids", "maps", "methods")
_MODULES = {
    "Activations": "rounding.activations",
    "AdditiveGrid": "grids.additive",
    "Allocate": "rounding.bit_allocation",
    "AutoRound": "rounding.solvers.auto_round",
    "Calibration": "recipes.calibration",
    "E8pGrid": "grids.e8p",
    "Embeddings": "recipes.schema",
    "Finetune": "finetuning.scales",
    "FloatZeroGrid": "grids.float_zero",
    "Fp4Grid": "grids.floating",
    "Fp8Grid": "grids.floating",
    "Gptaq": "rounding.solvers.gptaq",
    "Gptq": "rounding.solvers.gptq",
    "Guided": "rounding.guided",
    "GumbelSoftmax": "rounding.steps.gumbel",
    "GyroquantError": "errors",
    "Head": "recipes.schema",
    "InputError": "errors",
    "If4Grid": "grids.int_float",
    "IntegerGrid": "grids.integer",
    "KvCache": "rounding.activations",
    "LeadingGrid": "grids.leading",
    "Learn": "finetuning.settings",
    "IqGrid": "grids.iq",
    "IqkGrid": "grids.iqk",
    "KQuantGrid": "grids.k_quants",
    "KtGrid": "grids.iq_kt",
    "LookupGrid": "grids.lookup",
    "LowRank": "rounding.steps.low_rank",
    "MapError": "errors",
    "MixedRowsGrid": "grids.mixed_rows",
    "MxIf4Grid": "grids.int_float",
    "Mxfp4Grid": "grids.microscaling",
    "Nvfp4Grid": "grids.microscaling",
    "OutputOptions": "pipeline.options",
    "Override": "recipes.schema",
    "PackedKVCache": "models.execution.kv_cache",
    "Proof": "models.folding.prove",
    "ProofError": "errors",
    "ProofSettings": "recipes.calibration",
    "Qronos": "rounding.solvers.qronos",
    "RealZeroGrid": "grids.real_zero",
    "Recipe": "recipes.schema",
    "RecipeError": "errors",
    "Refine": "rounding.steps.refine",
    "RenamedWarning": "errors",
    "ReportOptions": "evaluation.diagnosis.options",
    "RoundToNearest": "rounding.solvers.rtn",
    "SignRound": "rounding.steps.signround",
    "Step": "recipes.schema",
    "Target": "rounding.steps.target",
    "TernaryGrid": "grids.ternary",
    "TrellisGrid": "grids.trellis",
    "UnsupportedModelError": "errors",
    "WeightBasis": "rounding.weight_basis",
    "Weights": "recipes.schema",
    "Workers": "system.worker_pool",
    "compare": "benchmark",
    "evaluate": "api",
    "export": "formats.export",
    "load": "api",
    "load_recipe": "recipes.schema",
    "push": "formats.push",
    "quantize": "api",
    "transform": "pipeline.transform",
    "verify": "inspection.verify",
    "verify_export": "inspection.verify_export",
}


def __getattr__(name: str) -> Any:
    """A public name, imported on its first use."""
    if name in _ROOMS:
        return import_module(f"gyroquant.{name}")
    if name == "__version__":
        value: Any = import_module("gyroquant.system.version").gyroquant_version()
    elif name in _MODULES:
        value = getattr(import_module(f"gyroquant.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'gyroquant' has no attribute {name!r}", name=name, obj=None)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


announce()
