"""MixQuant's figure: W4A4 perplexity by block size of R4 and the permutation in front of it; formats at blocks of 32.

    python benchmarks/paper_tables/mixquant.py MODEL --calibration FILE --test FILE --out FOLDER

Weights are symmetric per row, activations asymmetric per token (the paper's INT4); evaluation is the `bbt` preset in
bfloat16. Rounding to nearest takes every block size, permutation and format, with permutations measured on 8 windows of
512 tokens. Qronos, GPTQ towards a share of Qronos's answer (`target`) and, when asked for, GPTQ itself take the cells
that decide, on 32 windows. Cells that are there already are not run again.
"""

from __future__ import annotations

import contextlib
import json
import math

from cells import MissingCellError, Table, arguments, short, write

BLOCKS = ("full", 16, 32, 64, 128, 256, 512)
PERMUTATIONS = {
    "none": None,
    "random": "random_permutation",
    "zigzag": "zigzag",
    "absmax": "absmax",
    "MassDiff": "massdiff",
}
DECIDING = {(block, name) for block in (16, 32) for name in ("none", "MassDiff")} | {("full", "none")}
FORMATTED = ((32, "none"), (32, "MassDiff"), ("full", "none"))
FORMATS = {
    "INT4": [],
    "MXFP4": ["weights.grid=mxfp4", "activations.grid=mxfp4"],
    "FP4": ["weights.grid=fp4", "weights.group_size=-1", "activations.grid=fp4", "activations.scale=minmax"],
}
WINDOWS = {"rtn": 8, "qronos": 32, "gptq": 32, "target": 32}
OPTIONS = {
    "rtn": ["weights.solver=rtn"],
    "qronos": ["weights.solver={name: qronos, alpha: 1.0e-3, act_order: true}"],
    "gptq": ["weights.solver=gptq"],
    "target": ["weights.solver={name: gptq, act_order: true}", "weights.target={share: auto}"],
}
LABELS = {"target": "GPTQ, target"}
EVALUATIONS = {"bbt": {"preset": "bbt", "dtype": "bfloat16"}}


def rotation(block: int | str, permutation: str | None) -> str:
    """The steps at R4 as a value of --set."""
    steps = [] if permutation is None or block == "full" else [{"method": permutation, "block": block}]
    return json.dumps([*steps, {"method": "hadamard", "block": block}])


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    parser.add_argument("--solvers", nargs="+", choices=WINDOWS, default=["rtn", "qronos", "target"])
    given = parser.parse_args()
    table = Table(given, EVALUATIONS)
    base = table.original()["evaluations"]["bbt"]["perplexity"]
    found: dict[tuple[str, object, str, str], dict] = {}

    def run(solver: str, block: int | str, name: str, form: str) -> None:
        changes = [*OPTIONS[solver], f"transform.R4={rotation(block, PERMUTATIONS[name])}"]
        changes += [f"calibration.nsamples={WINDOWS[solver]}", "calibration.seqlen=512"]
        with contextlib.suppress(MissingCellError):
            cell = table.cell(f"{form} {solver} {block} {name}", "perq", [*changes, *FORMATS[form]])
            found[solver, block, name, form] = cell

    for solver in given.solvers:
        for block in BLOCKS:
            for name in PERMUTATIONS:
                if (block != "full" or name == "none") and (solver == "rtn" or (block, name) in DECIDING):
                    run(solver, block, name, "INT4")
        for form in ("MXFP4", "FP4") if solver == "rtn" else ():
            for block, name in FORMATTED:
                run(solver, block, name, form)
    rows, data = [("original", "-", "-", "-", short(base), "0", "-", "16")], []
    for (solver, block, name, form), cell in found.items():
        value = cell["evaluations"]["bbt"]["perplexity"]
        full = found.get((solver, "full", "none", form), {}).get("evaluations", {}).get("bbt", {}).get("perplexity")
        bits = cell["manifest"]["bits"]["per_weight"]
        proof = cell["manifest"]["proof"]["relative_logit_error"]
        label = (form, LABELS.get(solver, solver.upper()), str(block), name)
        gap, share = f"{math.log(value / base):.3f}", f"{100 * full / value:.0f} %" if full else "-"
        rows.append((*label, short(value), gap, share, f"{bits:.3f}"))
        data.append(dict(zip(("format", "solver", "block", "permutation"), label, strict=True)))
        interval = cell["evaluations"]["bbt"]["perplexity_interval"]
        data[-1] |= {"perplexity": value, "perplexity_interval": interval, "bits": bits, "proof": proof}
    header = ("format", "solver", "block", "permutation", "ppl bbt", "ln gap", "of the full rotation's", "true bits")
    write(given.out, header, rows, base, data)


if __name__ == "__main__":
    main()
