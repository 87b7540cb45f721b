"""MixQuant's bound on real activations: the largest entry of the rotated input of down_proj, and what bounds it.

    python benchmarks/paper_tables/mixquant_bound.py MODEL --text FILE [--json FILE]

For each block size and permutation, means over blocks of the model: bound max_j |x_Bj|_1 / sqrt(b) and the actual
largest entry, each over the rms of x, averaged over tokens. 8 windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.calibration.observers import AbsMax, MeanAbs
from gyroquant.calibration.text import load_text, sample, tokenize
from gyroquant.evaluation.outliers import Spread
from gyroquant.maps import Identity, Permutation
from gyroquant.methods.permutations import massdiff, zigzag
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.source import open_model

SIZES = (16, 32, 64, 128, 256, 512)


class Orders:
    """A `Spread` for every block size and permutation, of what the permutation makes of an input."""

    def __init__(self, n, maps):
        self.seen = {key: (m, Spread(n, (key[0],))) for key, m in maps.items()}

    def __call__(self, x):
        for m, input_error_second_moments in self.seen.values():
            input_error_second_moments(m.apply(x))

    def mass(self, size, name):
        return self.seen[size, name][1].mass[size]


def measured(store, ids, wants):
    """Shows the wants what the model does with the tokens."""
    measure(store, FoldPlan(store.graph), wants, ids)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    store = open_model(given.model)
    ids = sample(tokenize(load_text(given.text), store.tokenizer(), store.config.vocab_size), 8, 512, 0, given.text)
    sites = find_sites(store.graph, "R4")
    first = [SiteMeasurement(site, (MeanAbs, AbsMax)) for site in sites]
    measured(store, ids, first)
    second = []
    for want in first:
        n, maps = want.site.n, {}
        mass, magnitude = want.seen[MeanAbs].value, want.seen[AbsMax].value
        for size in SIZES:
            orders = {
                "none": Identity(n),
                "random": Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(0))),
                "zigzag": Permutation(zigzag(magnitude, size)),
                "absmax": Permutation(torch.argsort(magnitude, descending=True)),
                "MassDiff": Permutation(massdiff(mass, size)),
            }
            maps |= {(size, name): m for name, m in orders.items()}
        second.append(SiteMeasurement(want.site, (partial(Orders, maps=maps),)))
    measured(store, ids, second)
    rows = []
    for size in SIZES:
        for name in ("none", "random", "zigzag", "absmax", "MassDiff"):
            seen = [next(iter(want.seen.values())) for want in second]
            bound, largest = (fmean(s.mass(size, name)[k] for s in seen) for k in (0, 1))
            rows.append({"block": size, "permutation": name, "bound": bound, "largest": largest})
    print("| block | permutation | bound / rms | largest / rms |\n|--:|---|--:|--:|")
    for row in rows:
        print(f"| {row['block']} | {row['permutation']} | {row['bound']:.2f} | {row['largest']:.2f} |")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
