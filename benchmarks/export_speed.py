"""Speed of exports as ratios in one run, against the same program with the model in 16 bits.

    python benchmarks/export_speed.py MODEL --text FILE --out FOLDER [--tokens 64] [--prompt 256] [--rounds 3]

On OpenVINO our W4 and W2 (fused, and W2 with R4 online) as it runs them by default. On llama.cpp, where its Python
binding is installed, our W4 and W2 beside its own Q4_0 and Q2_K of the model as it was. Weights are rounded to nearest
(a product takes as long whatever the numbers are). Every round measures every row once, in a process of its own, rows
in turn, so that what else the machine does hits all alike; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gyroquant as gq
from gyroquant.evaluation.speed import footprint
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

WIDE = ["weights.bits=8", "weights.group_size=64", "weights.symmetric=true"]
W4 = ["weights.bits=4", "weights.group_size=64", "weights.symmetric=true"]
W2 = ["weights.bits=2", "weights.group_size=64", "weights.symmetric=true"]
FUSED = ["transform.R1={method: hadamard}", "transform.R2={method: hadamard}"]
ONLINE = [*FUSED, "transform.R4={method: hadamard, block: 128}"]
# Name, recipe (None: the model as it is), format, and the type that llama.cpp rounds it to, if any.
ROWS: list[tuple[str, list[str] | None, str, str | None]] = [
    ("16 bits", None, "openvino", None),
    ("W4 g64", [*FUSED, *W4], "openvino", None),
    ("W2 g64", [*FUSED, *W2], "openvino", None),
    ("W2 g64, R4 online", [*ONLINE, *W2], "openvino", None),
    ("16 bits", None, "gguf", "F16"),
    ("W4 g64 (Q4_0)", [*FUSED, *W4], "gguf", None),
    ("W2 g64 (Q2_0)", [*FUSED, *W2], "gguf", None),
    ("llama.cpp's Q4_0", None, "gguf", "Q4_0"),
    ("llama.cpp's Q2_K", None, "gguf", "Q2_K"),
]


def exported(given: argparse.Namespace, row: tuple[str, list[str] | None, str, str | None]) -> Path:
    """The folder of a row, made if it is not there."""
    name, changes, kind, requantize = row
    place = given.out / f"{kind}_{name.replace(' ', '_')}"
    if place.exists():
        return place
    # A model in 16 bits is one of which a single small layer is rounded, to 8 bits: everything else is as it was.
    alone = [*WIDE, 'weights.ignore=["re:^(?!model.layers.0.self_attn.k_proj$).*"]']
    out = given.out / ("plain" if changes is None else name.replace(" ", "_"))
    if not out.exists():
        pipeline.run(prepare(given.model, out, gq.load_recipe("rtn", changes or alone), given.text))
    options = {"requantize": requantize} if requantize else {}
    gq.export(out, kind, place, check=False, **options)
    return place


def main() -> None:
    """Makes what is missing, measures, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    for option, value in (("--tokens", 64), ("--prompt", 256), ("--rounds", 3)):
        parser.add_argument(option, type=int, default=value)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prompt = torch.randint(1000, (given.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[str, list[dict[str, Any]]] = {}
    places = [(row, exported(given, row)) for row in ROWS]
    for _ in range(given.rounds):
        for row, place in places:
            took = footprint(row[2], place, prompt, given.tokens, exact=False)
            found.setdefault(f"{row[2]}: {row[0]}", []).append(took)
    (given.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    print("| | prefill | decode | tokens/s written | peak memory |\n|---|--:|--:|--:|--:|")
    for row, _ in places:
        mine, base = found[f"{row[2]}: {row[0]}"], found[f"{row[2]}: 16 bits"]
        ratios = [
            median(a[key] / b[key] for a, b in zip(mine, base, strict=True))
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
        ]
        speed = median(one["decode_tokens_per_second"] for one in mine)
        print(f"| {row[2]}: {row[0]} | {ratios[0]:.2f} | {ratios[1]:.2f} | {speed:.0f} | {ratios[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
