"""BBT's table: 2 bits with and without its modes at honest bits, with vanilla at smaller groups and 3 bits beside it.

    python benchmarks/paper_tables/bbt.py MODEL --calibration FILE --test FILE --out FOLDER

Weights only, asymmetric, GPTQ, 32 windows of 512 tokens, the `bbt` evaluation preset in bfloat16. Cells that are there
already are not run again.
"""

from __future__ import annotations

import contextlib
import math

from cells import MissingCellError, Table, arguments, short, write

CALIBRATION = ["calibration.nsamples=32", "calibration.seqlen=512"]
SITES = ("attn_in", "mlp_in", "R4")
PAPER = [f"transform.{site}.energy=paper" for site in SITES]
PAD, CODE = "weights.basis.padding=pad", "weights.basis.energy=kept"
ROWS: dict[str, tuple[str, list[str]]] = {
    "vanilla, W2 g64": ("gptq-w2g64", []),
    "vanilla, W2 g32": ("gptq-w2g32", []),
    "vanilla, W2 g16": ("gptq-w2g16", []),
    "vanilla, W3 g64": ("gptq-w3g64", []),
    "spectral basis, W2 g64": ("bbt-spectral", []),
    "spectral basis, padded, W2 g64": ("bbt-spectral", [PAD]),
    "spectral basis, padded, tail unscaled, W2 g64": ("bbt-spectral", [PAD, CODE]),
    "spectral basis, W3 g64": ("bbt-spectral", ["weights.bits=3"]),
    "absorbed scales, W2 g64": ("bbt-absorbed", []),
    "absorbed scales as published, W2 g64": ("bbt-absorbed", PAPER),
    "pair-PCA, W2 g64": ("pair-pca", []),
    "vanilla, W4 g64": ("gptq-w4g64", []),
    "spectral basis, W4 g64": ("bbt-spectral", ["weights.bits=4"]),
    "pair-PCA, W4 g64": ("pair-pca", ["weights.bits=4"]),
}
for _alpha in (0, 0.25, 1.0):
    ROWS[f"spectral basis, alpha {_alpha}, W2 g64"] = ("bbt-spectral", [f"weights.basis.alpha={_alpha}"])
EVALUATIONS = {"bbt": {"preset": "bbt", "dtype": "bfloat16"}}


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    parser = arguments(__doc__)
    given = parser.parse_args()
    table = Table(given, EVALUATIONS)
    base = table.original()["evaluations"]["bbt"]["perplexity"]
    rows, data = [("original", "-", short(base), "0", "16")], []
    for name, (recipe, changes) in ROWS.items():
        with contextlib.suppress(MissingCellError):
            cell = table.cell(name, recipe, [*changes, *CALIBRATION])
            scores, manifest = cell["evaluations"]["bbt"], cell["manifest"]
            value, interval = scores["perplexity"], scores["perplexity_interval"]
            proof = manifest["proof"]["relative_logit_error"] if manifest["proof"]["tokens"] else None
            proved, bits = "-" if proof is None else f"{proof:.1e}", manifest["bits"]["per_weight"]
            rows.append((name, proved, short(value), f"{math.log(value / base):.3f}", f"{bits:.3f}"))
            data.append({"cell": name, "perplexity": value, "perplexity_interval": interval})
            data[-1] |= {"bits": bits, "proof": proof}
    header = ("SmolLM2-135M-Instruct", "proof", "ppl bbt", "ln gap", "true bits")
    write(given.out, header, rows, base, data)


if __name__ == "__main__":
    main()
