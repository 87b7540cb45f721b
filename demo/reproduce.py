"""Repeats a row of a published table of results, and says whether it matches.

    make reproduce                       # the rows that can be repeated
    make reproduce ROW=demo/gptq-w2      # or python demo/reproduce.py demo/gptq-w2

The rows and what is expected of them are in docs/results/reproducible.json. The model comes from demo/assets.py, and so
do the texts, unless --calibration and --test name other ones. Rows of WikiText-2 need `pip install "gyroquant[hub]"`,
or --test FILE with its raw test text. docs/results/README.md says more.

Two things are compared:

- Bytes, and bits of the layers: exactly, to the digits that the table has. They depend on neither text nor machine,
  unless bits are chosen on the text within a size: then the file has at most that, and less than 1 % less.
- Perplexity: it matches if it lies in the table's 95 % interval, which is a bootstrap over windows of the test text.
  If the table has no interval, the table's number must lie in the interval of this run. Other threads and processors
  round a few codes differently, and another calibration text changes more: if this run had another one, the output says
  so, and a difference then says nothing against the table.

The result is a table, and a file REPRODUCED/ROW.json. The exit code is 1 if the row does not match.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from assets import AssetError, cache, model, texts

import gyroquant as gq
from gyroquant.benchmark.sizes import text as size_text
from gyroquant.calibration.text import load_text
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.recipes.size import parse_size, with_size
from gyroquant.report.console import ConsoleProgress, duration, show, table
from gyroquant.system.environment import versions

ROWS = Path(__file__).parent.parent / "docs" / "results" / "reproducible.json"
VALIDATION = "validation"
"""The test text of a row that is the demo's own validation text."""


