"""Quantizes a real model, SmolLM2-135M-Instruct, to 2 bits with RTN, with GPTQ, and with our own recipe.

    make demo                      # or python demo/run.py [--fresh]

An interrupted demo continues; with --fresh, it starts again.

Each result is proved, rounded, saved, loaded and measured on Wikipedia articles that are not in the calibration text.
Then it writes a sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from assets import AssetError, cache, model, texts
from rich.console import Console

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.report.console import ConsoleProgress, duration, show, table

RECIPES = {"RTN": ("rtn-w2g64", None), "GPTQ": ("gptq-w2g64", None), "gyro-w2": ("gyro-w2", "light")}  # recipe, effort
CALIBRATION = ("calibration.nsamples=32", "calibration.seqlen=512")
PROMPT = "The capital of France is"
LOG = Console(stderr=True)


def write(folder: str | Path, **options: Any) -> str:
    """The text that a model writes after the prompt, with greedy decoding."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = loaded.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).replace("\n", " ").strip()


def main(fresh: bool = False) -> None:
    """Runs the demo, prints its table, and writes the same as JSON to the folder of the results."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    original, (calibration, validation) = model(), texts()
    out, progress = cache() / "demo", ConsoleProgress()
    LOG.print(f"model {original}\ntext  {calibration}\n", highlight=False)
    rows: list[dict[str, Any]] = []
    for name, (recipe, effort) in RECIPES.items():
        folder, options = out / name.lower(), f"--recipe {recipe}" + (f" --effort {effort}" if effort else "")
        LOG.print(f"gyroquant quantize {original.name} {folder} {options} --nsamples 32 --text {calibration.name}")
        loaded = gq.load_recipe(recipe, CALIBRATION, effort)
        manifest = pipeline.run(prepare(original, folder, loaded, calibration, overwrite=True, fresh=fresh), progress)
        measured = gq.evaluate(folder, validation, original, preset="bbt", progress=progress)
        rows.append({"name": name, "manifest": manifest, "measured": measured, "writes": write(folder)})
    reference = gq.evaluate(original, validation, preset="bbt", progress=progress)
    bits = rows[0]["manifest"]["bits"]
    whole = f"{16 * bits['bytes']['total'] / bits['whole_model'] / 1e6:.0f} MB"
    cells = [("original", "", "16", whole, f"{reference['perplexity']:.2f}", "", "", "")]
    cells += [_cells(row) for row in rows]
    header = ("2 bits", "proof", "true bits", "file", "perplexity", "95 %", "KL", "time")
    title = "SmolLM2-135M-Instruct, 8 windows of 1,024 tokens of Wikipedia"
    show(table(title, header, cells, right=(1, 2, 3, 4, 5, 6, 7)))
    sentences = {"original": write(original.parent, gguf_file=original.name)} | {r["name"]: r["writes"] for r in rows}
    for name, sentence in sentences.items():
        show(f"{name:>10}: {PROMPT} {sentence}")
    show(
        "proof: relative logit error of the folded model before rounding (fp32). true bits: all stored bits "
        "per rounded weight of the layers. file: all weights. gyro-w2 rounds the embedding too, to 4 bits, and is here "
        "with --effort light; without it, it is better and takes longer (docs/results)."
    )
    (out / "demo.json").write_text(json.dumps({"original": reference, "rows": rows}, indent=1))
    LOG.print(f"{duration(time.perf_counter() - started)}; the models are in {out}", highlight=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    manifest, measured = row["manifest"], row["measured"]
    proof = manifest["proof"]
    low, high = measured["perplexity_interval"]
    return (
        row["name"],
        f"{proof['relative_logit_error']:.1e}" if proof["tokens"] else "-",
        f"{manifest['bits']['per_weight']:.3f}",
        f"{manifest['bits']['bytes']['total'] / 1e6:.0f} MB",
        f"{measured['perplexity']:,.0f}",
        f"{low:,.0f} to {high:,.0f}",
        f"{measured['kl']:.2f}",
        duration(manifest["seconds"]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="Start again, even if an earlier demo was interrupted.")
    try:
        main(parser.parse_args().fresh)
    except (AssetError, gq.GyroquantError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
