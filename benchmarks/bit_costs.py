"""What bits are worth in each layer, by gradient and measured: do they order the choices alike, and at what cost?

    python benchmarks/bit_costs.py MODEL --text CALIBRATION [--recipe gyro-w2] [--nsamples 4 16]

The measured costs are those of 2 windows. Seconds are of the processor, in this process. The summed divergence is that
of the bits that each way chooses, by the measured costs of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import gyroquant as gq
from gyroquant.pipeline.bit_allocation import allocate
from gyroquant.pipeline.job import Job, prepare
from gyroquant.report.console import ConsoleProgress


def allocation(given: argparse.Namespace, costs: str, nsamples: int) -> tuple[dict[str, Any], float]:
    """What an allocation finds, and the seconds that it takes."""
    changes = [f"weights.allocate.costs={costs}", f"weights.allocate.nsamples={nsamples}"]
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(given.model, Path(scratch) / "out", gq.load_recipe(given.recipe, changes), given.text)
        started = time.process_time()
        found = allocate(Job.begin(job.spec), ConsoleProgress(), print)
        return found, time.process_time() - started


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default="gyro-w2")
    parser.add_argument("--nsamples", type=int, nargs="+", default=[4, 16])
    given = parser.parse_args()
    measured, seconds = allocation(given, "measured", 2)
    costs = measured["divergence"]
    choices = [(layer, bits) for layer, each in costs.items() for bits in each]

    def summed(bits: dict[str, int]) -> float:
        return sum(costs[layer][str(width)] for layer, width in bits.items())

    fewest = sum(next(iter(each.values())) for each in costs.values())
    print(f"{len(choices)} choices; summed divergence of the fewest bits everywhere: {fewest:.3f}")
    print("| | rank correlation | summed divergence of its choice | CPU seconds |\n|---|--:|--:|--:|")
    print(f"| measured, 2 windows | 1 | {summed(measured['bits']):.3f} | {seconds:.0f} |")
    for nsamples in given.nsamples:
        found, seconds = allocation(given, "gradient", nsamples)
        order = spearmanr(*([one[layer][bits] for layer, bits in choices] for one in (costs, found["divergence"])))
        row = f"{order.statistic:.3f} | {summed(found['bits']):.3f} | {seconds:.0f}"
        print(f"| by gradient, {nsamples} windows | {row} |", flush=True)


if __name__ == "__main__":
    main()
