"""SpinQuant's table: W4A8, W4A4 and W4A4KV4 without rotations, with random ones over ten seeds, and with learned ones.

    python benchmarks/paper_tables/spinquant.py MODEL --calibration FILE --test FILE --out FOLDER

Weights are symmetric per row, activations asymmetric per token; calibration is 32 windows of 512 tokens, evaluation the
`bbt` preset in bfloat16. Random rotations (all fused) take ten seeds at W4A4KV4 with rounding to nearest, one
elsewhere; at W4A4 and at W4A8, where little is at stake, only a part is run. Rotations are learned in 25 steps of 4
windows (the paper: 100 of 8) at W4A4KV4 with full weights, once for both solvers, which is the paper's way in front of
GPTQ, and for W4A4; what it took is given in minutes and in passes of the model over the calibration text. Cells that
are there already are not run again. Draw the seeds with seeds_plot.py.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator

from cells import MissingCellError, Table, arguments, short, write

SETTINGS = {
    "W4A4KV4": ["activations.bits=4", "kv_cache.bits=4"],
    "W4A4": ["activations.bits=4", "kv_cache=null"],
    "W4A8": ["activations.bits=8", "kv_cache=null"],
}
CALIBRATION = ["calibration.nsamples=32", "calibration.seqlen=512"]
FUSED = ["transform.R3=null", "transform.R4=null"]
RANDOM = ["learn=null"]
ORTHOGONAL = [*RANDOM, "transform.R1={method: orthogonal}", "transform.R2={method: orthogonal}"]
NONE = [*RANDOM, *FUSED, "transform.R1=null", "transform.R2=null"]
LEARN = ["learn.steps=25", "learn.batch_size=4", "learn.round_weights=false"]
VARIANTS: dict[str, list[str]] = {
    "none": NONE,
    "random orthogonal": [*ORTHOGONAL, *FUSED],
    "random Hadamard": [*RANDOM, *FUSED],
    "random Hadamard, R3, R4": RANDOM,
    "no_had (learned)": [*FUSED, *LEARN],
    "had (learned)": LEARN,
}
PARTS = {
    ("W4A4", "gptq"): ("none", "random Hadamard, R3, R4", "had (learned)"),
    ("W4A8", "rtn"): ("none", "random Hadamard", "random Hadamard, R3, R4"),
    ("W4A8", "gptq"): ("none", "random Hadamard, R3, R4"),
}
LEARNED = "W4A4KV4"
SEEDED = {(LEARNED, "rtn", name) for name in ("random orthogonal", "random Hadamard")}
EVALUATIONS = {"bbt": {"preset": "bbt", "dtype": "bfloat16"}}


def runs(table: Table, setting: str, solver: str, name: str, seeds: int) -> Iterator[tuple[int, dict]]:
    """Seed and cell of every run of a row."""
    options = [*SETTINGS[setting], *CALIBRATION, f"weights.solver={solver}"]
    if not name.endswith("(learned)"):
        for seed in range(seeds if (setting, solver, name) in SEEDED else 1):
            changes = [*VARIANTS[name], *options, f"seed={seed}"]
            yield seed, table.cell(f"{setting} {solver} {name} {seed}", "spinquant", changes)
        return
    file = table.folder / f"{LEARNED}-{name.split()[0]}.safetensors"
    if (setting, solver) == (LEARNED, "rtn"):
        yield 0, table.cell(f"{setting} rtn {name}", "spinquant", [*VARIANTS[name], *options], file)
        return
    stored = [f"transform.{site}={{method: stored, file: {file}}}" for site in ("R1", "R2")]
    online = FUSED if name.startswith("no_had") else []
    yield 0, table.cell(f"{setting} {solver} {name}", "spinquant", [*RANDOM, *stored, *online, *options])


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--solvers", nargs="+", choices=("rtn", "gptq"), default=["rtn", "gptq"])
    given = parser.parse_args()
    table = Table(given, EVALUATIONS)
    base = table.original()["evaluations"]["bbt"]["perplexity"]
    unit = table.forward_pass(CALIBRATION)
    rows, data = [("original", "-", "-", short(base), "-", "0", "-", "16")], []
    for setting in given.settings:
        for solver in given.solvers:
            for name in PARTS.get((setting, solver), VARIANTS):
                values, true_bits, took = [], 0.0, "-"
                with contextlib.suppress(MissingCellError):
                    for seed, cell in runs(table, setting, solver, name, given.seeds):
                        values.append(cell["evaluations"]["bbt"]["perplexity"])
                        true_bits = cell["manifest"]["bits"]["per_weight"]
                        seconds = (cell["manifest"]["learned"] or {}).get("seconds")
                        took = took if seconds is None else f"{seconds / 60:.1f} min, {seconds / unit:.0f} passes"
                        data.append({"setting": setting, "solver": solver, "rotation": name, "seed": seed})
                        data[-1] |= {"perplexity": values[-1], "bits": true_bits, "learning_seconds": seconds}
                        data[-1]["perplexity_interval"] = cell["evaluations"]["bbt"]["perplexity_interval"]
                if not values:
                    continue
                middle = statistics.median(values)
                input_error_second_moments = f"{short(min(values))} to {short(max(values))}" if len(values) > 1 else "-"
                gap = f"{math.log(middle / base):.3f}"
                rows.append(
                    (
                        setting,
                        solver.upper(),
                        name,
                        short(middle),
                        input_error_second_moments,
                        gap,
                        took,
                        f"{true_bits:.3f}",
                    )
                )
    header = ("setting", "solver", "rotation", "ppl bbt (median)", "over seeds", "ln gap", "learning", "true bits")
    write(given.out, header, rows, base, data)


if __name__ == "__main__":
    main()
