"""Applying a Hadamard map against the dense product and against copying its input, as ratios in one run.

    python benchmarks/hadamard.py [--orders 512 ...] [--rows 1 ...] [--json FILE]

Each pair is timed in turn, several times over, and the median of the pairwise ratios is taken, so that a machine whose
speed drifts does not matter. `speed-up` is dense time over ours; `of bandwidth` is the time of copying the input over
ours: 1 would be as fast as memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gyroquant.maps import hadamard
from gyroquant.system.environment import versions

ORDERS = (512, 576, 768, 1536, 2048, 4096, 8960, 11008, 14336)
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
DENSE_LIMIT = 1 << 34  # multiply-adds of a dense product that are not waited for


def timed(function: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def ratios(ours: Callable[[], object], other: Callable[[], object], rounds: int = 7) -> float:
    """The median over rounds of other's time over ours, timed side by side."""
    ours(), other()
    repeats = max(1, int(0.02 / max(timed(ours, 1), 1e-7)))
    other_repeats = max(1, int(0.02 / max(timed(other, 1), 1e-7)))
    return statistics.median(timed(other, other_repeats) / timed(ours, repeats) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=ORDERS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print("| order | " + " | ".join(f"{rows} rows" for rows in given.rows) + " |")
    print("|--:|" + "--:|" * len(given.rows))
    found = []
    with torch.no_grad():
        for n in given.orders:
            m = hadamard(n)
            dense = m.dense(torch.float32)
            cells = []
            for rows in given.rows:
                x = torch.randn(rows, n)
                out = torch.empty_like(x)
                speed_up = None
                if rows * n * n <= DENSE_LIMIT:
                    speed_up = ratios(lambda x=x, m=m: m.apply(x), lambda x=x, dense=dense: x @ dense)
                bandwidth = ratios(lambda x=x, m=m: m.apply(x), lambda x=x, out=out: out.copy_(x))
                found.append({"order": n, "rows": rows, "speed_up": speed_up, "of_bandwidth": bandwidth})
                cells.append(f"{speed_up:.1f}x ({bandwidth:.2f})" if speed_up else f"- ({bandwidth:.2f})")
            print(f"| {n} | " + " | ".join(cells) + " |", flush=True)
    slowest = min(one["speed_up"] for one in found if one["speed_up"])
    print(f"\nspeed-up over the dense product (of memory bandwidth); the slowest of all is {slowest:.2f}x")
    if given.json:
        given.json.write_text(json.dumps({"cells": found, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
