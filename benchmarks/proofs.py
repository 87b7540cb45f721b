"""The proof of every recipe on a real model: relative logit error and the worst block, in fp32, on the text.

    python benchmarks/proofs.py [MODEL --text FILE] [--recipes ...] [--json FILE]

Maps that are learned take two steps on eight windows of 64 tokens: it is the fold that is proved. Recipes that fold
nothing have nothing to prove and are left out; BBT's matrix gain, which is in no recipe, comes last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gyroquant as gq
from gyroquant.recipes.presets import preset_names

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

MORE = {"matrix gain": {"transform": {"qk": {"method": "head_pca", "online": True}}, "weights": {"bits": 4}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--recipes", nargs="+", default=[*preset_names(), *MORE])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.model is None:
        import assets

        given.model, given.text = assets.model(), assets.texts()[0]
    where = {"gguf_file": given.model.name} if given.model.is_file() else {}
    folder = given.model.parent if where else given.model
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    rows = []
    print("| recipe | relative logit error | worst block's | seconds |\n|---|--:|--:|--:|")
    for name in given.recipes:
        recipe = gq.load_recipe(MORE.get(name, name), ["weights.group_size=64", "calibration.nsamples=16"])
        if not recipe.transform:
            continue
        if recipe.learn is not None:
            short = ["learn.steps=2", "calibration.nsamples=8", "calibration.seqlen=64"]
            recipe = gq.load_recipe(name, ["weights.group_size=64", *short])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        started = time.perf_counter()
        proof = gq.transform(model, recipe, given.text, tokenizer)
        rows.append({"recipe": name, "relative_logit_error": proof.relative_logit_error})
        rows[-1] |= {"worst_block_error": proof.worst_block_error, "tokens": proof.tokens}
        took = time.perf_counter() - started
        print(f"| {name} | {proof.relative_logit_error:.1e} | {proof.worst_block_error:.1e} | {took:.0f} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
