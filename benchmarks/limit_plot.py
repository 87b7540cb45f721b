"""How far the layers of a model stand above the rate-distortion limit, by solver, from ablation.py's table.json.

    python benchmarks/limit_plot.py FOLDER/table.json docs/results/limit.svg [ROW ...]

A panel for each kind of layer, blocks from left to right. Needs matplotlib.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROWS = ("RTN", "SignRound (50 steps)", "GPTQ", "rotate + target + refine", "the same, midrise, a scale a row")


def main() -> None:
    """Draws and writes the file."""
    source, target, *names = sys.argv[1:]
    cells = {cell["cell"]: cell["decibels_above_limit"] for cell in json.loads(Path(source).read_text())["cells"]}
    shown = {name: cells[name] for name in names or ROWS if name in cells}
    kinds = list(dict.fromkeys(layer.rpartition(".")[2] for layer in next(iter(shown.values()))))
    figure, panels = plt.subplots(2, 4, figsize=(12, 5.5), sharex=True, sharey=True, layout="constrained")
    for panel, kind in zip(panels.flat, kinds, strict=False):
        for name, layers in shown.items():
            found = {int(re.findall(r"\d+", one)[0]): value for one, value in layers.items() if one.endswith(kind)}
            panel.plot(list(found), list(found.values()), label=name, linewidth=1.4)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axhline(1.53, color="gray", linestyle=":", linewidth=1)
        panel.set_title(kind, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(kinds) :]:
        panel.axis("off")
    figure.supxlabel("block")
    figure.supylabel("dB above the limit")
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center", fontsize=9)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
