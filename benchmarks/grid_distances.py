"""How far each grid stands above the rate-distortion bound, and how long it takes to code weights.

    python benchmarks/grid_distances.py MODEL --layers 7 --json grids.json --plot docs/results/grids.svg
    python benchmarks/grid_distances.py MODEL --layers 7 --kinds llama.cpp float        # names with one of these

Every grid rounds a million normal numbers in rows of 1,024, and layers of MODEL with random signs and a Hadamard matrix
on their inputs, to nearest. The bound for normal numbers of variance 1 at b bits is 4^-b; layers are compared with that
of their own rows' variances. Grids with super-blocks round the layers whose rows these divide. The true bits are those
of the stored arrays. Times are CPU seconds of one core: encoding (without the search of scales), and GPTQ for one layer
of 1,536 by 576 (grids with super-blocks: by 768), as a ratio to GPTQ on integers of the same bits with a scale a row.
`--plot` needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from gyroquant.grids import E8pGrid, FloatZeroGrid, Grid, IntegerGrid, IqGrid, KQuantGrid, TrellisGrid, stored_bits
from gyroquant.maps import hadamard
from gyroquant.models.stores.source import open_model
from gyroquant.rounding import InputStatistics
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest

_ROWS = {b: IntegerGrid(bits=b, group_size=-1, symmetric=True, midrise=True) for b in range(1, 9)}
_IQ = [("two_bits", 2, name) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S")]
_IQ += [("three_bits", 3, name) for name in ("IQ3_XXS", "IQ3_S")]
KINDS: dict[str, list[Grid]] = {
    "integer, groups of 64": [IntegerGrid(bits=b, group_size=64) for b in (2, 3, 4)],
    "integer, mid-rise, a scale a row": [_ROWS[b] for b in (1, 2, 3, 4)],
    "float zero points, groups of 64": [FloatZeroGrid(bits=b, group_size=64) for b in (2, 3, 4)],
    "K-quants of llama.cpp": [KQuantGrid(bits=b) for b in (2, 3, 4, 5)],
    "IQ types of llama.cpp": [
        *(IqGrid.model_validate({"bits": bits, key: name}) for key, bits, name in _IQ),
        KQuantGrid(four_bits="IQ4_XS"),
    ],
    "e8p": [E8pGrid(bits=b) for b in (2, 3, 4)],
    "trellis, 8 bits of state": [TrellisGrid(bits=b, state_bits=8) for b in (1, 2, 3, 4)],
    "trellis, 10 bits of state": [TrellisGrid(bits=b, state_bits=10) for b in (1, 2, 3, 4)],
    "trellis, 12 bits of state": [TrellisGrid(bits=b, state_bits=12) for b in (1, 2, 3, 4)],
}


def distance(grid: Grid, weights: list[Tensor]) -> tuple[float, float]:
    """True bits a weight, and the error in decibels above the bound, for matrices that are rounded on their own."""
    bits = error = least = 0.0
    weights = [weight for weight in weights if grid.for_columns(weight.shape[1]) is grid]
    count = sum(weight.numel() for weight in weights)
    for weight in weights:
        rounded = RoundToNearest().solve(weight, grid.with_tensor_scale(weight))
        bits += stored_bits(rounded.pack())
        error += float((rounded.dequantize() - weight).square().sum())
    for weight in weights:
        least += float(weight.square().sum()) * 4 ** (-bits / count)
    return bits / count, 10 * math.log10(error / least)


def speeds(grid: Grid, base: Grid) -> tuple[float, float]:
    """Million weights a second that are encoded, and the time of GPTQ relative to that on `base`."""
    columns = 576 if grid.super_block == 1 else 768
    weight = torch.randn(1536, columns, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4096, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.5, -0.5, columns)
    statistics = InputStatistics(x.T @ x, len(x))
    groups = weight.view(1536, -1, grid.group_of(columns))
    params = grid.fit(groups)
    grid.encode(groups[: grid.tile_rows], params[: grid.tile_rows])  # compiles what has to be compiled
    began = time.process_time()
    grid.encode(groups, params)
    encoded = time.process_time() - began
    taken: dict[Grid, list[float]] = {base: [], grid: []}
    for _ in range(3):
        for one in taken:
            began = time.process_time()
            Gptq().solve(weight, one, statistics)
            taken[one].append(time.process_time() - began)
    return weight.numel() / encoded / 1e6, median(taken[grid]) / median(taken[base])


def layers(model: str, count: int) -> list[Tensor]:
    """So many layers of a model's blocks, at even distances, rotated."""
    store, generator = open_model(model), torch.Generator().manual_seed(0)
    ops = [op for group in store.graph.blocks for op in group.linears if op.entry.quantize and not op.entry.stacked]
    chosen = ops[:: max(1, len(ops) // count)][:count]
    matrices = (op.to_matrix(store.read([op.weight])[op.weight].float()) for op in chosen)
    signs = (torch.randint(2, (op.in_features,), generator=generator) * 2.0 - 1 for op in chosen)
    return [hadamard(len(sign)).apply(matrix * sign) for matrix, sign in zip(matrices, signs, strict=True)]


def plot(found: list[dict[str, float | str]], target: Path) -> None:
    """Distances over true bits, one panel for normal numbers and one for layers."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    keys = [key for key in ("normal", "layers") if key in found[0]]
    figure, panels = plt.subplots(
        1, len(keys), figsize=(5.5 * len(keys), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, key in zip(panels[0], keys, strict=True):
        for kind in KINDS:
            rows = [row for row in found if row["grid"] == kind]
            panel.plot([row["true_bits"] for row in rows], [row[key] for row in rows], marker="o", label=kind)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axhline(1.53, color="gray", linestyle=":", linewidth=1)
        panel.set_title("normal numbers" if key == "normal" else "rotated layers", fontsize=10)
        panel.set_xlabel("true bits a weight")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("dB above the rate-distortion bound")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Measures, prints a table, and writes the files that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--kinds", nargs="+", default=[""])
    given = parser.parse_args()
    torch.set_num_threads(1)
    normal = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))]
    real = layers(given.model, given.layers) if given.model else []
    found: list[dict[str, float | str]] = []
    print("| grid | bits | true bits | normal, dB | layers, dB | million weights a second | GPTQ, to integers |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for kind, grids in KINDS.items():
        for grid in grids if any(part in kind for part in given.kinds) else ():
            true_bits, decibels = distance(grid, normal)
            row: dict[str, float | str] = {"grid": kind, "bits": grid.bits, "true_bits": true_bits, "normal": decibels}
            if real:
                row["layers"] = distance(grid, real)[1]
            row["encoded"], row["gptq"] = speeds(grid, _ROWS[grid.bits])
            found.append(row)
            cells = f"{grid.bits} | {true_bits:.3f} | {decibels:.2f} | {row.get('layers', math.nan):.2f}"
            print(f"| {kind} | {cells} | {row['encoded']:.2f} | {row['gptq']:.1f} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
