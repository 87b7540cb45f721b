"""Our SignRound beside Intel's auto-round: the same model, windows of text, iterations, batch, group and grid.

    python benchmarks/auto_round_parity.py MODEL --text FILE --evaluate FILE [FILE ...] --python PYTHON [--iters 50]
        [--nsamples 32] [--seqlen 512] [--batch-size 8] [--bits 2] [--group-size 64] [--blocks N] [--json FILE]

PYTHON is an interpreter with auto-round in it (a virtual environment of its own: `pip install -c constraints.txt torch
auto-round`). Each side runs in its own process, one after the other; both results are measured by the same code, on
windows of 1,024 tokens. Both store the same: codes, fp16 scales, zero points of as many bits as codes. `--blocks` cuts
the model off after its first N blocks. Seconds are those of the processor, so that the machine need not be idle.
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

from safetensors.torch import save_file

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare

SIDE = Path(__file__).with_name("auto_round_side.py")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--windows", type=int, default=8)
    for name, value in (("iters", 50), ("nsamples", 32), ("seqlen", 512), ("batch-size", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # this process is our side: quantize to here
    return parser.parse_args()


def recipe(given: argparse.Namespace) -> gq.Recipe:
    changes = [f"weights.bits={given.bits}", f"weights.group_size={given.group_size}"]
    changes += [f"weights.tune.iters={given.iters}", f"weights.tune.batch_size={given.batch_size}"]
    changes += [f"calibration.nsamples={given.nsamples}", f"calibration.seqlen={given.seqlen}"]
    return gq.load_recipe("signround", changes)


def plain_folder(job: Job, folder: Path, blocks: int | None) -> Path:
    """The model, or its first blocks, as transformers saves it, for a side that does not read what we read."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(job.store.config, dtype=torch.float32)
    with torch.no_grad():
        for name in job.store.shapes:
            model.get_parameter(name).copy_(job.store.read([name])[name])
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:blocks]
    model.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    return folder


def run(command: list[str]) -> dict[str, Any]:
    """Runs a side, showing what it says; returns the last line that it prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    given = arguments()
    if given.ours is not None:
        manifest = pipeline.run(prepare(given.model, given.ours, recipe(given), given.text))
        measured = {key: manifest[key] for key in ("peak_memory_bytes", "bits")}
        print(json.dumps(measured | {"seconds": time.process_time()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        job = prepare(given.model, here / "ours", recipe(given), given.text)
        assert job.tokens is not None
        save_file({"tokens": job.tokens}, here / "tokens.safetensors")
        model = plain_folder(job, here / "model", given.blocks)
        arguments_of_ours = [str(model) if word == str(given.model) else word for word in sys.argv]
        ours = run([sys.executable, *arguments_of_ours, "--ours", str(here / "ours")])
        options = [f"--{name}={getattr(given, name.replace('-', '_'))}" for name in ("bits", "group-size", "iters")]
        options += [f"--batch-size={given.batch_size}"]
        side = [given.python, str(SIDE), str(model), str(here / "tokens.safetensors"), str(here / "theirs"), *options]
        theirs = run(side)
        found = {"gyroquant SignRound": ours, "auto-round": theirs | {"bits": ours["bits"]}}
        for folder, one in zip(("ours", "theirs"), found.values(), strict=True):
            for text in given.evaluate:
                scores = gq.evaluate(here / folder, text, against=model, window=1024, windows=given.windows)
                one[text.name] = {
                    key: scores[key] for key in ("perplexity", "perplexity_interval", "kl", "kl_interval")
                }
    print(table(found, [text.name for text in given.evaluate]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, dict[str, Any]], texts: list[str]) -> str:
    """Both sides as Markdown, times and memory as ratios to auto-round's."""
    head = "".join(f" perplexity, {text} | KL |" for text in texts)
    lines = [
        f"| | true bits |{head} CPU seconds | ratio | peak memory | ratio |",
        "|---|--:|" + "--:|" * (2 * len(texts) + 4),
    ]
    unit = found["auto-round"]
    for name, one in found.items():
        scores = "".join(f" {one[text]['perplexity']:.1f} | {one[text]['kl']:.3f} |" for text in texts)
        times, memory = one["seconds"] / unit["seconds"], one["peak_memory_bytes"] / unit["peak_memory_bytes"]
        bits, size = one["bits"]["per_weight"], one["peak_memory_bytes"] / 1e9
        lines.append(
            f"| {name} | {bits:.3f} |{scores} {one['seconds']:.0f} | {times:.2f} | {size:.2f} GB | {memory:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
