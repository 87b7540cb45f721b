"""Quantizes a real model, SmolLM2-135M-Instruct, to 2 bits with RTN, GPTQ, SignRound and our own recipe.

    make demo                      # or python demo/run.py [--bits 2 3] [--fresh]

An interrupted demo continues; with --fresh, it starts again. With --bits 2 3, it has rows of 3 bits too, and takes
twice as long.

Each result is proved, rounded, saved, loaded and measured on Wikipedia articles that are not in the calibration text.
Then it writes a sentence. To be done in minutes, the demo calibrates on 4,096 tokens, SignRound takes 20 steps,
and our recipe chooses the bits of layers on 4 windows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from assets import AssetError, cache, model, texts
from rich.console import Console

import gyroquant as gq
from gyroquant.benchmark.shared_measurements import SharedMeasurements, measured
from gyroquant.calibration.text import load_text
from gyroquant.evaluation.perplexity import text_windows
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.report.console import ConsoleProgress, duration, show, table
from gyroquant.system.files import put_json

TUNED = ("weights.tune.iters=20", "weights.tune.batch_size=4")
CHOSEN = ("weights.allocate.nsamples=4",)
METHODS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {  # recipe at so many bits, effort, changes
    "RTN": ("rtn-w{}g64", None, ()),
    "GPTQ": ("gptq-w{}g64", None, ()),
    "SignRound": ("signround-w{}g64", None, TUNED),
    "gyro": ("gyro-w{}", "light", CHOSEN),
}
CALIBRATION = ("calibration.nsamples=16", "calibration.seqlen=256")
WINDOW, WINDOWS = 512, 8
PROMPT = "The capital of France is"
LOG = Console(stderr=True)


def write(folder: str | Path, **options: Any) -> str:
    """The text that a model writes after the prompt, with greedy decoding."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = loaded.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).replace("\n", " ").strip()


def main(sizes: Sequence[int], fresh: bool = False) -> None:
    """Runs the demo at these numbers of bits, prints its table, and writes the same as JSON beside the results."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    original, (calibration, validation) = model(), texts()
    out, progress = cache() / "demo", ConsoleProgress()
    LOG.print(f"model {original}\ntext  {calibration}\n", highlight=False)
    store = open_model(original)
    windows = text_windows(load_text(validation), store, WINDOW, WINDOWS)
    test = SharedMeasurements(out, store, "float32").test(windows, progress)
    reference = measured(store, None, test, "float32", progress)
    rows: list[dict[str, Any]] = []
    for bits in sizes:
        for name, (recipe, effort, changes) in METHODS.items():
            recipe, folder = recipe.format(bits), out / f"{name.lower()}-{bits}"
            options = f"--recipe {recipe}" + (f" --effort {effort}" if effort else "")
            LOG.print(f"gyroquant quantize {original.name} {folder} {options} --text {calibration.name}")
            done = folder.with_suffix(".json")  # a row that an interrupted demo has finished
            loaded = gq.load_recipe(recipe, [*CALIBRATION, *changes], effort)
            kept = json.loads(done.read_text()) if done.exists() and folder.exists() and not fresh else None
            if kept is None or kept["manifest"]["recipe"] != loaded.to_dict():
                job = prepare(original, folder, loaded, calibration, overwrite=True, fresh=fresh)
                row: dict[str, Any] = {"name": f"{name}, {bits} bits", "manifest": pipeline.run(job, progress)}
                row["measured"] = measured(open_model(folder), store, test, "float32", progress)
                put_json(done, row | {"writes": write(folder)})
            rows.append(json.loads(done.read_text()))
    share = rows[0]["manifest"]["bits"]
    whole = f"{16 * share['bytes']['total'] / share['whole_model'] / 1e6:.0f} MB"
    cells = [("original", "", "16", whole, f"{reference['perplexity']:.2f}", "", "", "")]
    cells += [_cells(row) for row in rows]
    header = ("", "proof", "true bits", "file", "perplexity", "95 %", "KL", "time")
    title = f"SmolLM2-135M-Instruct, {WINDOWS} windows of {WINDOW} tokens of Wikipedia"
    show(table(title, header, cells, right=(1, 2, 3, 4, 5, 6, 7)))
    sentences = {"original": write(original.parent, gguf_file=original.name)} | {r["name"]: r["writes"] for r in rows}
    for name, sentence in sentences.items():
        show(f"{name:>17}: {PROMPT} {sentence}")
    show(
        "proof: relative logit error of the folded model before rounding (fp32). true bits: all stored bits "
        "per rounded weight of the layers. file: all weights. gyro rounds the embedding too, with two bits more. "
        "Calibrated on few tokens, with few steps: full runs are better and take longer (docs/results)."
    )
    put_json(out / "demo.json", {"original": reference, "rows": rows})
    for name in METHODS:
        for bits in sizes:
            (out / f"{name.lower()}-{bits}.json").unlink()
    LOG.print(f"{duration(time.perf_counter() - started)}; the models are in {out}", highlight=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    manifest, scores = row["manifest"], row["measured"]
    proof = manifest["proof"]
    digits = 0 if scores["perplexity"] >= 1000 else 1
    low, high = (f"{end:,.{digits}f}" for end in scores["perplexity_interval"])
    return (
        row["name"],
        f"{proof['relative_logit_error']:.1e}" if proof["tokens"] else "-",
        f"{manifest['bits']['per_weight']:.3f}",
        f"{manifest['bits']['bytes']['total'] / 1e6:.0f} MB",
        f"{scores['perplexity']:,.{digits}f}",
        f"{low} to {high}",
        f"{scores['kl']:.2f}",
        duration(manifest["seconds"]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3), default=[2], help="Default: 2.")
    parser.add_argument("--fresh", action="store_true", help="Start again, even if an earlier demo was interrupted.")
    try:
        given = parser.parse_args()
        main(given.bits, given.fresh)
    except (AssetError, gq.GyroquantError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
