"""All methods on the same model, text, grid and evaluation, with true bits, time and memory, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gyroquant.comparison.cells import Wanted
from gyroquant.comparison.run import Limits, run
from gyroquant.comparison.texts import Trial, trials
from gyroquant.errors import InputError
from gyroquant.evaluation.perplexity import PRESETS, cut
from gyroquant.progress import Stages

Texts = str | Path | Sequence[str | Path]


def compare(
    model: str | Path,
    recipes: Sequence[str],
    out: str | Path,
    calibration: str | Path,
    test: Texts = "wikitext2",
    *,
    presets: Sequence[str] = ("bbt",),
    window: int | None = None,
    max_windows: int | None = None,
    dtype: str = "float32",
    limits: Limits | None = None,
    environments: str | Path | None = None,
    make_environments: bool = False,
    merge: Iterable[str | Path] = (),
    progress: Stages | None = None,
    **grid: Any,
) -> dict[str, Any]:
    """Runs recipes and other programs head to head and judges them; returns what it writes as `comparison.json`.

    `out` is the folder of results: every cell is a file there, named by what makes it, beside the same comparison as
    `comparison.md` and as a page, `index.html`. A second call runs only what is missing, a killed one goes on where it
    was; `merge` takes over the results of other folders. A name such as `gyro` stands for gyro-w2 at 2 bits, and so on;
    `rtn`, `gptq` and `gptq-act-order` on the model as it is are always among the recipes. `grid` is what they are
    crossed with, and how: opponents, bits, group_sizes, symmetric, seeds (how many), nsamples, seqlen, tasks,
    task_limit, effort, changes, keep_activations, add_bos, as in `comparison.cells.Wanted`.

    Every cell of a seed calibrates on the same windows of `calibration`, and is measured on each text of `test` in the
    windows of each of `presets`, which `window` and `max_windows` override (see `evaluate`), against the original.
    Opponents run in environments of their own in the folder `environments`, made on demand with `make_environments`.

    Raises GyroquantError for whatever cannot be right, before any work. A cell that fails is a row that says why.
    """
    return run(
        model,
        Wanted(recipes=list(recipes), seeds=tuple(range(grid.pop("seeds", 1))), **grid),
        out,
        calibration,
        _trials([test] if isinstance(test, (str, Path)) else test, presets, window, max_windows),
        dtype=dtype,
        limits=limits or Limits(),
        environments=None if environments is None else Path(environments),
        make_environments=make_environments,
        merge=merge,
        progress=progress,
    )


def _trials(
    texts: Sequence[str | Path], presets: Sequence[str], window: int | None, count: int | None
) -> dict[str, Trial]:
    """What is measured on what, by a name for people."""
    if count is not None and len(presets) > 1:
        raise InputError(f"--windows goes with one --preset, not with {' and '.join(presets)}")
    names = {way: preset for preset, way in PRESETS.items()}
    ways = dict.fromkeys(cut(preset, window, count) for preset in presets)
    return trials(texts, {names.get(way, f"{way[1] or 'all'} windows of {way[0]}"): way for way in ways})


__all__ = ["Limits", "Wanted", "compare"]
