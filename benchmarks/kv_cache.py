"""What a packed KV cache holds, beside transformers' own cache for the same tokens, and what rounding it does.

    python benchmarks/kv_cache.py [MODEL --text FILE --validation FILE] [--bits 8 4 3 2] [--tokens 256] [--json FILE]

Weights have 8 bits; `quarot` rotates values and, after RoPE, queries and keys. Perplexity is that of the rounded cache,
16 windows of 1024 tokens of the validation text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
PROMPT = "The history of the city begins with"


def full_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values of all layers."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def measure(model: Path, text: Path, validation: Path, recipe: str, bits: int, tokens: int) -> dict[str, Any]:
    """Bytes of both caches after the same tokens, and the perplexity with the rounded one."""
    changes = ["weights.bits=8", "weights.solver=rtn", f"kv_cache.bits={bits}"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        pipeline.run(prepare(model, out, gq.load_recipe(recipe, changes), text))
        loaded, tokenizer = gq.load(out, dtype="bfloat16"), AutoTokenizer.from_pretrained(out)
        ids = tokenizer(PROMPT, return_tensors="pt")
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        packed, full = gq.PackedKVCache(loaded), DynamicCache()
        ours = loaded.generate(**ids, past_key_values=packed, **settings)
        theirs = loaded.generate(**ids, past_key_values=full, **settings)
        scores = gq.evaluate(out, validation, window=1024, windows=16)
    row = {"recipe": recipe, "bits": bits, "packed": packed.nbytes, "bfloat16": full_bytes(full)}
    return row | {"same_tokens": bool(torch.equal(ours, theirs)), "perplexity": scores["perplexity"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--recipes", nargs="+", default=["rtn", "quarot"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.model is None:
        import assets

        given.model, (given.text, given.validation) = assets.model(), assets.texts()
    print("| recipe | bits | packed | bfloat16 | ratio | same tokens | perplexity |\n|---|--:|--:|--:|--:|---|--:|")
    rows = []
    for recipe in given.recipes:
        for bits in given.bits:
            row = measure(given.model, given.text, given.validation, recipe, bits, given.tokens)
            rows.append(row)
            sizes = f"{row['packed'] / 1e3:.0f} kB | {row['bfloat16'] / 1e3:.0f} kB"
            ratio, same = row["packed"] / row["bfloat16"], "yes" if row["same_tokens"] else "no"
            print(f"| {recipe} | {bits} | {sizes} | {ratio:.3f} | {same} | {row['perplexity']:.2f} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
