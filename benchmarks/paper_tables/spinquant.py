"""SpinQuant's table: W4A8, W4A4 and W4A4KV4 without rotations, with random ones over many seeds, and with learned ones.

    python benchmarks/paper_tables/spinquant.py MODEL --calibration FILE --test FILE --out FOLDER

Weights are symmetric per row, activations asymmetric per token; calibration is 64 windows of 512 tokens, rotations are
learned in 100 steps of 8 windows, evaluation is the `bbt` preset. Random rotations take ten seeds with rounding to
nearest. Cells that are there already are not run again.
"""

from __future__ import annotations

import math
import statistics

from cells import Table, arguments, short, write

SETTINGS = {
    "W4A8": ["activations.bits=8", "kv_cache=null"],
    "W4A4": ["activations.bits=4", "kv_cache=null"],
    "W4A4KV4": ["activations.bits=4", "kv_cache.bits=4"],
}
CALIBRATION = ["calibration.nsamples=64", "calibration.seqlen=512"]
FUSED = ["transform.R3=null", "transform.R4=null"]
RANDOM = ["learn=null"]
ORTHOGONAL = [*RANDOM, "transform.R1={method: orthogonal}", "transform.R2={method: orthogonal}"]
NONE = [*RANDOM, *FUSED, "transform.R1=null", "transform.R2=null"]
VARIANTS: dict[str, tuple[list[str], int]] = {
    "none": (NONE, 1),
    "random orthogonal": ([*ORTHOGONAL, *FUSED], 10),
    "random Hadamard": ([*RANDOM, *FUSED], 10),
    "random Hadamard, R3, R4": (RANDOM, 10),
    "no_had (learned)": (FUSED, 1),
    "had (learned)": ([], 1),
}
EVALUATIONS = {"bbt": {"preset": "bbt"}}


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    table = Table(given.out / "cells", given.model, given.calibration, given.test, EVALUATIONS)
    base = table.original()["evaluations"]["bbt"]["perplexity"]
    rows, data = [("original", "-", "-", short(base), "-", "0", "16")], []
    for setting, bits in SETTINGS.items():
        for solver in ("rtn", "gptq"):
            for name, (changes, seeds) in VARIANTS.items():
                values, true_bits = [], 0.0
                for seed in range(min(seeds, given.seeds) if solver == "rtn" else 1):
                    options = [*changes, *bits, *CALIBRATION, f"weights.solver={solver}", f"seed={seed}"]
                    cell = table.cell(f"{setting} {solver} {name} {seed}", "spinquant", options)
                    values.append(cell["evaluations"]["bbt"]["perplexity"])
                    true_bits = cell["manifest"]["bits"]["per_weight"]
                    learned = cell["manifest"].get("learned") or {}
                    data.append({"setting": setting, "solver": solver, "rotation": name, "seed": seed})
                    data[-1] |= {"perplexity": values[-1], "bits": true_bits, "learning": learned.get("seconds")}
                middle = statistics.median(values)
                spread = f"{short(min(values))} to {short(max(values))}" if len(values) > 1 else "-"
                gap = f"{math.log(middle / base):.3f}"
                rows.append((setting, solver.upper(), name, short(middle), spread, gap, f"{true_bits:.3f}"))
    header = ("setting", "solver", "rotation", "ppl bbt (median)", "over seeds", "ln gap", "true bits")
    write(given.out, header, rows, base, data)


if __name__ == "__main__":
    main()
