"""Other programs with their own defaults for embeddings, and the speed of exports, beside our recipes.

    python benchmarks/whole_file.py types MODEL --text CALIBRATION --test TEST --out FOLDER
    python benchmarks/whole_file.py types FILE.gguf --text CALIBRATION --test TEST --out FOLDER --quantize PROGRAM
        --types Q4_0 "IQ4_NL --pure" ...
    python benchmarks/whole_file.py tools MODEL --text CALIBRATION --test TEST --out FOLDER --runs "nncf:GPTQ:4" ...
    python benchmarks/whole_file.py speed MODEL --text CALIBRATION --out FOLDER --ours W4_FOLDER W2_FOLDER [--rounds 2]

`types`: llama.cpp rounds the model by its defaults, without an importance matrix. Its files are read back and measured
as ours are, with the first 8 windows of 1,024 tokens. MB are those of the tensors, without headers and tokenizer, as
ours are. With `--quantize`, the program `llama-quantize` of llama.cpp or of a fork rounds a GGUF file, and a type may
have options of that program.

`tools`: external tools of `gyroquant compare`, each run given as TOOL:VARIANT:BITS, with embedding and head as the
tool's defaults leave them. Their environments are made if they are missing.

`speed`: exports of two folders that `gyro-w4` and `gyro-w2` made, against the same layers with embedding and head in 16
bits, and against llama.cpp's Q4_0. The layers to compare with are rounded to nearest: a product takes as long whatever
the numbers are. Every round measures every row once, in turn; ratios are medians over rounds.

`types` without `--quantize` and `speed` need the extra llama-cpp. What is made already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gyroquant as gq
from gyroquant.benchmark.external_tools import ExternalTool, Size, Task
from gyroquant.benchmark.external_tools.environment import default_folder, python_of
from gyroquant.benchmark.shared_measurements import SharedMeasurements, plain_folder
from gyroquant.calibration.text import load_text, token_stream
from gyroquant.evaluation.speed import footprint
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

TYPES = ("Q2_K", "Q4_0", "IQ4_NL", "Q3_K_M", "Q5_0", "Q4_K_M")
ROTATE = [f"transform.{site}={{method: hadamard, random_signs: true}}" for site in ("R1", "R2", "R4")]
ROWS = ["weights.bits=2", "weights.group_size=-1", "weights.symmetric=true", "weights.midrise=true"]
# A model in 16 bits is one of which a single small layer is rounded, to 8 bits.
ALONE = ["weights.bits=8", "weights.group_size=64", 'weights.ignore=["re:^(?!model.layers.0.self_attn.k_proj$).*"]']


def rounded(given: argparse.Namespace, name: str, changes: list[str]) -> Path:
    """A folder of the model rounded to nearest, made if it is not there."""
    place: Path = given.out / name
    if not place.exists():
        pipeline.run(prepare(given.model, place, gq.load_recipe("rtn", changes), given.text))
    return place


def exported(given: argparse.Namespace, folder: Path, kind: str, name: str, **options: Any) -> Path:
    """An export of a folder, made if it is not there."""
    place: Path = given.out / f"{kind}-{name}"
    if not place.exists():
        gq.export(folder, kind, place, check=False, **options)
    return place


def llama_cpp(given: argparse.Namespace, kind: str) -> Path:
    """The folder with the model as llama.cpp rounds it, made if it is not there."""
    if given.quantize is None:
        return exported(given, rounded(given, "plain", ALONE), "gguf", kind, requantize=kind)
    kind, *options = kind.split()
    place: Path = given.out / "-".join(["gguf", kind, *(option.lstrip("-") for option in options)])
    file, partial = place / "model.gguf", place / "partial"
    if not file.exists():
        place.mkdir(exist_ok=True)
        subprocess.run([given.quantize, "--allow-requantize", *options, given.model, partial, kind, "1"], check=True)
        partial.rename(file)
    return place


def types(given: argparse.Namespace) -> None:
    """Prints bytes and perplexity of each type."""
    tokenizer = open_model(given.model).tokenizer()
    print("| llama.cpp | MB | perplexity | bits of the whole model | MB of embedding and head |\n|---|--:|--:|--:|--:|")
    for kind in given.types:
        (file,) = llama_cpp(given, kind).glob("*.gguf")
        found = gq.evaluate(file, given.test, windows=8, window=1024, tokenizer=tokenizer)
        size = {part: bytes_ / 1e6 for part, bytes_ in found["bytes"].items()}
        cells = f"{size['total']:.1f} | {found['perplexity']:.2f} | {found['whole_model_bits_per_weight']:.2f}"
        print(f"| {kind} | {cells} | {size['embeddings'] + size['head']:.1f} |", flush=True)


def tools(given: argparse.Namespace) -> None:
    """Prints bytes and perplexity of each run of an external tool, and the tool's own seconds."""
    store = open_model(given.model)
    tokenizer, shared = store.tokenizer(), SharedMeasurements(given.out, store, "float32")
    stream = token_stream(load_text(given.text), tokenizer, store.text_config.vocab_size, add_bos=True)
    tokens = shared.calibration(stream, given.nsamples, 512, seed=0)
    print("| | MB | perplexity | bits of the layers | MB of embedding and head | seconds |\n|---|--:|--:|--:|--:|--:|")
    for run in given.runs:
        name, variant, bits = run.split(":")
        tool, row = ExternalTool.registry[name](), given.out / f"{run.replace(' ', '-')}.json"
        if not row.exists():
            python = python_of(type(tool), default_folder(), make=True)
            with tempfile.TemporaryDirectory(dir=given.out) as scratch:
                task = Task(
                    plain_folder(shared).absolute(), tokens.absolute(), Path(scratch).absolute(), Size(int(bits), 64)
                )
                made = tool.run(variant, task, python)
                scores = gq.evaluate(made.dense, given.test, windows=8, window=1024, tokenizer=tokenizer)
            result = asdict(made) | {"dense": None, "perplexity": scores["perplexity"]}
            row.write_text(json.dumps(result, indent=1) + "\n")
        found = json.loads(row.read_text())
        size = {part: bytes_ / 1e6 for part, bytes_ in found["weight_bytes"].items()}
        cells = f"{size['total']:.1f} | {found['perplexity']:.2f} | {found['true_bits']:.3f}"
        print(f"| {run} | {cells} | {size['embeddings'] + size['head']:.1f} | {found['seconds']:.0f} |", flush=True)


