"""LH and GSR under rounding to nearest, code by code: the same numbers in another order, but for rounding errors.

    python benchmarks/lh_and_gsr.py [MODEL --text FILE] [--bits 2]

GSR's blocks are those of LH with their columns sorted by sequency. Put in that order, codes, scales and zero points of
the two are compared; differences come from the fold, whose sums are taken in another order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import gyroquant as gq
from gyroquant.maps import sequency_order
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
BLOCK = 64


def sorted_by_sequency(weight, name):
    """Codes, scales and zero points of an LH weight in GSR's order; what writes the stream has its rows sorted."""
    dim = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
    order = torch.as_tensor(sequency_order(BLOCK))
    index = torch.cat([start + order for start in range(0, weight.codes.shape[dim], BLOCK)])
    parts = [weight.params.scale, weight.params.zero]
    if dim == 0:  # along a row, groups are whole blocks: their scales stay where they are
        parts = [part.index_select(0, index) for part in parts]
    return [weight.codes.index_select(dim, index), *parts]


def main() -> None:
    """Quantizes twice, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--bits", type=int, default=2)
    given = parser.parse_args()
    if given.model is None:
        import assets

        given.model, given.text = assets.model(), assets.texts()[0]
    changes = [f"weights.bits={given.bits}", f"weights.group_size={BLOCK}", "weights.solver=rtn"]
    different, total = [0, 0, 0], [0, 0, 0]
    with tempfile.TemporaryDirectory() as scratch:
        stores = []
        for name in ("lh", "gsr"):
            pipeline.run(prepare(given.model, Path(scratch) / name, gq.load_recipe(name, changes), given.text))
            stores.append(open_model(Path(scratch) / name))
        for name in stores[0].description["tensors"]:
            lh, gsr = (store.quantized(name) for store in stores)
            pairs = zip(sorted_by_sequency(lh, name), (gsr.codes, gsr.params.scale, gsr.params.zero), strict=True)
            for part, (ours, theirs) in enumerate(pairs):
                different[part] += int((ours != theirs).sum())
                total[part] += theirs.numel()
    for part, name in enumerate(("codes", "scales", "zero points")):
        print(f"{name}: {different[part]:,} of {total[part]:,} differ")


if __name__ == "__main__":
    main()
