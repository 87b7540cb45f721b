"""GSR's table: {RTN, GPTQ} x {none, GH, GW, LH, GSR, GSR + R2} at 2 and 3 bits, perplexities beside true bits.

    python benchmarks/paper_tables/gsr.py MODEL --calibration FILE --test FILE --out FOLDER

Calibration is 128 windows of 512 tokens. Cells that are there already are not run again.
"""

from __future__ import annotations

import contextlib
import math

from cells import MissingCellError, Table, arguments, short, write

ROTATIONS = {
    "none": "gptq",
    "GH": "gh",
    "GW": "gw",
    "LH": "lh",
    "GSR": "gsr",
    "GSR + R2": "gsr",
}
EVALUATIONS = {"bbt": {"preset": "bbt"}, "standard": {"preset": "standard", "windows": 40, "dtype": "bfloat16"}}
"""The longer evaluation runs in bfloat16, at half the time: the original's perplexity moves by less than 0.1 %."""


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    given = parser.parse_args()
    table = Table(given, EVALUATIONS)
    base = table.original()["evaluations"]
    rows, data = [("original", "-", *_scores(base, base), "16")], []
    for bits in given.bits:
        for solver in ("rtn", "gptq"):
            for rotation, recipe in ROTATIONS.items():
                changes = [f"weights.bits={bits}", "weights.group_size=64", f"weights.solver={solver}"]
                if rotation.endswith("R2"):
                    changes.append("transform.R2.method=hadamard")
                with contextlib.suppress(MissingCellError):
                    cell = table.cell(f"w{bits} {solver} {rotation}", recipe, changes)
                    manifest = cell["manifest"]
                    label = f"W{bits}A16 g64 {solver.upper()}, {rotation}"
                    error = manifest["proof"]["relative_logit_error"]
                    proof = f"{error:.1e}" if manifest["proof"]["tokens"] else "-"
                    true_bits = manifest["bits"]["per_weight"]
                    rows.append((label, proof, *_scores(cell["evaluations"], base), f"{true_bits:.3f}"))
                    data.append({"cell": label, "bits": true_bits, "proof": error} | cell["evaluations"])
    header = ("SmolLM2-135M-Instruct", "proof", "ppl bbt", "ln gap", "ppl standard, 40 windows", "ln gap", "true bits")
    write(given.out, header, rows, base, data)


def _scores(found: dict, base: dict) -> list[str]:
    cells = []
    for name in EVALUATIONS:
        value = found[name]["perplexity"]
        cells += [short(value), f"{math.log(value) - math.log(base[name]['perplexity']):.3f}"]
    return cells


if __name__ == "__main__":
    main()
