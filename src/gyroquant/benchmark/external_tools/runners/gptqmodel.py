"""Quantizes, saves and loads a model with the public API of GPTQModel.

python gptqmodel.py MODEL TOKENS OUT --bits 4 --group-size 64 --seed 0 --settings '{"rotation": "hadamard"}'
    --report FILE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "shared"))  # python -I does not search the folder of a script
if (os.cpu_count() or 1) < 3:  # GPTQModel makes one worker then, but needs two
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from reloading import Work, by_identity


def main() -> None:
    """Quantizes, saves, reloads, reports."""
    work = Work(__doc__, ("gptqmodel",))
    given, tokens = work.given, work.tokens
    config = QuantizeConfig(
        bits=given.bits, group_size=given.group_size, sym=given.symmetric, device="cpu", **given.settings
    )
    model = GPTQModel.load(str(given.model), config, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    model.quantize(rows, batch_size=1)
    model.save(str(work.files))
    work.stop_clock()
    del model  # its layers are packed as on the disk, so it gives what a reload gives

    # the kernels of GPTQModel do not support fp32
    loaded = GPTQModel.load(str(work.files), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
    reloaded = loaded.model.eval()
    work.set_reference(reloaded, "reloaded")
    reloaded.float()  # otherwise products of codes and scales are rounded to 16 bits
    layers = {}
    for name, layer in reloaded.named_modules():
        if hasattr(layer, "qweight"):
            layers[name] = by_identity(layer, layer.in_features, layer.bias), layer.bias
    work.finish(reloaded, layers)


if __name__ == "__main__":
    main()
