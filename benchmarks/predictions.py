"""Predicted against measured memory and time of quantizations: each prediction and each run in a process of its own.

    python benchmarks/predictions.py --models DIR ... --recipes rtn gptq --text FILE [--set KEY=VALUE ...] [--json FILE]
    python benchmarks/predictions.py --synthetic 1024:2816:3 --recipes rtn gptq gyro-w2 --nsamples 16

"predicted" is what `gyroquant inspect --dry-run` says, "estimated" what `quantize` reckons without running anything,
"measured" the peak of a run. A synthetic model is a random Llama given as HIDDEN:FFN:BLOCKS, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PREDICT = """
import json, sys, tempfile
from dataclasses import asdict
from pathlib import Path
model, text, recipe, changes = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
from gyroquant.inspection.dry_run import dry_run_job
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.resources import estimate
from gyroquant.recipes.schema import load_recipe
with tempfile.TemporaryDirectory() as scratch:
    job = prepare(model, Path(scratch) / "out", load_recipe(recipe, changes), text)
    estimated = estimate(job)
    print(json.dumps({"estimated": estimated.to_dict(), "predicted": dry_run_job(job).to_dict()}))
"""
MEASURE = """
import json, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
model, text, recipe, changes = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
from gyroquant.pipeline import run as pipeline
from gyroquant.system.environment import forget_peak, peak_memory_bytes
from gyroquant.pipeline.job import prepare
from gyroquant.system.progress import Progress
from gyroquant.recipes.schema import load_recipe

class Peaks(Progress):
    '''Notes the peak of every stage and of what lies between them, and how long they take.'''
    def __init__(self):
        self.found, self.seconds, self.since = {}, {}, time.perf_counter()
    def note(self, name):
        self.found[name] = max(self.found.get(name, 0), peak_memory_bytes())
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - self.since
        self.since = time.perf_counter()
        forget_peak()
    @contextmanager
    def stage(self, name, steps):
        self.note("between")
        yield lambda: None
        self.note(name)

with tempfile.TemporaryDirectory() as scratch:
    shown = Peaks()
    job = prepare(model, Path(scratch) / "out", load_recipe(recipe, changes), text)
    manifest = pipeline.run(job, shown)
    shown.note("between")
    size = sum(path.stat().st_size for path in (Path(scratch) / "out").iterdir())
print(json.dumps({"stages": shown.found, "peak_memory_bytes": max(shown.found.values()), "disk_bytes": size,
    "seconds": manifest["seconds"], "stage_seconds": shown.seconds}))
"""
MAKE = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
hidden, ffn, blocks, folder = *map(int, sys.argv[1:4]), sys.argv[4]
config = LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
    num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=2048,
    tie_word_embeddings=False)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32000)}, unk_token="w0"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(folder)
numbers = (torch.rand(300_000) ** 3 * 31_999).long().tolist()
open(folder + "/text.txt", "w").write(" ".join(f"w{i}" for i in numbers))
"""


def process(code: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own prints as JSON in its last line, or the last line of its error."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def compared(model: str, text: str, recipe: str, changes: list[str], label: str) -> dict[str, Any]:
    """One line of the table."""
    found = process(PREDICT, model, text, recipe, *changes) | {"model": label, "recipe": recipe, "changes": changes}
    return found | {"measured": process(MEASURE, model, text, recipe, *changes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--synthetic", nargs="*", default=[], metavar="HIDDEN:FFN:BLOCKS")
    parser.add_argument("--recipes", nargs="+", default=["rtn", "gptq", "bbt-spectral", "gyro-w2", "spinquant"])
    parser.add_argument("--set", nargs="*", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--for", nargs="*", default=[], dest="special", metavar="RECIPE:KEY=VALUE")
    parser.add_argument("--nsamples", type=int)
    parser.add_argument("--text")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.models and given.text is None:
        parser.error("--models need --text")
    common = [*given.changes, *([f"calibration.nsamples={given.nsamples}"] if given.nsamples else [])]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    print("| model | recipe | predicted | estimated | measured | predicted s | measured s |")
    print("|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        models = [(name, given.text, name) for name in given.models]
        for shape in given.synthetic:
            folder = f"{scratch}/{shape.replace(':', '-')}"
            subprocess.run([sys.executable, "-c", MAKE, *shape.split(":"), folder], check=True)
            models.append((folder, f"{folder}/text.txt", shape))
        for model, text, label in models:
            for recipe in given.recipes:
                own = [one.partition(":")[2] for one in given.special if one.partition(":")[0] == recipe]
                rows.append(compared(model, text, recipe, [*common, *own], Path(label).name))
                print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """A row of the table, or why there is none."""
    measured = row["measured"]
    if "error" in row or "error" in measured:
        return f"| {row['model']} | {row['recipe']} | {row.get('error') or measured['error']} |"
    peak = measured["peak_memory_bytes"]

    def against(kind: str) -> str:
        found = row[kind]["peak_memory_bytes"]
        return f"{found / 1e6:.0f} MB ({found / peak - 1:+.0%})"

    seconds = f"{row['predicted']['seconds']:.0f} | {measured['seconds']:.0f}"
    shown = f"{against('predicted')} | {against('estimated')} | {peak / 1e6:.0f} MB | {seconds}"
    return f"| {row['model']} | {row['recipe']} | {shown} |"


if __name__ == "__main__":
    main()
