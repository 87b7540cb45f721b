"""What add-ons of systems that build on SpinQuant gain: each with and without, rotated and not, at true bits.

    python benchmarks/systems.py MODEL --calibration FILE --test VALIDATION --out FOLDER [--rows ROW ...]

Choices are made on this table, so `--test` is validation text. Rows of weights have 2 bits in asymmetric groups and
GPTQ; rows of weights and activations are rounded to nearest in NVFP4; rows of inputs have 4-bit weights and GPTQ. 16
windows of 512 tokens to calibrate, 4 windows of 1,024 to measure. Embedding and head stay in 16 bits. Rotated:
randomised Hadamards on R1 and R2, and on R4. Cells that are there are not run again.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "paper_tables"))
from cells import MissingCellError, Table, arguments, short, write

TEXT = ["calibration.nsamples=16", "calibration.seqlen=512"]
ROTATED = [f"transform.{site}={{method: hadamard, random_signs: true}}" for site in ("R1", "R2", "R4")]
WEIGHTS = ["weights.bits=2", *TEXT]
BRANCH = "weights.low_rank={{rank: 4, position: {}, metric: hessian}}"
BITS = (  # 2.281 true bits are those of two bits for every weight
    "weights.allocate={{budget: 2.6, bits: [2, 3, 4], nsamples: 16, costs: gradient, granularity: {}}}"
)
ADD_ONS: dict[str, list[str]] = {
    "none": [],
    "low rank 4, after": [BRANCH.format("after")],
    "low rank 4, inside": [BRANCH.format("inside")],
    "groups of 32": ["weights.group_size=32"],
    "bits by layer": [BITS.format("layers")],
    "bits by row": [BITS.format("rows")],
    "windows by coverage": ["calibration.choose=coverage"],
    "windows by the model": ["calibration.source=self"],
}
BOTH: dict[str, list[str]] = {
    name: [f"weights={grid}", f"activations={grid}", *TEXT]
    for name, grid in (
        ("NVFP4", "{grid: nvfp4, scale: minmax}"),
        ("NVFP4, four over six", "{grid: nvfp4, scale: four_over_six}"),
        ("IF4", "{grid: if4, scale: minmax}"),
        ("NVFP4, least squares", "{grid: nvfp4, scale: mse}"),
    )
}
PLAIN = "{bits: 4, group_size: -1, scale: minmax}"
INPUTS = {  # of weights in 4 bits
    "A4": f"activations={PLAIN}",
    "A5": f"activations={PLAIN.replace('4', '5')}",
    "an eighth in 8 bits": "activations={grid: leading, bits: 4, group_size: -1, scale: minmax}",
}
LEADING = ["transform.R1={method: leading}", "transform.R2={method: leading}", ROTATED[2]]
BLOCKS = [
    f"transform.{site}={{method: wush, block: 16, online: true}}" for site in ("attn_in", "mlp_in", "attn_out", "R4")
]
SPREAD = [step.replace("wush", "hadamard") for step in BLOCKS]


def rows() -> dict[str, tuple[str, list[str]]]:
    """Every row of the table: a recipe and its changes."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, changes in ADD_ONS.items():
        for turned, maps in (("rotated", ROTATED), ("unrotated", [])):
            found[f"W2, {turned}, {name}"] = ("gptq", [*WEIGHTS, *maps, *changes])
    for name, changes in BOTH.items():
        for turned, maps in (("rotated", ROTATED), ("unrotated", [])):
            found[f"W4A4, {turned}, {name}"] = ("rtn", [*changes, *maps])
    for name, change in INPUTS.items():
        maps = LEADING if "eighth" in name else ROTATED
        found[f"W4, rotated, inputs: {name}"] = ("gptq", ["weights.bits=4", *TEXT, *maps, change])
    found["W4A4, WUSH in blocks of 16, NVFP4"] = ("rtn", [*BOTH["NVFP4"], *BLOCKS])
    found["W4A4, Hadamards in blocks of 16, NVFP4"] = ("rtn", [*BOTH["NVFP4"], *SPREAD])
    return found


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    choices = rows()
    parser = arguments(__doc__)
    parser.add_argument("--rows", nargs="+", choices=choices, default=list(choices), metavar="ROW")
    given = parser.parse_args()
    table = Table(given, {"validation": {"window": 1024, "windows": 4, "against": given.model}})
    base = table.original()["evaluations"]["validation"]["perplexity"]
    lines, data = [], []
    for name in given.rows:
        with contextlib.suppress(MissingCellError):
            cell = table.cell(name, *choices[name])
            scores, manifest = cell["evaluations"]["validation"], cell["manifest"]
            low, high = scores["kl_interval"]
            bits, size = manifest["bits"]["per_weight"], manifest["bits"]["bytes"]["total"] / 1e6
            kl = f"{scores['kl']:.3f} ({low:.3f} to {high:.3f})"
            lines.append((name, f"{bits:.3f}", f"{size:.1f}", short(scores["perplexity"]), kl))
            data.append({"cell": name, "bits": bits, "megabytes": size, "kl": scores["kl"], "kl_interval": [low, high]})
            data[-1] |= {"perplexity": scores["perplexity"]}
    write(given.out, ("row", "true bits", "MB", "perplexity", "KL (95 %)"), lines, base, data)


if __name__ == "__main__":
    main()
