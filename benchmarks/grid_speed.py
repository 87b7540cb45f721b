"""Speed of grids on one thread: fitting scales, and GPTQ and refinement beside those on the integer grid.

    python benchmarks/grid_speed.py --shapes 1536x8960 8960x1536

Weights are normal numbers. Second moments are those of inputs with a few strong directions: a random orthogonal basis
whose variances fall as 1/k. Each layer is rounded once with each grid; ratios are to the 2-bit integer grid in the same
run. Seconds of GPTQ are those of the sweep. The factor of the second moments, which is the same for all grids, comes
beside it. `error` is that of the weights after fitting, `output` that of the layer's outputs after GPTQ, both squared
and relative, `refined` the latter after one pass of refinement.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from time import process_time

import torch
from torch import Tensor

from gyroquant.grids import E8pGrid, Grid, IntegerGrid, IqGrid, KQuantGrid, TrellisGrid
from gyroquant.grids.error import weight_error
from gyroquant.rounding import InputStatistics, Refine, output_error
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.solvers.gptq import Sweep
from gyroquant.rounding.solvers.rtn import RoundToNearest

GRIDS: dict[str, Grid] = {
    "integer": IntegerGrid(bits=2),
    **{grid.type_name: grid for grid in (*IqGrid.examples(), *KQuantGrid.examples())},
    "e8p": E8pGrid(),
    "trellis": TrellisGrid(state_bits=10),
}


def second_moments(columns: int) -> Tensor:
    """Second moments of inputs whose variances fall as 1/k along random directions; shape (columns, columns)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1).sqrt()
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = inputs @ mix
    return inputs.T @ inputs


def seconds(work: object) -> tuple[float, object]:
    """The time of one call, and its result."""
    start = process_time()
    result = work()  # type: ignore[operator]
    return process_time() - start, result


def main() -> None:
    """Measures and prints a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x8960", "8960x1536"])
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print({name: version(name) for name in ("torch", "numba", "gguf")}, flush=True)
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        statistics = InputStatistics(second_moments(columns), columns)
        took, factor = seconds(lambda gram=statistics.second_moments: inverse_factor(gram, 0.01))
        print(f"\n{shape}, factor {took:.1f} s")
        print("| grid | fit M/s | error | GPTQ s | ratio | output | refine s | ratio | refined |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
        base = None
        for name in given.grids:
            grid = GRIDS[name]
            some = weight[: max(grid.tile_rows, (1 << 21) // columns // 64 * 64)]
            groups = some.unflatten(1, (-1, grid.group_of(columns)))
            grid.encode(groups[: grid.tile_rows], grid.fit(groups[: grid.tile_rows]))  # compiles
            fit, params = seconds(lambda: grid.fit(groups))
            if grid.tile_rows > 1:  # what takes time there is the search of codes
                fit, _ = seconds(lambda: grid.encode(groups, params))
            error = weight_error(some, RoundToNearest().solve(some, grid).dequantize())
            gptq, solved = seconds(lambda: Sweep(weight, grid, torch.arange(columns), False).run(factor))
            single = "trellis" != name
            cells = [gptq]
            refined = solved
            refine = 0.0
            if single:
                refine, refined = seconds(lambda: Refine(passes=1).run(weight, solved, statistics))
            base = base or (gptq, refine)
            outs = [output_error(weight, q.dequantize(), statistics) for q in (solved, refined)]
            print(
                f"| {name} | {some.numel() / fit / 1e6:.2f} | {100 * error:.4f} % | {gptq:.1f} | {gptq / base[0]:.2f} | "
                f"{100 * outs[0]:.4f} % | {refine:.1f} | {refine / base[1]:.2f} | {100 * outs[1]:.4f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
