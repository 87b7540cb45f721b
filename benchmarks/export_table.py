"""Every format by every kind of recipe: refused and why, or how far the program that opens it is from us, and how fast.

    python benchmarks/export_table.py MODEL --text FILE --test FILE --out FOLDER [--recipes NAME ...] [--formats ...]

Rounds MODEL to nearest for each recipe on a grid of its own (transforms proved on `--text`; what is compared is the
file, not its quality), and by the recipes of four papers on a small calibration set, writes each format that holds it
and verifies it on two windows of 256 tokens of `--test`. What stands in FOLDER/results.json is not run again, except
speed and memory with `--speed`: they need a machine that does nothing else. Sizes are of all files of an export;
perplexity by default is beside our own in fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gyroquant as gq
from gyroquant.errors import GyroquantError
from gyroquant.evaluation.speed import footprint
from gyroquant.formats.export import formats
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

FUSED = ["transform.R1={method: hadamard, random_signs: true}", "transform.R2={method: hadamard, random_signs: true}"]
ONLINE = [*FUSED, "transform.R4={method: hadamard, block: 128, random_signs: true}"]


def weights(bits: int, group: int, symmetric: bool, midrise: bool = False) -> list[str]:
    """Settings of the grid."""
    changes = [f"weights.bits={bits}", f"weights.group_size={group}", f"weights.symmetric={str(symmetric).lower()}"]
    return [*changes, "weights.midrise=true"] if midrise else changes


PROMPT, TOKENS = list(range(1000, 1256)), 32  # read and written where speed alone is measured again
LEARN = ["learn.round_weights=true", "learn.steps=10", "learn.batch_size=2"]
SMALL = ["calibration.nsamples=16", "calibration.seqlen=512"]
# What is rounded alike, by the recipe that it comes from; the model has no dimension of which 128 is a divisor but the
# feed-forward's, so that groups of 128 are tried on down_proj alone.
RECIPES: dict[str, tuple[str, list[str]]] = {
    "W4 g32 symmetric": ("rtn", [*FUSED, *weights(4, 32, True)]),
    "W4 g32 asymmetric": ("rtn", [*FUSED, *weights(4, 32, False)]),
    "W4 g64 symmetric": ("rtn", [*FUSED, *weights(4, 64, True)]),
    "W4 g64 asymmetric": ("rtn", [*FUSED, *weights(4, 64, False)]),
    "W4 g64 symmetric, down_proj g128": (
        "rtn",
        [*FUSED, *weights(4, 64, True), "weights.overrides=[{layers: [down_proj], group_size: 128}]"],
    ),
    "W4 g64 symmetric, R4 online": ("rtn", [*ONLINE, *weights(4, 64, True)]),
    "W3 g64 symmetric": ("rtn", [*FUSED, *weights(3, 64, True)]),
    "W3 g64 asymmetric": ("rtn", [*FUSED, *weights(3, 64, False)]),
    "W2 g64 symmetric": ("rtn", [*FUSED, *weights(2, 64, True)]),
    "W2 g64 asymmetric": ("rtn", [*FUSED, *weights(2, 64, False)]),
    "W2 a scale a row, midrise, R4 online": ("rtn", [*ONLINE, *weights(2, -1, True, True)]),
    "BBT-spectral W4 g64": ("bbt-spectral", [*SMALL, "weights.bits=4"]),
    "GSR W4 g64": ("gsr", SMALL),
    "SpinQuant no_had W4": ("spinquant-no-had", [*SMALL, "activations=null", *LEARN]),
    "MixQuant (PeRQ) W4": ("perq", [*SMALL, "activations=null"]),
}


def cell(given: argparse.Namespace, recipe: str, name: str) -> dict[str, Any]:
    """One recipe in one format."""
    out, place = given.out / recipe.replace(" ", "_"), given.out / f"{recipe.replace(' ', '_')}.{name}"
    if not out.exists():
        pipeline.run(prepare(given.model, out, gq.load_recipe(*RECIPES[recipe]), given.text))
    problems = next(one["problems"] for one in formats(out) if one["format"] == name)
    if problems:
        return {"refused": "; ".join(problems)}
    try:
        written = gq.export(out, name, place, overwrite=True, check=False)
        result = gq.verify_export(place, out, given.test, window=256, windows=2)
    except GyroquantError as error:
        return {"not_run": str(error)}
    bits = json.loads((out / "gyroquant.json").read_text())["bits"]["per_weight"]
    return {"bytes": written["bytes"], "bits": bits, "ways": result["ways"], "runtime": result["runtime"]}


def line(recipe: str, name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "ways" not in found:
        reason = found.get("refused") or found["not_run"]
        said = "refused" if "refused" in found else "not run"
        return f"| {recipe} | {name} | {said}: {reason} | | | | | | | | |"
    exact, usual = found["ways"]["exact"], found["ways"]["default"]
    ours = usual["perplexity_ours"]
    return (
        f"| {recipe} | {name} | {exact['relative_logit_error']:.0e} | {exact['perplexity'] - ours:+.3f} "
        f"| {usual['perplexity'] - ours:+.3f} of {ours:.2f} | {usual['kl']:.1e} | {found['bits']:.3f} "
        f"| {found['bytes'] / 1e6:.0f} MB | {usual['prefill_tokens_per_second']:.0f} "
        f"| {usual['decode_tokens_per_second']:.0f} | {usual['peak_memory_bytes'] / 1e6:.0f} MB |"
    )


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("--text", "--test", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    names = [one["format"] for one in formats()]
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--speed", action="store_true", help="measure the speed of what is there again")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    columns = ("logits, fp32", "perplexity, fp32", "perplexity, default", "KL, default", "true bits", "size")
    print(f"| recipe | format | {' | '.join((*columns, 'prefill/s', 'decode/s', 'peak memory'))} |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for recipe in given.recipes:
        for name in given.formats:
            key = f"{recipe} / {name}"
            if key not in found:
                found[key] = cell(given, recipe, name)
                path.write_text(json.dumps(found, indent=1) + "\n")
            elif given.speed and "ways" in found[key]:
                place = given.out / f"{recipe.replace(' ', '_')}.{name}"
                found[key]["ways"]["default"] |= footprint(name, place, PROMPT, TOKENS, exact=False)
                path.write_text(json.dumps(found, indent=1) + "\n")
            print(line(recipe, name, found[key]), flush=True)


if __name__ == "__main__":
    main()