def read_rows(path: Path = ROWS) -> dict[str, dict[str, Any]]:
    """The rows that can be repeated, by name. Their entries are described in docs/results/README.md."""
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def listing(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as lines of text, with names that can be copied whatever the width of the terminal."""
    lines = [("ROW", "recipe", "size", "perplexity", "95 %", "table")]
    for name, row in rows.items():
        score = f"{row['perplexity']:,.2f}"
        lines.append((name, _settings(row), _size(row), score, _interval(row["interval"]), row["page"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(["make reproduce ROW=..., with one of these rows:", "", *map("  ".join, aligned)])


def _settings(row: Mapping[str, Any]) -> str:
    effort = f", {row['effort']}" if row["effort"] else ""
    size = f", --size {row['size']}" if row["size"] else ""
    return f"{row['recipe']}{effort}{size}"


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['megabytes']:g} MB" if row["megabytes"] else f"{row['layer_bits']:.3f} bits"


def _interval(ends: Any) -> str:
    return "" if ends is None else f"{ends[0]:,.1f} to {ends[1]:,.1f}"


def repeated(row: Mapping[str, Any], original: Path, calibration: Path, test: str | Path, out: Path) -> dict[str, Any]:
    """Quantizes and measures again what a row states. Returns what `judged` compares, with the sha256 of the texts.

    out: the folder of the quantized model. An interrupted run continues there.
    """
    recipe = gq.load_recipe(row["recipe"], row["changes"], row["effort"])
    if row["size"]:
        recipe = with_size(recipe, parse_size(row["size"]))
    progress = ConsoleProgress()
    if not (out / "gyroquant.json").exists():
        pipeline.run(prepare(original, out, recipe, calibration), progress)
    manifest = json.loads((out / "gyroquant.json").read_text(encoding="utf-8"))
    if manifest["recipe"] != recipe.to_dict():
        raise gq.InputError(f"{out} holds a result of another recipe: delete it")
    window, windows = row["window"], row["windows"]
    measured = gq.evaluate(out, test, original, window=window, windows=windows, progress=progress)
    return {
        "perplexity": measured["perplexity"],
        "interval": measured["perplexity_interval"],
        "kl": measured["kl"],
        "bytes": manifest["bits"]["bytes"]["total"],
        "layer_bits": manifest["bits"]["per_weight"],
        "proof_error": manifest["proof"]["relative_logit_error"],
        "seconds": manifest["seconds"],
        "calibration_sha256": manifest["text"]["sha256"] if manifest["text"] else None,
        "test_sha256": load_text(test, split="test").sha256,
        "versions": versions(),
    }


def judged(row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a repeated row matches: `perplexity`, `size` and `layer_bits`, None if the table does not state it, and
    `matches`, whether all of them do. `other_texts`: those of "calibration" and "test" that are not the table's.
    """
    low, high = row["interval"] or found["interval"]
    inside = found["perplexity"] if row["interval"] else row["perplexity"]
    agree = {"perplexity": low <= inside <= high, "size": _same_size(row, found), "layer_bits": None}
    if row["layer_bits"] is not None:
        digits = row["layer_digits"]
        agree["layer_bits"] = round(found["layer_bits"], digits) == round(row["layer_bits"], digits)
    pairs = [(kind, row[f"{kind}_sha256"], found[f"{kind}_sha256"]) for kind in ("calibration", "test")]
    return {
        **agree,
        "matches": all(agreed is not False for agreed in agree.values()),
        "other_texts": [kind for kind, expected, own in pairs if None not in (expected, own) and expected != own],
    }


def _same_size(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool | None:
    """Whether the bytes are those of the row, or of the table to its digits.

    Where a size was asked for, bits are chosen on the text: then the bytes are at most that, and less than 1 % smaller.
    """
    if row["size"]:
        return bool(0.99 * parse_size(row["size"]) <= found["bytes"] <= parse_size(row["size"]))
    if row["bytes"] is not None:
        return bool(found["bytes"] == row["bytes"])
    if row["megabytes"] is None:
        return None
    return bool(round(found["bytes"] / 1e6, row["megabyte_digits"]) == row["megabytes"])


def report(name: str, row: Mapping[str, Any], found: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[Any]:
    """The table and the sentences that are printed."""
    words = {True: "yes", False: "NO", None: "not in the table"}
    size = "" if row["megabytes"] is None else f"{row['megabytes']:g} MB"
    bits = "" if row["layer_bits"] is None else f"{row['layer_bits']:.{row['layer_digits']}f}"
    lines = [
        (
            "perplexity",
            f"{row['perplexity']:,g} {_interval(row['interval'])}",
            f"{found['perplexity']:,.2f} {_interval(found['interval'])}",
            words[verdict["perplexity"]],
        ),
        ("size of all weights", size, f"{size_text(found['bytes'])} ({found['bytes']} bytes)", words[verdict["size"]]),
        ("bits of the layers", bits, f"{found['layer_bits']:.6f}", words[verdict["layer_bits"]]),
    ]
    shown = [table(f"{name}, of {row['page']}", ("", "table", "here", "matches"), lines)]
    for kind in verdict["other_texts"]:
        effect = (
            "a different perplexity says nothing against the table"
            if kind == "test"
            else "other calibration windows have moved results at 2 bits by 8 to 36 % (docs/results/head_to_head.md)"
        )
        shown.append(f"The {kind} text is not that of the table: {effect}. Give the table's with --{kind} FILE.")
    shown.append(f"{name} {'matches' if verdict['matches'] else 'does not match'}; {duration(found['seconds'])}.")
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Lists the rows, or repeats one. Returns the exit code: 1 if the row does not match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", help="The row; without it, all rows are listed.")
    parser.add_argument("--rows", type=Path, default=ROWS, help="A file of rows. Default: docs/results.")
    parser.add_argument("--model", type=Path, help="The model. Default: that of demo/assets.py.")
    parser.add_argument("--calibration", type=Path, help="The calibration text. Default: that of demo/assets.py.")
    parser.add_argument("--test", help="The text to measure on. Default: the row's.")
    parser.add_argument("--out", type=Path, help="The folder of results. Default: reproduced, in the cache.")
    given = parser.parse_args(arguments)
    rows = read_rows(given.rows)
    if not given.row:
        print(listing(rows))
        return 0
    if given.row not in rows:
        near = get_close_matches(given.row, rows, 1, 0)[0]
        raise gq.InputError(f"there is no row {given.row!r}; did you mean {near!r}? Without a row, all are listed")
    row, original = rows[given.row], given.model or model()
    calibration, test = given.calibration, given.test or row["test"]
    if calibration is None or test == VALIDATION:
        own = texts()
        calibration, test = calibration or own[0], own[1] if test == VALIDATION else test
    load_text(test, split="test")  # raises for a text that cannot be had, before the long work
    place = (given.out or cache() / "reproduced") / given.row.replace("/", "-")
    place.parent.mkdir(parents=True, exist_ok=True)
    found = repeated(row, original, calibration, test, place)
    verdict = judged(row, found)
    result = {"row": given.row, "expected": row, "found": found, "verdict": verdict}
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(*report(given.row, row, found, verdict), f"as JSON: {place.with_suffix('.json')}")
    return 0 if verdict["matches"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssetError, gq.GyroquantError) as error:
        sys.exit(f"reproduce: {error}")
    except KeyboardInterrupt:
        sys.exit("reproduce: interrupted; the same command continues")
