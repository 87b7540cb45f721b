"""GPTQ's factor of the inverse second moments: made in place, against Cholesky, inverse, Cholesky as the paper's code.

    python benchmarks/inverse_factor.py [N ...]

Both in fp64, in turn in the same run, three rounds; time is the processor's, memory what the process grows by.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gyroquant.rounding.factor import inverse_factor
from gyroquant.system.environment import forget_peak, peak_memory_bytes, resident_memory_bytes

DAMP = 0.01


def long_way(gram: Tensor, damp: float) -> Tensor:
    """Cholesky, inverse, Cholesky."""
    h = gram.double()
    h.diagonal().add_(damp * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def main() -> None:
    """Prints a row for every order."""
    table = Table("order", "time, of the long way's", "bytes per entry", "the long way's", "largest difference")
    for n in map(int, sys.argv[1:] or (1536, 4096, 8192)):
        x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, n)
        gram = x.T @ x / n
        gram = (gram + gram.T) / 2
        seconds: list[list[float]] = [[], []]
        grown: list[list[float]] = [[], []]
        for _ in range(3):
            made = []
            for which, way in enumerate((inverse_factor, long_way)):
                before, begun = resident_memory_bytes(), time.process_time()
                forget_peak()
                made.append(way(gram, DAMP))
                seconds[which].append(time.process_time() - begun)
                grown[which].append((peak_memory_bytes() - before) / n**2)
            difference = float((made[0] - made[1]).abs().max() / made[1].abs().max())
        ratio = median(seconds[0]) / median(seconds[1])
        table.add_row(str(n), f"{ratio:.2f}", *(f"{max(found):.1f}" for found in grown), f"{difference:.0e}")
    Console().print(table)


if __name__ == "__main__":
    main()
