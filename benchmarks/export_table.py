"""Every format by every kind of recipe: refused and why, or how far the program that opens it is from us, and how fast.

    python benchmarks/export_table.py MODEL --text FILE --test FILE --out FOLDER [--recipes NAME ...] [--formats ...]

Rounds MODEL to nearest for each recipe (transforms proved on `--text`; what is compared is the file, not its quality),
writes each format that holds it and verifies it on two windows of 256 tokens of `--test`. What stands in
FOLDER/results.json is not run again. Sizes are of all files of an export.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gyroquant as gq
from gyroquant import pipeline
from gyroquant.deploy import formats
from gyroquant.errors import GyroquantError
from gyroquant.job import prepare

FUSED = ["transform.R1={method: hadamard, random_signs: true}", "transform.R2={method: hadamard, random_signs: true}"]
ONLINE = [*FUSED, "transform.R4={method: hadamard, block: 128, random_signs: true}"]


def weights(bits: int, group: int, symmetric: bool, midrise: bool = False) -> list[str]:
    """Settings of the grid."""
    changes = [f"weights.bits={bits}", f"weights.group_size={group}", f"weights.symmetric={str(symmetric).lower()}"]
    return [*changes, "weights.midrise=true"] if midrise else changes


RECIPES: dict[str, list[str]] = {
    "W4 g32 symmetric": [*FUSED, *weights(4, 32, True)],
    "W4 g64 symmetric": [*FUSED, *weights(4, 64, True)],
    "W4 g64 asymmetric": [*FUSED, *weights(4, 64, False)],
    "W4 g64 symmetric, R4 online": [*ONLINE, *weights(4, 64, True)],
    "W3 g64 symmetric": [*FUSED, *weights(3, 64, True)],
    "W2 g64 symmetric": [*FUSED, *weights(2, 64, True)],
    "W2 g64 asymmetric": [*FUSED, *weights(2, 64, False)],
    "W2 a scale a row, midrise, R4 online": [*ONLINE, *weights(2, -1, True, True)],
}


def cell(given: argparse.Namespace, recipe: str, name: str) -> dict[str, Any]:
    """One recipe in one format."""
    out, place = given.out / recipe.replace(" ", "_"), given.out / f"{recipe.replace(' ', '_')}.{name}"
    if not out.exists():
        pipeline.run(prepare(given.model, out, gq.load_recipe("rtn", RECIPES[recipe]), given.text))
    problems = next(one["problems"] for one in formats(out) if one["format"] == name)
    if problems:
        return {"refused": "; ".join(problems)}
    try:
        written = gq.export(out, name, place, overwrite=True, check=False)
        result = gq.verify_export(place, out, given.test, window=256, max_windows=2)
    except GyroquantError as error:
        return {"not_run": str(error)}
    return {"bytes": written["bytes"], "ways": result["ways"], "runtime": result["runtime"]}


def line(recipe: str, name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "ways" not in found:
        reason = found.get("refused") or found["not_run"]
        said = "refused" if "refused" in found else "not run"
        return f"| {recipe} | {name} | {said}: {reason} | | | | | |"
    exact, usual = found["ways"]["exact"], found["ways"]["default"]
    change = usual["perplexity"] / usual["perplexity_ours"] - 1
    return (
        f"| {recipe} | {name} | {exact['relative_logit_error']:.0e} | {usual['kl']:.1e} | {100 * change:+.2f} % "
        f"| {found['bytes'] / 1e6:.0f} MB | {usual['prefill_tokens_per_second']:.0f} "
        f"| {usual['decode_tokens_per_second']:.0f} |"
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
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    print("| recipe | format | logits, exact | KL, default | perplexity, default | size | prefill/s | decode/s |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for recipe in given.recipes:
        for name in given.formats:
            key = f"{recipe} / {name}"
            if key not in found:
                found[key] = cell(given, recipe, name)
                path.write_text(json.dumps(found, indent=1) + "\n")
            print(line(recipe, name, found[key]), flush=True)


if __name__ == "__main__":
    main()
