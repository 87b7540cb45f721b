"""All methods on the same model, text, grid and evaluation, with true bits, time and memory, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gyroquant.comparison.cells import Wanted
from gyroquant.comparison.run import Limits, run
from gyroquant.comparison.shared import Trial
from gyroquant.errors import InputError
from gyroquant.evaluation.perplexity import PRESETS
from gyroquant.progress import Stages


def compare(
    model: str | Path,
    recipes: Sequence[str],
    out: str | Path,
    calibration: str | Path,
    test: str | Path | Sequence[str | Path] = "wikitext2",
    *,
    presets: Sequence[str] = ("bbt",),
    window: int | None = None,
    max_windows: int | None = None,
    opponents: Sequence[str] = (),
    bits: Sequence[int] = (2, 3, 4),
    group_sizes: Sequence[int] = (64,),
    symmetric: bool = False,
    seeds: int = 1,
    nsamples: int = 64,
    seqlen: int = 512,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    effort: str | None = None,
    changes: Sequence[str] = (),
    keep_activations: bool = False,
    dtype: str = "float32",
    budget: float | None = None,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    environments: str | Path | None = None,
    make_environments: bool = False,
    merge: Iterable[str | Path] = (),
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Runs recipes and other programs head to head and judges them; returns what it writes as `comparison.json`.

    `out` is the folder of results: every cell of recipes x bits x group sizes x seeds is a file there, named by what
    makes it, beside the same comparison as `comparison.md` and as a page, `index.html`. A second call runs only what is
    missing, a killed one goes on where it was; `merge` takes over the results of other folders. A name such as `gyro`
    stands for gyro-w2 at 2 bits, and so on; `rtn` and `gptq` on the model as it is are always among the recipes. The
    rounding of activations and cache is taken out of recipes unless `keep_activations`.

    Every cell calibrates on the same windows of `calibration`, and is measured on each text of `test` in the windows of
    each of `presets` (see `evaluate`), or of `window` and `max_windows`, against the original; and in `tasks` of
    lm-evaluation-harness, on the first `task_limit` questions of each. `budget` is in seconds: no cell is begun that
    would not be done by then. At most `workers` cells run at once, as far as memory has room; `ray` is a cluster's
    address, or ``local``. Opponents run in environments of their own in the folder `environments`, made on demand with
    `make_environments`.

    Raises GyroquantError for whatever cannot be right, before any work. A cell that fails is a row that says why.
    """
    texts = [test] if isinstance(test, (str, Path)) else list(test)
    for preset in presets:
        if preset not in PRESETS:
            raise InputError(f"there is no preset {preset!r}; presets are {', '.join(PRESETS)}")
    if seeds < 1:
        raise InputError(f"seeds is {seeds}, and has to be at least 1")
    ways = {preset: PRESETS[preset] for preset in presets}
    if window or max_windows:
        window = window or PRESETS["standard"][0]
        ways = {f"{max_windows or 'all'} windows of {window}": (window, max_windows)}
    tests = {f"{Path(text).name}, {way}": Trial(str(text), *ways[way]) for text in texts for way in ways}
    wanted = Wanted(
        recipes=list(recipes),
        opponents=list(opponents),
        bits=list(bits),
        group_sizes=list(group_sizes),
        symmetric=symmetric,
        seeds=list(range(seeds)),
        nsamples=nsamples,
        seqlen=seqlen,
        tasks=list(tasks),
        task_limit=task_limit,
        effort=effort,
        changes=list(changes),
        keep_activations=keep_activations,
    )
    return run(
        model,
        wanted,
        out,
        calibration,
        tests,
        dtype=dtype,
        limits=Limits(budget, workers, threads, ray),
        environments=None if environments is None else Path(environments),
        make_environments=make_environments,
        merge=merge,
        progress=progress,
    )


__all__ = ["compare"]
