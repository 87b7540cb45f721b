"""CPU seconds and peak memory of a quantization against the size of the model: synthetic Llamas, each of four times
the weights of the one before.

    python benchmarks/cost_by_size.py [--recipe gyro-w4] [--hidden 512 1024 2048] [--blocks 4] [--nsamples 16]
        [--seqlen 512] [--json FILE]

Every model is made and quantized in a process of its own. Finetuning is left out, because its time is that of the head,
which is small here. Weights are random: they say nothing of quality, and time does not depend on them. "Reckoned" is
the peak of memory that is estimated before a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import gyroquant as gq
from gyroquant.calibration.text import TokenBatch
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.resources import estimate
from gyroquant.system.environment import versions

VOCABULARY = 4096


def config_of(hidden: int, blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def one(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantizes the model in a folder; called in a process of its own."""
    tokens = torch.randint(0, VOCABULARY, (given.nsamples, given.seqlen), generator=torch.Generator().manual_seed(0))
    changes = [f"calibration.nsamples={given.nsamples}", f"calibration.seqlen={given.seqlen}"]
    recipe = gq.load_recipe(given.recipe, [*changes, *(["finetune=null"] if given.recipe.startswith("gyro") else [])])
    job = prepare(folder, folder.with_name("out"), recipe, TokenBatch("random tokens", "0", tokens))
    reckoned, started = estimate(job).peak_memory_bytes, time.process_time()
    manifest = pipeline.run(job)
    return {
        "weights": sum(op.numel for op in job.targets.values()),
        "seconds": time.process_time() - started,
        "peak_memory_bytes": manifest["peak_memory_bytes"],
        "reckoned_bytes": reckoned,
        "stage_seconds": manifest["stage_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gyro-w4")
    parser.add_argument("--hidden", nargs="+", type=int, default=[512, 1024, 2048])
    for name, value in (("blocks", 4), ("nsamples", 16), ("seqlen", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # this process quantizes this folder
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(one(given, given.one)))
        return
    rows = []
    print("| hidden | weights | CPU seconds | microseconds a weight | to the first | peak memory | to the reckoned |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for hidden in given.hidden:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_of(hidden, given.blocks), dtype=torch.bfloat16)
            model.save_pretrained(folder)
            command = [sys.executable, *sys.argv, "--one", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1]) | {"hidden": hidden}
        rows.append(found)
        each, first = found["seconds"] / found["weights"], rows[0]["seconds"] / rows[0]["weights"]
        peak = found["peak_memory_bytes"]
        print(
            f"| {hidden} | {found['weights'] / 1e6:.1f} M | {found['seconds']:.0f} | {1e6 * each:.2f} "
            f"| {each / first:.2f} | {peak / 1e9:.2f} GB | {peak / found['reckoned_bytes']:.2f} |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
