"""A box plot of perplexity over the seeds of random rotations, from the table.json that spinquant.py wrote.

    python benchmarks/paper_tables/seeds_plot.py FOLDER/table.json docs/results/spinquant.svg

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter


def main() -> None:
    """Draws and writes the file."""
    source, target = map(Path, sys.argv[1:])
    table = json.loads(source.read_text())
    values, lines = defaultdict(list), {}
    for cell in table["cells"]:
        if (cell["setting"], cell["solver"]) == ("W4A4KV4", "rtn"):
            values[cell["rotation"]].append(cell["perplexity"])
    for name in [name for name, found in values.items() if len(found) == 1]:
        lines[name] = values.pop(name)[0]
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    labels = [name.replace(", ", ",\n", 1) for name in values]
    axes.boxplot(list(values.values()), tick_labels=labels, widths=0.4, medianprops={"color": "tab:red"})
    for number, found in enumerate(values.values(), 1):
        axes.plot([number] * len(found), found, "o", color="tab:blue", alpha=0.6, markersize=4)
    for name, value in lines.items():
        axes.axhline(value, linestyle="--", color="gray", linewidth=1, zorder=0)
        axes.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("perplexity")
    axes.set_title("SmolLM2-135M-Instruct, W4A4KV4, rounding to nearest: every dot is a seed", fontsize=11)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
