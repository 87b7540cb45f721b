"""Two builds of gyroquant side by side: whether they give the same codes and scales, and how their times compare.

    python benchmarks/two_builds.py --before a241cae [--recipes gptq gsr perq ...] [--rounds 3] [--json FILE]

The build before is checked out into a temporary folder, the build after is this checkout. Both quantize the same small
random Llama through their own command line, in processes of their own, in turns. Compared are the bytes of every
safetensors file and, as a ratio, the wall time of the command (median of the rounds, each after the other build's).
`--version` and `--help` are compared in CPU seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ["gptq", "gsr", "perq", "bbt-spectral", "spinquant", "gyro-w2"]
MAKE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import tiny_models
from transformers import LlamaConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=96, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = tiny_models.randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
model.save_pretrained(sys.argv[1] + "/model")
tiny_models.tokenizer().save_pretrained(sys.argv[1] + "/model")
open(sys.argv[1] + "/text.txt", "w").write(tiny_models.prose(20000))
"""
SMALL = ["--nsamples", "32", "--seqlen", "64", "--set", "calibration.dtype=float32"]
CHANGES = {
    "spinquant": ["--set", "learn.steps=4", "--set", "learn.batch_size=2"],
    "gyro-w2": ["--set", "weights.allocate.budget=2.6"],
}


def command(source: Path, *arguments: str) -> tuple[float, float]:
    """Runs a build's command line; wall and CPU seconds."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "gyroquant", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{source}: gyroquant {' '.join(arguments)} failed:\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digest(folder: Path) -> str:
    """One sha256 over every safetensors file of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="A git revision, or a folder that holds a checkout.")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        before = Path(asked.before)
        if not before.is_dir():
            before = place / "before"
            subprocess.run(["git", "clone", "-q", str(ROOT), str(before)], check=True)
            subprocess.run(["git", "-C", str(before), "checkout", "-q", asked.before], check=True)
        builds = {"before": before / "src", "after": ROOT / "src"}
        environment = os.environ | {"PYTHONPATH": str(builds["after"])}
        make = [sys.executable, "-c", MAKE, scratch, str(ROOT / "tests" / "helpers")]
        subprocess.run(make, env=environment, check=True)
        rows = []
        for recipe in asked.recipes:
            seconds: dict[str, list[float]] = {build: [] for build in builds}
            digests: dict[str, set[str]] = {build: set() for build in builds}
            for number in range(asked.rounds):
                for build, source in builds.items():
                    out = place / f"{recipe}-{build}-{number}"
                    given = [str(place / "model"), str(out), "--recipe", recipe, "--text", str(place / "text.txt")]
                    wall, _ = command(source, "quantize", *given, *SMALL, *CHANGES.get(recipe, []))
                    seconds[build].append(wall)
                    digests[build].add(digest(out))
            same = len(digests["before"] | digests["after"]) == 1
            ratio = median(seconds["after"]) / median(seconds["before"])
            rows.append({"recipe": recipe, "same bytes": same, "time ratio": round(ratio, 3), "seconds": seconds})
            print(
                f"{recipe:14} {'same bytes' if same else 'OTHER BYTES'}   time after / before {ratio:.3f}", flush=True
            )
        for option in ("--version", "--help"):
            cpu = {b: median(command(s, option)[1] for _ in range(asked.rounds)) for b, s in builds.items()}
            ratio = cpu["after"] / cpu["before"]
            rows.append({"command": option, "cpu seconds": cpu, "ratio": round(ratio, 3)})
            print(f"{option:14} CPU seconds {cpu['before']:.2f} -> {cpu['after']:.2f}   ratio {ratio:.3f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
