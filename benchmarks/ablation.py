"""What each ingredient of our own recipes adds, alone and on top of the others, at 2 bits or others.

    python benchmarks/ablation.py MODEL --calibration FILE --test VALIDATION --out FOLDER [--bits 2] [--dtype float32]
        [--rows ROW ...]

Choices are made on this table, so `--test` is validation text, never the text that results are reported on. Weights
asymmetric in groups of 64, 32 windows of 512 tokens to calibrate where a row does not say otherwise, 8 windows of 1,024
to measure, in bfloat16 (`--dtype float32` where the processor has none), with divergence from the original beside
perplexity. Cells that are there are not run again.
"""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "paper_tables"))
from cells import MissingCellError, Table, arguments, short, write

SIGNS = "{method: hadamard, random_signs: true}"
FUSED = [f"transform.R1={SIGNS}", f"transform.R2={SIGNS}"]
ROTATE = [*FUSED, f"transform.R4={SIGNS}"]
LOCAL = ["transform.R1={method: walsh, block: group}", *ROTATE[1:]]
TARGET = ["weights.target={share: auto}"]
REFINE = ["weights.refine={passes: 2}"]
STATIC = ["weights.solver.static_groups=true"]
TUNE = ["weights.tune={iters: 50, batch_size: 4}"]
FINETUNE = ["finetune={steps: 40, batch_size: 4}"]
BEST = [*ROTATE, *TARGET, *REFINE]
MIDRISE = ["weights.symmetric=true", "weights.midrise=true"]
ROWWISE = [*BEST, *MIDRISE, "weights.group_size=-1"]
ALLOCATE = ["weights.allocate={budget: 2.29, bits: [2, 3], nsamples: 2}"]
GUIDED = ["weights.guided={groups: 1}"]
TOKENS = ["weights.guided={groups: 1, kronecker: tokens}"]
UNWEIGHTED = ["weights.guided={groups: 1, power: 0, kronecker: tokens}"]
SEQUENCES = ["weights.guided={groups: 1, kronecker: sequences}"]
RTN = ["weights.solver=rtn", "weights.measure=true"]
SIGNROUND = ["weights.solver=rtn", "weights.scale=minmax", "weights.tune={iters: 50, batch_size: 8}"]
ROWS: dict[str, list[str]] = {
    "RTN": RTN,
    "SignRound (50 steps)": SIGNROUND,
    "SignRound (50 steps), scales searched": [*SIGNROUND, "weights.tune.search_scales=true"],
    "SignRound (50 steps), 0.1 % of errors left out": [*SIGNROUND, "weights.tune.outliers=0.001"],
    "SignRound (50 steps), both (SignRoundV2)": [
        *SIGNROUND,
        "weights.tune.search_scales=true",
        "weights.tune.outliers=0.001",
    ],
    "GPTQ": [],
    "GPTQ + rotate": ROTATE,
    "GPTQ + target": TARGET,
    "GPTQ + refine": REFINE,
    "GPTQ + guided": GUIDED,
    "GPTQ + guided, outputs too (YAQA, tokens)": TOKENS,
    "GPTQ + guided, outputs too (YAQA, sequences)": SEQUENCES,
    "GPTQ + outputs (K-FAC)": UNWEIGHTED,
    "GPTQ + tune": TUNE,
    "GPTQ + finetune": FINETUNE,
    "rotate + target": [*ROTATE, *TARGET],
    "rotate + refine": [*ROTATE, *REFINE],
    "rotate + guided, outputs too (YAQA, tokens)": [*ROTATE, *TOKENS],
    "rotate + outputs (K-FAC)": [*ROTATE, *UNWEIGHTED],
    "rotate + guided, outputs too (YAQA, sequences)": [*ROTATE, *SEQUENCES],
    "rotate + target + guided, outputs too (YAQA, tokens)": [*ROTATE, *TARGET, *TOKENS],
    "rotate + target + outputs (K-FAC)": [*ROTATE, *TARGET, *UNWEIGHTED],
    "rotate + target + refine": BEST,
    "the same, scales fitted before (LDLQ)": [*BEST, *STATIC],
    "the same, R1 R2 only": [*FUSED, *TARGET, *REFINE],
    "the same, R1 in blocks (GSR)": [*LOCAL, *TARGET, *REFINE],
    "the same, 128 windows": [*BEST, "calibration.nsamples=128"],
    "the same, midrise": [*BEST, *MIDRISE],
    "the same, midrise, a scale a row": ROWWISE,
    "the same, midrise, a scale a row, 2 and 3 bits": [*ROWWISE, *ALLOCATE],
    "rotate + target + refine + tune": [*BEST, *TUNE],
    "rotate + target + refine + finetune": [*BEST, *FINETUNE],
    "rotate + target + refine + tune + finetune": [*BEST, *TUNE, *FINETUNE],
    "rotate + target + refine + finetune, 160 steps": [*BEST, "finetune={steps: 160, batch_size: 4}"],
}


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="what the measurement computes in")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    given = parser.parse_args()
    measure = {"window": 1024, "windows": 8, "dtype": given.dtype, "against": given.model}
    table = Table(given, {"validation": measure})
    base = table.original()["evaluations"]["validation"]["perplexity"]
    size = [f"weights.bits={given.bits}", "weights.group_size=64", "calibration.nsamples=32", "calibration.seqlen=512"]
    rows, data = [], []
    for name in given.rows:
        with contextlib.suppress(MissingCellError):
            cell = table.cell(f"W{given.bits} {name}", "gptq", [*size, *ROWS[name]])
            scores, manifest = cell["evaluations"]["validation"], cell["manifest"]
            value, bits, seconds = scores["perplexity"], manifest["bits"]["per_weight"], manifest["seconds"]
            low, high = scores["perplexity_interval"]
            limits = [layer["rate_distortion"]["decibels"] for layer in manifest["layers"]]
            above = f"{sum(limits) / len(limits):.1f} dB"
            gap, minutes = f"{math.log(value / base):.3f}", f"{seconds / 60:.1f}"
            line = (name, short(value), f"{short(low)} to {short(high)}", gap, f"{scores['kl']:.3f}", above)
            rows.append((*line, f"{bits:.3f}", minutes))
            data.append({"cell": name, "perplexity": value, "perplexity_interval": [low, high], "kl": scores["kl"]})
            data[-1] |= {"kl_interval": scores["kl_interval"], "bits": bits, "seconds": seconds}
            data[-1]["decibels_above_limit"] = {
                layer["name"]: layer["rate_distortion"]["decibels"] for layer in manifest["layers"]
            }
    header = (f"W{given.bits} g64", "perplexity", "95 %", "ln gap", "KL", "above the limit", "true bits", "minutes")
    write(given.out, header, rows, base, data)


if __name__ == "__main__":
    main()
