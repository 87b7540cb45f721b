"""GSR beside a whole Hadamard matrix at W2A16 and W2A4, as it is and as the start of learned rotations.

    python benchmarks/paper_tables/gsr_learned.py MODEL --calibration FILE --test FILE --out FOLDER

Weights asymmetric in groups of 64, GPTQ, activations asymmetric per token, R1 and R2 fused; calibration is 32 windows
of 512 tokens, evaluation the `bbt` preset in bfloat16. Learned are R1 and R2, at W2A16, on the weights alone (100
steps) or by cross-entropy with rounded weights (20 steps of 4 windows, where the papers take 100 of 8); blocks stay
blocks. Cells that are there already are not run again.
"""

from __future__ import annotations

import contextlib
import math

from cells import MissingCellError, Table, arguments, short, write

BASE = ["weights.bits=2", "weights.group_size=64", "weights.solver=gptq", "transform.R2.method=hadamard"]
CALIBRATION = ["calibration.nsamples=32", "calibration.seqlen=512"]
SETTINGS = {"W2A16": ["activations=null"], "W2A4": ["activations.bits=4"]}
STARTS = {"none": ("gptq", ["transform.R2=null"]), "GH": ("gh", []), "GSR": ("gsr", [])}
LEARNING: dict[str, list[str]] = {
    "as it is": [],
    "learned on the weights": ["learn.objective=weights", "learn.steps=100"],
    "learned by cross-entropy": [
        "learn.objective=cross_entropy",
        "learn.steps=20",
        "learn.batch_size=4",
        "learn.round_weights=true",
    ],
}
EVALUATIONS = {"bbt": {"preset": "bbt", "dtype": "bfloat16"}}


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--learning", nargs="+", choices=LEARNING, default=list(LEARNING))
    given = parser.parse_args()
    table = Table(given, EVALUATIONS)
    base = table.original()["evaluations"]["bbt"]["perplexity"]
    rows, data = [("original", "-", "-", short(base), "0", "-", "16")], []
    for setting, bits in SETTINGS.items():
        for start, (recipe, changes) in STARTS.items():
            for name, learn in LEARNING.items():
                if start not in given.starts or name not in given.learning:
                    continue
                if learn and (start == "none" or setting == "W2A4"):
                    continue
                options = [*BASE, *changes, *bits, *learn, *CALIBRATION]
                with contextlib.suppress(MissingCellError):
                    cell = table.cell(f"{setting} {start} {name}", recipe, options)
                    manifest, value = cell["manifest"], cell["evaluations"]["bbt"]["perplexity"]
                    learned = (manifest.get("learned") or {}).get("seconds")
                    took = "-" if learned is None else f"{learned / 60:.0f} min"
                    true_bits = manifest["bits"]["per_weight"]
                    rows.append(
                        (setting, start, name, short(value), f"{math.log(value / base):.3f}", took, f"{true_bits:.3f}")
                    )
                    data.append({"setting": setting, "start": start, "learning": name, "perplexity": value})
                    data[-1]["perplexity_interval"] = cell["evaluations"]["bbt"]["perplexity_interval"]
                    data[-1] |= {"bits": true_bits, "learning_seconds": learned, "proof": manifest["proof"]}
    header = ("setting", "R1", "", "ppl bbt", "ln gap", "learning took", "true bits")
    write(given.out, header, rows, base, data)


if __name__ == "__main__":
    main()
