"""Peak memory of a quantization against the depth of the model: synthetic Llamas of equal blocks.

    python benchmarks/memory_by_depth.py [--depths 8 16 32] [--hidden 1024] [--json FILE]

Every model is made and quantized in a process of its own; what is compared is the peak of the quantizing process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MAKE = """
import sys, torch
from transformers import LlamaConfig, AutoModelForCausalLM
depth, hidden, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = LlamaConfig(vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=depth,
    num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=2048,
    tie_word_embeddings=False)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
"""
QUANTIZE = """
import sys, json, torch
sys.path.insert(0, {tests!r})
import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
import tiny_models
folder, out, recipe = sys.argv[1:]
loaded = gq.load_recipe(recipe, ["weights.bits=2", "calibration.nsamples=16", "calibration.seqlen=256"])
job = prepare(folder, out, loaded, [tiny_models.prose(20000)], tokenizer=tiny_models.tokenizer())
print(json.dumps(pipeline.run(job)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--recipes", nargs="+", default=["rtn", "gsr", "quarot"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tests = str(Path(__file__).parent.parent / "tests" / "helpers")
    rows: list[dict[str, object]] = []
    print("| blocks | weights (bf16) | " + " | ".join(given.recipes) + " |\n|--:|--:|" + "--:|" * len(given.recipes))
    for depth in given.depths:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            subprocess.run([sys.executable, "-c", MAKE, str(depth), str(given.hidden), str(folder)], check=True)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            peaks = {}
            for recipe in given.recipes:
                code = QUANTIZE.format(tests=tests)
                command = [sys.executable, "-c", code, str(folder), str(Path(scratch) / recipe), recipe]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peaks[recipe] = json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]
            rows.append({"blocks": depth, "weights": size, **peaks})
            shown = " | ".join(f"{peaks[recipe] / 1e6:.0f} MB" for recipe in given.recipes)
            print(f"| {depth} | {size / 1e6:.0f} MB | {shown} |", flush=True)
    growth = {recipe: rows[-1][recipe] / rows[0][recipe] - 1 for recipe in given.recipes}  # type: ignore[operator]
    print(
        "\ngrowth of the peak from the shallowest to the deepest: "
        + ", ".join(f"{r} {g:+.1%}" for r, g in growth.items())
    )
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "growth": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
