"""What a quantization costs, in passes of the model over the same calibration tokens, measured in one run.

    python benchmarks/forward_equivalents.py [MODEL --text FILE] [--recipes rtn gptq gsr] [--bits 2] [--json FILE]

The unit is one plain forward pass of transformers, head included, over all calibration tokens: in bfloat16 where the
processor multiplies it, else in float32. The columns are the stages of a run. What none of them takes (the fingerprint,
checksums) is in `all` only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.stages import STAGES as ALL_STAGES
from gyroquant.system.environment import native_bfloat16, versions

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
BATCH_TOKENS = 4096
STAGES = [stage.name for stage in ALL_STAGES]


def forward_seconds(model: Path, tokens: torch.Tensor) -> float:
    """One pass over all tokens, shape (samples, length)."""
    where = {"gguf_file": model.name} if model.is_file() else {}
    folder = model.parent if where else model
    dtype = torch.bfloat16 if native_bfloat16(torch.device("cpu")) else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    with torch.no_grad():
        loaded(tokens[:batch], use_cache=False)
        started = time.perf_counter()
        for start in range(0, len(tokens), batch):
            loaded(tokens[start : start + batch], use_cache=False)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["rtn", "gptq", "gsr", "quarot"])
    parser.add_argument("--bits", type=int, help="the bits of recipes without a number in their name")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.model is None:
        import assets

        given.model, given.text = assets.model(), assets.texts()[0]
    changes = [f"calibration.nsamples={given.nsamples}", f"calibration.seqlen={given.seqlen}"]
    rows, unit = [], None
    for name in given.recipes:
        bits = [] if given.bits is None or name[-1].isdigit() else [f"weights.bits={given.bits}"]
        with tempfile.TemporaryDirectory() as scratch:
            job: Job = prepare(given.model, Path(scratch) / "out", gq.load_recipe(name, changes + bits), given.text)
            if unit is None:
                assert job.tokens is not None
                unit = forward_seconds(given.model, job.tokens)
                print(f"one pass over {job.tokens.numel()} tokens: {unit:.1f} s\n")
                print(f"| recipe | {' | '.join(STAGES)} | all |\n|---|{'--:|' * (len(STAGES) + 1)}")
            manifest = pipeline.run(job)
        passes = {stage: seconds / unit for stage, seconds in manifest["stage_seconds"].items()}
        row = {"recipe": name, "passes": passes, "seconds": manifest["seconds"]}
        rows.append(row | {"forward_equivalents": manifest["seconds"] / unit})
        cells = (f"{passes[stage]:.2f}" if stage in passes else "" for stage in STAGES)
        print(f"| {name} | {' | '.join(cells)} | {manifest['seconds'] / unit:.2f} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"unit": unit, "rows": rows, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
