"""A device against the CPU of the same machine: how much faster each stage is there, and how far the codes differ.

    python benchmarks/device_speed.py [MODEL --text FILE] [--validation FILE] [--device cuda]
        [--recipes gptq gyro-w4] [--nsamples 64] [--json FILE]

Each recipe quantizes the model on the CPU and then on the device, in one process; each result is measured where it was
made. Maps are the same on both. Products of a device differ in the last places, and error feedback carries such
differences on: the share of codes that differ says how far. Where there is no such device, the reason is printed and
nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.options import OutputOptions
from gyroquant.system.environment import versions

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
CODES = "_codes"


def reason_against(device: str) -> str:
    """Why a device cannot be used; empty if it can."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def packed_codes(folder: Path) -> dict[str, torch.Tensor]:
    """The packed codes of every rounded parameter, as bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.endswith(CODES)}
    return found


def differing_codes(first: Path, second: Path) -> tuple[float, float]:
    """The share of bytes of codes that differ between two folders: over all parameters, and of the parameter where it
    is largest.
    """
    ours, theirs = packed_codes(first), packed_codes(second)
    differing = {name: (codes != theirs[name]).float().mean().item() for name, codes in ours.items()}
    total = sum(differing[name] * ours[name].numel() for name in ours)
    return total / sum(codes.numel() for codes in ours.values()), max(differing.values())


def compared(name: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One recipe on the CPU and on the device."""
    row: dict[str, Any] = {"recipe": name}
    for side, device in (("cpu", "cpu"), ("device", given.device)):
        recipe = gq.load_recipe(name, [f"calibration.nsamples={given.nsamples}", f"calibration.seqlen={given.seqlen}"])
        job = prepare(given.model, scratch / side, recipe, given.text, options=OutputOptions(device=device))
        manifest = pipeline.run(job)
        row[side] = {key: manifest[key] for key in ("seconds", "stage_seconds", "proof")}
        measured = gq.evaluate(scratch / side, given.validation, windows=8, window=given.window, device=device)
        row[side]["perplexity"] = measured["perplexity"]
    row["codes_that_differ"], row["at_most"] = differing_codes(scratch / "cpu", scratch / "device")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--validation", type=Path, help="text for perplexity; default: the calibration text")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipes", nargs="+", default=["gptq", "gyro-w4"])
    for key, value in (("nsamples", 64), ("seqlen", 512), ("window", 1024)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if problem := reason_against(given.device):
        print(f"not measured: {given.device} cannot be used here: {problem}")
        return
    if given.model is None:
        import assets

        given.model, (given.text, given.validation) = assets.model(), assets.texts()
    given.validation = given.validation or given.text
    rows = []
    headings = ("seconds, CPU", f"seconds, {given.device}", "speed-up", "perplexity, CPU", given.device)
    print(f"| recipe | {' | '.join(headings)} | bytes of codes that differ |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in given.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            row = compared(name, given, Path(scratch))
        rows.append(row)
        cpu, device = row["cpu"], row["device"]
        print(
            f"| {name} | {cpu['seconds']:.0f} | {device['seconds']:.0f} | {cpu['seconds'] / device['seconds']:.1f} "
            f"| {cpu['perplexity']:.3f} | {device['perplexity']:.3f} "
            f"| {row['codes_that_differ']:.2%}, at most {row['at_most']:.2%} of a layer |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
