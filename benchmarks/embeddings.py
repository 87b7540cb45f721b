"""What rounding the embedding and the head costs: bits from 2 to 8, tied and not, rows or groups of 64.

    python benchmarks/embeddings.py MODEL --calibration FILE --test VALIDATION --out FOLDER [--rows ROW ...]

Choices are made on this table, so `--test` is validation text. The layers of the blocks stay as they are (one small one
is rounded, to 8 bits, because a recipe must round something), rotated with Hadamards on R1 and R2. 16 windows of 512
tokens to calibrate, 8 windows of 1,024 to measure, in bfloat16, with divergence from the original beside perplexity.
Cells that are there are not run again.
"""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "paper_tables"))
from cells import MissingCellError, Table, arguments, short, write

ROTATE = ["transform.R1={method: hadamard, random_signs: true}", "transform.R2={method: hadamard, random_signs: true}"]
KEPT = r"re:^(?!model.layers.0.self_attn.k_proj$)(?!lm_head$).*"
ALONE = ["weights.bits=8", "weights.group_size=64", "weights.symmetric=true", "weights.refine={passes: 2}"]
ALONE += ["calibration.nsamples=16", "calibration.seqlen=512"]
TIED = [*ROTATE, *ALONE, f'weights.ignore=["{KEPT}", "lm_head"]', "keep_ties=true"]
UNTIED = [*ROTATE, *ALONE]
ROWS_OF = {"a scale a row": "group_size: -1, symmetric: true, midrise: true", "groups of 64": "group_size: 64"}


def rows() -> dict[str, list[str]]:
    """Every row of the table, with its changes of the recipe."""
    found: dict[str, list[str]] = {}
    for bits in (8, 7, 6, 5, 4, 3, 2):
        for name, options in ROWS_OF.items():
            found[f"tied, {bits} bits, {name}"] = [*TIED, f"embeddings={{bits: {bits}, scale: mse, {options}}}"]
    for bits in (8, 7, 6, 5, 4, 3, 2):
        grid = f"bits: {bits}, group_size: 64, scale: mse"
        kept = f'weights.ignore=["{KEPT}", "lm_head"]'
        wide = "head={bits: 8, group_size: 64}"
        found[f"embedding, {bits} bits, groups of 64, head 8 bits"] = [*UNTIED, kept, f"embeddings={{{grid}}}", wide]
        head = f"weights.overrides=[{{layers: [lm_head], {grid}, symmetric: false}}]"
        found[f"head alone, {bits} bits, groups of 64"] = [*UNTIED, f'weights.ignore=["{KEPT}"]', head]
    return found


def main() -> None:
    """Runs what is missing and writes table.md and table.json."""
    choices = rows()
    parser = arguments(__doc__)
    parser.add_argument("--rows", nargs="+", choices=choices, default=list(choices), metavar="ROW")
    given = parser.parse_args()
    measure = {"window": 1024, "windows": 8, "dtype": "bfloat16", "against": given.model}
    table = Table(given, {"validation": measure})
    base = table.original()["evaluations"]["validation"]["perplexity"]
    lines, data = [], []
    for name in given.rows:
        with contextlib.suppress(MissingCellError):
            cell = table.cell(name, "gptq", choices[name])
            scores, manifest = cell["evaluations"]["validation"], cell["manifest"]
            value, (low, high) = scores["perplexity"], scores["perplexity_interval"]
            stored = manifest["bits"].get("embeddings") or manifest["bits"]
            loss = f"{100 * math.expm1(math.log(value / base)):+.2f} %"
            kl = f"{scores['kl']:.4f} ({scores['kl_interval'][0]:.4f} to {scores['kl_interval'][1]:.4f})"
            lines.append(
                (name, short(value), f"{short(low)} to {short(high)}", loss, kl, f"{stored['per_weight']:.3f}")
            )
            data.append({"cell": name, "perplexity": value, "perplexity_interval": [low, high], "kl": scores["kl"]})
            data[-1] |= {"kl_interval": scores["kl_interval"], "bits": stored["per_weight"]}
    header = ("table", "perplexity", "95 %", "more than the original", "KL (95 %)", "true bits of the table")
    write(given.out, header, lines, base, data)


if __name__ == "__main__":
    main()
