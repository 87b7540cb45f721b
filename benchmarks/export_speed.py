"""Speed and memory of exports as ratios in one run, against the same program with the model in 16 bits.

    python benchmarks/export_speed.py MODEL --text FILE --out FOLDER [--tokens 64] [--prompt 256] [--rounds 3]
    python benchmarks/export_speed.py MODEL --text FILE --out FOLDER --formats openvino onnx

`--words` is the number of words from which the prompt is drawn, at most those of the model.

Our W4 and W2 in OpenVINO, ONNX Runtime and llama.cpp as each runs them by default: with embedding and head in 16 bits,
and with a table of 4, 6 or 8 bits that both share. In llama.cpp also its own Q4_0 and Q2_K of the model as it was,
which round embedding and head too. Weights are rounded to nearest: a product takes as long whatever the numbers are.

Every round measures every row once, in a process of its own, rows in turn, so that what else the machine does hits all
alike. Ratios are medians over rounds. The memory of a model is the peak of the process while it runs, less what it held
before the program's library was imported and the model was opened. A format whose package is not installed is left out,
by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gyroquant as gq
from gyroquant.evaluation.speed import footprint
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

PLAIN = "16 bits"
WIDE = ["weights.bits=8", "weights.group_size=64", "weights.symmetric=true"]
W4 = ["weights.bits=4", "weights.group_size=64", "weights.symmetric=true"]
W2 = ["weights.bits=2", "weights.group_size=64", "weights.symmetric=true"]
FUSED = ["transform.R1={method: hadamard}", "transform.R2={method: hadamard}"]
ONLINE = [*FUSED, "transform.R4={method: hadamard, block: 128}"]
PACKAGES = {"openvino": ["openvino"], "onnx": ["onnxruntime"], "gguf": ["llama_cpp", "xllamacpp"]}  # one of these


def table(bits: int) -> list[str]:
    """The settings of a table that embedding and head share, also under a fused R1."""
    return ["keep_ties=true", f"embeddings.bits={bits}", "embeddings.group_size=64", "embeddings.symmetric=true"]


@dataclass(frozen=True, eq=False)
class Row:
    """One export: its format, its name, the changes to the recipe (None: the model as it is), and the type to which
    llama.cpp rounds it, if any.
    """

    format: str
    name: str
    changes: list[str] | None
    requantize: str | None = None

    def __str__(self) -> str:
        return f"{self.format}: {self.name}"


ROWS = [
    Row("openvino", PLAIN, None),
    Row("openvino", "W4 g64", [*FUSED, *W4]),
    Row("openvino", "W4 g64, table of 8 bits", [*FUSED, *W4, *table(8)]),
    Row("openvino", "W4 g64, table of 6 bits", [*FUSED, *W4, *table(6)]),
    Row("openvino", "W4 g64, table of 4 bits", [*FUSED, *W4, *table(4)]),
    Row("openvino", "W2 g64", [*FUSED, *W2]),
    Row("openvino", "W2 g64, table of 4 bits", [*FUSED, *W2, *table(4)]),
    Row("openvino", "W2 g64, R4 online", [*ONLINE, *W2]),
    Row("onnx", PLAIN, None),
    Row("onnx", "W4 g64", [*FUSED, *W4]),
    Row("onnx", "W4 g64, table of 8 bits", [*FUSED, *W4, *table(8)]),
    Row("onnx", "W4 g64, table of 4 bits", [*FUSED, *W4, *table(4)]),
    Row("onnx", "W2 g64", [*FUSED, *W2]),
    Row("onnx", "W2 g64, table of 4 bits", [*FUSED, *W2, *table(4)]),
    Row("gguf", PLAIN, None, "F16"),
    Row("gguf", "W4 g64 (Q4_0)", [*FUSED, *W4]),
    Row("gguf", "W2 g64 (Q2_0)", [*FUSED, *W2]),
    Row("gguf", "llama.cpp's Q4_0", None, "Q4_0"),
    Row("gguf", "llama.cpp's Q2_K", None, "Q2_K"),
]


def exported(given: argparse.Namespace, row: Row) -> Path:
    """The folder of a row, made if it is not there."""
    place: Path = given.out / f"{row.format}_{row.name.replace(' ', '_')}"
    if place.exists():
        return place
    # A model in 16 bits is one of which a single small layer is rounded, to 8 bits: everything else is as it was.
    alone = [*WIDE, 'weights.ignore=["re:^(?!model.layers.0.self_attn.k_proj$).*"]']
    out = given.out / ("plain" if row.changes is None else row.name.replace(" ", "_"))
    if not out.exists():
        pipeline.run(prepare(given.model, out, gq.load_recipe("rtn", row.changes or alone), given.text))
    options = {"requantize": row.requantize} if row.requantize else {}
    gq.export(out, row.format, place, check=False, **options)
    return place


def installed(formats: list[str]) -> list[str]:
    """The formats whose packages are installed. Names the others."""
    missing = [name for name in formats if not any(map(importlib.util.find_spec, PACKAGES[name]))]
    for name in missing:
        print(f"{name} is left out: {' or '.join(PACKAGES[name])} is not installed", flush=True)
    return [name for name in formats if name not in missing]


def shown(row: Row, place: Path, mine: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """A line of the table, from the measurements of a row and of the model in 16 bits."""
    rounds = list(zip(mine, base, strict=True))
    ratios = [
        median(a[key] / b[key] for a, b in rounds) for key in ("prefill_tokens_per_second", "decode_tokens_per_second")
    ]
    ratios.append(median(_model_memory(a) / _model_memory(b) for a, b in rounds))
    ratios.append(median(a["peak_memory_bytes"] / b["peak_memory_bytes"] for a, b in rounds))
    speed = median(figures["decode_tokens_per_second"] for figures in mine)
    memory = median(_model_memory(figures) for figures in mine) / 1e6
    size = sum(path.stat().st_size for path in place.iterdir()) / 1e6
    numbers = [*(f"{ratio:.2f}" for ratio in ratios), f"{speed:.0f}", f"{memory:.0f}", f"{size:.0f}"]
    return f"| {row} | {' | '.join(numbers)} |"


def _model_memory(figures: dict[str, Any]) -> float:
    return float(figures["peak_memory_bytes"] - figures["memory_before_bytes"])


def main() -> None:
    """Makes what is missing, measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    for option, value in (("--tokens", 64), ("--prompt", 256), ("--rounds", 3), ("--words", 1000)):
        parser.add_argument(option, type=int, default=value)
    parser.add_argument("--formats", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prompt = torch.randint(given.words, (given.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = installed(given.formats)
    places = {row: exported(given, row) for row in ROWS if row.format in chosen}
    found: dict[Row, list[dict[str, Any]]] = {row: [] for row in places}
    for _ in range(given.rounds):
        for row, place in places.items():
            found[row].append(footprint(row.format, place, prompt, given.tokens, exact=False))
    figures = {str(row): measured for row, measured in found.items()}
    (given.out / "speed.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(
        "| | prefill | decode | memory of the model | peak memory | tokens/s written | MB of the model | MB of files |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row, place in places.items():
        base = next(other for other in places if (other.format, other.name) == (row.format, PLAIN))
        print(shown(row, place, found[row], found[base]), flush=True)


if __name__ == "__main__":
    main()
