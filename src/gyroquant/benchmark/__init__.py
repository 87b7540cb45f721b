"""Compares methods on the same model, text, grid and evaluation: true bits, time and memory, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gyroquant.benchmark.execute import Limits, run_comparison
from gyroquant.benchmark.runs import ComparisonSpec
from gyroquant.benchmark.texts import EvaluationText, evaluation_texts
from gyroquant.errors import InputError
from gyroquant.evaluation.perplexity import PRESETS, cut
from gyroquant.registry import nearest
from gyroquant.system.deprecation import renamed
from gyroquant.system.progress import Progress

Texts = str | Path | Sequence[str | Path]


@renamed(calibration="text", max_windows="windows", opponents="external_tools")
def compare(
    model: str | Path,
    recipes: Sequence[str],
    out: str | Path,
    text: str | Path,
    test: Texts = "wikitext2",
    *,
    presets: Sequence[str] = ("bbt",),
    window: int | None = None,
    windows: int | None = None,
    dtype: str = "float32",
    limits: Limits | None = None,
    environments: str | Path | None = None,
    make_environments: bool = False,
    merge: Iterable[str | Path] = (),
    progress: Progress | None = None,
    **grid: Any,
) -> dict[str, Any]:
    """Runs recipes and external tools head to head. Returns the content of `comparison.json`.

    model: a name on the hub, a folder or a GGUF file.
    recipes: names. `gyro` stands for gyro-w2 at 2 bits, and so on. `rtn`, `gptq` and `gptq-act-order`, without
        rotations, are always among them.
    out: the folder of results. It gets one file per run, named by the digest of the run's settings, and the comparison
        as `comparison.json`, as `comparison.md` and as a page, `index.html`.
    text: the calibration text. All runs of a seed calibrate on the same windows of it.
    test: the texts to measure on, against the original. Default "wikitext2".
    presets: how to cut them into windows: "bbt" (default), "standard", or both.
    window: tokens in a window. Default: the preset's.
    windows: at most this many windows. Default: the preset's number.
    dtype: the dtype of evaluation: "float32" (default), "bfloat16" or "float16".
    limits: time, workers and threads, see `Limits`. Default: no limit of time, one worker.
    environments: the folder of the external tools' environments. Default: $GYROQUANT_ENVIRONMENTS, or the user's
        cache.
    make_environments: install external tools that are missing there. Default False.
    merge: other folders whose results to take over. Default: none.
    grid: the other fields of `ComparisonSpec`: external_tools, bits, sizes, group_sizes, symmetric, seeds (a number),
        nsamples, seqlen, tasks, task_limit, task_seed, task_text, effort, changes, keep_activations, add_bos.

    A second call runs only the missing runs. A call after an interruption continues. Raises GyroquantError before any
    work if the request is not valid. A run that fails is a row with the reason.
    """
    known = [field.name for field in fields(ComparisonSpec)]
    for name in grid:
        if name not in known:
            raise TypeError(
                f"compare() got an unexpected keyword argument {name!r}; did you mean {nearest(name, known)!r}?"
            )
    seeds = grid.pop("seeds", 1)
    if not isinstance(seeds, int):
        raise InputError(f"--seeds is the number of seeds, such as 3, not a list of them ({seeds!r})")
    return run_comparison(
        model,
        ComparisonSpec(recipes=list(recipes), seeds=tuple(range(seeds)), **grid),
        out,
        text,
        _evaluation_texts([test] if isinstance(test, (str, Path)) else test, presets, window, windows),
        dtype=dtype,
        limits=limits or Limits(),
        environments=None if environments is None else Path(environments),
        make_environments=make_environments,
        merge=merge,
        progress=progress,
    )


def _evaluation_texts(
    texts: Sequence[str | Path], presets: Sequence[str], window: int | None, count: int | None
) -> dict[str, EvaluationText]:
    """The texts to measure on with their windows, by readable names."""
    if count is not None and len(presets) > 1:
        raise InputError(f"--windows goes with one --preset, not with {' and '.join(presets)}: give one of them")
    names = {cutting: preset for preset, cutting in PRESETS.items()}
    cuttings = dict.fromkeys(cut(preset, window, count) for preset in presets)
    return evaluation_texts(
        texts,
        {names.get(cutting, f"{cutting[1] or 'all'} windows of {cutting[0]}"): cutting for cutting in cuttings},
    )


__all__ = ["ComparisonSpec", "Limits", "compare"]
