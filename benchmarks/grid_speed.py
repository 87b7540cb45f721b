"""Speed of grids on one thread: fitting scales, and GPTQ and refinement beside those on the integer grid.

    python benchmarks/grid_speed.py --shapes 8960x1536 1536x8960

Weights are normal numbers, inputs normal numbers whose variances fall as 1/k along random directions. Times are seconds
of the processor, so that other programs hardly change them. Ratios are to the 2-bit integer grid in the same run.

- `fit`: millions of weights a second. Of `e8p` and `trellis`, whose scales are plain moments, the search of codes.
- `error`: of the weights, rounded to nearest.
- `GPTQ`: the sweep, without the factor of the second moments, which is the same for all grids and stands above.
- `refine`: one pass.
- `output`: the error of the layer's outputs after GPTQ, and after refinement. Errors are squared and relative.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from time import process_time
from typing import TypeVar

import torch
from torch import Tensor

from gyroquant.grids import E8pGrid, Grid, IntegerGrid, IqGrid, KQuantGrid, TrellisGrid
from gyroquant.grids.error import weight_error
from gyroquant.rounding import InputStatistics, Refine, output_error
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.solvers.gptq import Sweep
from gyroquant.rounding.solvers.rtn import RoundToNearest

Result = TypeVar("Result")

GRIDS: dict[str, Grid] = {
    "integer": IntegerGrid(bits=2),
    **{grid.type_name: grid for grid in (*IqGrid.examples(), *KQuantGrid.examples())},
    "e8p": E8pGrid(),
    "trellis": TrellisGrid(state_bits=10),
}
_FITTED = 1 << 21  # weights that are rounded to nearest
_SLOW = ("trellis",)  # grids whose refinement would take several times as long as all others together


def moments(columns: int) -> InputStatistics:
    """The statistics of as many tokens as columns."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1).sqrt() @ mix
    return InputStatistics(inputs.T @ inputs / columns, columns)


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """The seconds of the processor that a call takes, and its result."""
    start = process_time()
    result = work()
    return process_time() - start, result


def row(name: str, weight: Tensor, statistics: InputStatistics, factor: Tensor, base: list[float]) -> str:
    """A row of the table. The first one puts its times of GPTQ and refinement into `base`."""
    grid, (rows, columns) = GRIDS[name], weight.shape
    some = weight[: min(rows, _FITTED // columns // 64 * 64)]
    groups = some.unflatten(1, (-1, grid.group_of(columns)))
    RoundToNearest().solve(weight[:64], grid)  # compiles what numba compiles
    fit, params = timed(lambda: grid.fit(groups))
    if grid.tile_rows > 1:
        fit, _ = timed(lambda: grid.encode(groups, params))
    error = weight_error(some, RoundToNearest().solve(some, grid).dequantize())
    gptq, solved = timed(lambda: Sweep(weight, grid, torch.arange(columns), False).run(factor))
    cells = [name, f"{some.numel() / fit / 1e6:.2f}", f"{100 * error:.4f} %"]
    output = f"{100 * output_error(weight, solved.dequantize(), statistics):.4f} %"
    if name in _SLOW:
        return " | ".join([*cells, f"{gptq:.1f}", f"{gptq / base[0]:.2f}", output, "", "", ""])
    refine, refined = timed(lambda: Refine(passes=1).run(weight, solved, statistics))
    base.extend([gptq, refine])
    cells += [f"{gptq:.1f}", f"{gptq / base[0]:.2f}", output, f"{refine:.1f}", f"{refine / base[1]:.2f}"]
    return " | ".join([*cells, f"{100 * output_error(weight, refined.dequantize(), statistics):.4f} %"])


def main() -> None:
    """Measures and prints a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8960x1536", "1536x8960"])
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print({name: version(name) for name in ("torch", "numba", "gguf")}, flush=True)
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        statistics = moments(columns)
        took, factor = timed(lambda statistics=statistics: inverse_factor(statistics.second_moments, 0.01))
        print(f"\n{shape}, factor {took:.1f} s\n")
        print("| grid | fit M/s | error | GPTQ s | ratio | output | refine s | ratio | output |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
        base: list[float] = []
        for name in given.grids:
            print(f"| {row(name, weight, statistics, factor, base)} |", flush=True)


if __name__ == "__main__":
    main()
