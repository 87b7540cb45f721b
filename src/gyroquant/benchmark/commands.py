"""The commands that repeat a comparison and each of its runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gyroquant.benchmark.kinds import RECIPE
from gyroquant.benchmark.runs import ComparisonSpec, Run
from gyroquant.benchmark.sizes import exact
from gyroquant.benchmark.texts import EvaluationText
from gyroquant.evaluation.perplexity import PRESETS


@dataclass(frozen=True)
class ComparisonRequest:
    """The part of a comparison's request that its results depend on.

    model: the model as the user named it.
    spec: the grid of runs.
    calibration: the calibration text as the user named it.
    tests: the texts to measure on, by name.
    dtype: the dtype of evaluation. Default "float32".
    """

    model: str
    spec: ComparisonSpec
    calibration: str
    tests: Mapping[str, EvaluationText]
    dtype: str = "float32"

    def command(self, threads: int) -> str:
        """The shell command of the comparison. `threads`: threads of each run."""
        spec = self.spec
        words = ["gyroquant", "compare", self.model, "OUT", "--recipes", ",".join(spec.recipes)]
        words += ["--external-tools", ",".join(spec.external_tools)] if spec.external_tools else []
        for option, values in (
            ("--bits", spec.bits or ()),
            ("--sizes", [exact(size) for size in spec.budgets]),
            ("--group-size", spec.group_sizes),
        ):
            words += [option, ",".join(map(str, values))] if values else []
        words += ["--symmetric"] if spec.symmetric else []
        words += ["--seeds", str(len(spec.seeds)), "--nsamples", str(spec.nsamples), "--seqlen", str(spec.seqlen)]
        words += ["--effort", spec.effort] if spec.effort else []
        words += [word for change in spec.changes for word in ("--set", change)]
        words += ["--keep-activations"] if spec.keep_activations else []
        words += [] if spec.add_bos else ["--no-bos"]
        words += ["--text", self.calibration, *_test_options(self.tests)]
        words += ["--tasks", ",".join(spec.tasks)] if spec.tasks else []
        words += ["--task-limit", str(spec.task_limit)] if spec.task_limit else []
        words += ["--task-seed", str(spec.task_seed)] if spec.task_seed else []
        words += ["--task-text", spec.task_text] if spec.task_text else []
        words += ["--dtype", self.dtype] if self.dtype != "float32" else []
        return shlex.join([*words, "--threads", str(threads)])

    def with_command(self, run: Run, threads: int) -> Run:
        """The run with its shell command. For an external tool this is a comparison of that tool alone."""
        if run.kind == RECIPE:
            return run
        spec = replace(
            self.spec,
            recipes=("rtn",),
            external_tools=(f"{run.name.partition(':')[0]}:{run.settings['variant']}",),
            bits=(run.size.bits,),
            sizes=(),
            group_sizes=(run.size.group_size,),
            seeds=tuple(range(run.seed + 1)),
            effort=None,  # these three options apply to recipes only
            changes=(),
            keep_activations=False,
        )
        return replace(run, command=replace(self, spec=spec).command(threads))


def _test_options(tests: Mapping[str, EvaluationText]) -> list[str]:
    """The options for the texts, each once, and for their windows."""
    presets = {way: name for name, way in PRESETS.items()}
    words = [word for source in dict.fromkeys(test.source for test in tests.values()) for word in ("--test", source)]
    for window, windows in dict.fromkeys((test.window, test.windows) for test in tests.values()):
        if (window, windows) in presets:
            words += ["--preset", presets[window, windows]]
        else:
            words += ["--window", str(window), *(["--windows", str(windows)] if windows else [])]
    return words


__all__ = ["ComparisonRequest"]
