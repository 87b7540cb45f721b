"""Codes and scales of NVFP4, Four Over Six and IF4: ours against those of the authors' code.

    git clone https://github.com/mit-han-lab/fouroversix
    python benchmarks/four_over_six.py fouroversix

The weights are normal numbers, and their cubes for outliers. Shown is the share of codes and of scales that differ. A
zero counts as equal to a negative zero, which the authors' code keeps and ours does not. Only the reference
implementation in plain PyTorch is loaded, without the package's kernels.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gyroquant.grids import Grid, If4Grid, Mxfp4Grid, Nvfp4Grid
from gyroquant.grids.bitpack import unpack
from gyroquant.testing.grids import rounded

GRIDS: list[tuple[str, str, Grid]] = [
    ("nvfp4", "static_6", Nvfp4Grid(scale="minmax")),
    ("nvfp4", "mse", Nvfp4Grid(scale="four_over_six")),
    ("if4", "mse", If4Grid(scale="minmax")),
    ("mxfp4", "static_6", Mxfp4Grid(scale_rounding="ceil")),
]
SHAPE = (1024, 1024)
MINUS_ZERO = 8


def reference(checkout: Path) -> Any:
    """The module of the reference implementation, from a checkout of the authors' code."""
    for package in ("fouroversix", "fouroversix.kernels", "fouroversix.quantize", "fouroversix.quantize.pytorch"):
        module = ModuleType(package)  # its own __init__ would import the kernels
        module.__path__ = [str(checkout / "src" / package.replace(".", "/"))]
        sys.modules[package] = module
    return import_module("fouroversix.quantize.pytorch.reference")


def differing(theirs: Any, kind: str, rule: str, grid: Grid, weight: torch.Tensor) -> tuple[float, float]:
    """The shares of codes and of scales that differ."""
    options = {"fp4_format": theirs.DataType(kind), "scale_rule": theirs.ScaleRule(rule)}
    codes, scales, _ = theirs.quantize(weight, **options, use_blackwell_scale_layout=False)
    halves = codes.view(torch.uint8)
    codes = torch.stack([halves & 15, halves >> 4], -1).view(SHAPE)
    own = rounded(grid, weight).pack()
    same = unpack(own["codes"], 4, SHAPE) == torch.where(codes == MINUS_ZERO, 0, codes)
    return 1 - float(same.float().mean()), float((own["scales"].flatten() != scales.view(torch.uint8)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    theirs = reference(parser.parse_args().checkout)
    normal = 0.05 * torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))
    for kind, rule, grid in GRIDS:
        for name, weight in (("normal", normal), ("outliers", 100 * normal**3)):
            codes, scales = differing(theirs, kind, rule, grid, weight)
            print(f"{kind:6} {rule:9} {name:9} codes {codes:.5%}  scales {scales:.5%}")


if __name__ == "__main__":
    main()
