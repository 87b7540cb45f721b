"""The command that makes a comparison again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from gyroquant.comparison.cells import Wanted
from gyroquant.comparison.shared import Trial
from gyroquant.evaluation.perplexity import PRESETS


def again(
    model: str, wanted: Wanted, calibration: str, tests: Mapping[str, Trial], dtype: str, threads: int | None
) -> str:
    """A line for a shell with everything that results depend on."""
    words = ["gyroquant", "compare", model, "OUT", "--recipes", ",".join(wanted.recipes)]
    words += ["--opponents", ",".join(wanted.opponents)] if wanted.opponents else []
    for option, values in (("--bits", wanted.bits), ("--group-size", wanted.group_sizes)):
        words += [option, ",".join(map(str, values))]
    words += ["--symmetric"] if wanted.symmetric else []
    words += ["--seeds", str(len(wanted.seeds)), "--nsamples", str(wanted.nsamples), "--seqlen", str(wanted.seqlen)]
    words += ["--effort", wanted.effort] if wanted.effort else []
    words += [word for change in wanted.changes for word in ("--set", change)]
    words += ["--keep-activations"] if wanted.keep_activations else []
    words += ["--text", calibration, *_measured_on(tests)]
    words += ["--tasks", ",".join(wanted.tasks)] if wanted.tasks else []
    words += ["--task-limit", str(wanted.task_limit)] if wanted.task_limit else []
    words += ["--dtype", dtype] if dtype != "float32" else []
    return shlex.join(words + (["--threads", str(threads)] if threads else []))


def _measured_on(tests: Mapping[str, Trial]) -> list[str]:
    """The texts, each once, and the ways in which every one of them is cut into windows."""
    presets = {way: name for name, way in PRESETS.items()}
    words = [word for source in dict.fromkeys(test.source for test in tests.values()) for word in ("--test", source)]
    for way in dict.fromkeys((test.window, test.windows) for test in tests.values()):
        if way in presets:
            words += ["--preset", presets[way]]
        else:
            window, windows = way
            words += ["--window", str(window), *(["--windows", str(windows)] if windows else [])]
    return words


__all__ = ["again"]