def places(given: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """The exports to measure, by format and name."""
    four, two = given.ours
    bits = json.loads((two / "gyroquant.json").read_text())["allocation"]["bits"]
    three = [name.removesuffix(".weight") for name, width in bits.items() if width == 3]
    before = [*ROTATE, *ROWS, f"weights.overrides=[{{layers: {json.dumps(three)}, bits: 3}}]"]
    folders = {
        "w4 before": rounded(given, "w4-before", [*ROTATE, "weights.bits=4", "weights.group_size=64"]),
        "w2 before": rounded(given, "w2-before", before),
        "w4": four,
        "w2": two,
    }
    found = {
        (kind, name): exported(given, folder, kind, name.replace(" ", "-"))
        for kind in ("openvino", "onnx")
        for name, folder in folders.items()
    }
    return found | {("gguf", "Q4_0"): llama_cpp(given, "Q4_0")}


def speed(given: argparse.Namespace) -> None:
    """Prints speeds, memory, and ratios of both."""
    made, theirs = places(given), ("gguf", "Q4_0")
    prompt = torch.randint(1000, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in made}
    for _ in range(given.rounds):
        for key, place in made.items():
            found[key].append(footprint(key[0], place, prompt, 64, exact=False))

    def ratio(key: tuple[str, str], other: tuple[str, str], figure: str) -> str:
        if other not in found:
            return ""
        return f"{median(a[figure] / b[figure] for a, b in zip(found[key], found[other], strict=True)):.2f}"

    print("| export | tokens/s | to before | to Q4_0 | prompt, tokens/s | peak MB | to before | MB of files |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for key, place in made.items():
        each = {name: median(figures[name] for figures in found[key]) for name in found[key][0] if "_per_" in name}
        before = (key[0], f"{key[1][:2]} before")
        cells = (
            f"{each['decode_tokens_per_second']:.0f}",
            ratio(key, before, "decode_tokens_per_second"),
            ratio(key, theirs, "decode_tokens_per_second"),
            f"{each['prefill_tokens_per_second']:.0f}",
            f"{median(figures['peak_memory_bytes'] for figures in found[key]) / 1e6:.0f}",
            ratio(key, before, "peak_memory_bytes"),
            f"{sum(path.stat().st_size for path in place.iterdir()) / 1e6:.0f}",
        )
        print(f"| {' '.join(key)} | {' | '.join(cells)} |")


# what makes each table, and the options that it needs
TABLES = {"types": (types, ("test",)), "tools": (tools, ("test", "runs")), "speed": (speed, ("ours",))}


def main() -> None:
    """Reads the arguments and prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("model")
    for name in ("--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--ours", type=Path, nargs=2, metavar=("W4_FOLDER", "W2_FOLDER"))
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE")
    parser.add_argument("--quantize", metavar="PROGRAM", help="a program llama-quantize, instead of ours")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", nargs="+", metavar="TOOL:VARIANT:BITS")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration windows of `tools`, of 512 tokens")
    given = parser.parse_args()
    make, needed = TABLES[given.table]
    missing = [name for name in needed if getattr(given, name) is None]
    if missing:
        parser.error(f"{given.table} needs --{missing[0]}")
    given.out.mkdir(parents=True, exist_ok=True)
    make(given)


if __name__ == "__main__":
    main()
