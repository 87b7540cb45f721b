"""Quantizes and saves a model with auto-round's public API, and loads it again with transformers.

python auto_round.py MODEL TOKENS OUT --bits 2 --group-size 64 --seed 0 --settings '{"iters": 200}' --report FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "shared"))  # python -I does not search the folder of a script

import torch
from auto_round import AutoRound
from reloading import Work, by_identity
from transformers import AutoModelForCausalLM, AutoRoundConfig


def main() -> None:
    """Quantizes, saves, reloads, reports."""
    work = Work(__doc__, ("auto-round",))
    given, tokens = work.given, work.tokens
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    inputs = {name: layer.in_features for name, layer in linears.items()}
    biased = {name for name, layer in linears.items() if layer.bias is not None}
    quantizer = AutoRound(
        model,
        work.tokenizer,
        scheme=f"W{given.bits}A16",
        group_size=given.group_size,
        sym=given.symmetric,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        seed=given.seed,
        device_map="cpu",
        **given.settings,
    )
    # by default it packs, writes and frees block by block, so no model is left in memory to compare a reload with
    _, folder = quantizer.quantize_and_save(str(work.files), format="auto_round")
    work.stop_clock()
    del quantizer, model, linears

    # auto-round writes 4-bit codes with zero points in AWQ's layout, which only auto-round's own library reads on a CPU
    backend = "ark" if given.bits == 4 and not given.symmetric else "torch"
    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, quantization_config=AutoRoundConfig(backend=backend)
    ).eval()
    work.set_reference(reloaded, "reloaded")
    layers = {}
    for name, layer in reloaded.named_modules():
        if hasattr(layer, "qweight"):
            if backend == "torch":
                layer.scales = layer.scales.float()  # otherwise products of codes and scales are rounded to 16 bits
            bias = layer.bias if name in biased else None  # some kernels add a bias of zeros
            layers[name] = by_identity(layer, inputs[name], bias), bias
    work.finish(reloaded, layers)


if __name__ == "__main__":
    main()
