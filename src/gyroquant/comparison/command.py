"""The commands that make a comparison, and each of its cells, again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gyroquant.comparison.cells import Cell, Wanted
from gyroquant.comparison.texts import Trial
from gyroquant.evaluation.perplexity import PRESETS


@dataclass(frozen=True)
class Asked:
    """What a comparison was asked for, as far as its results depend on it; `tests` by their names."""

    model: str
    wanted: Wanted
    calibration: str
    tests: Mapping[str, Trial]
    dtype: str = "float32"

    def again(self, threads: int) -> str:
        """A line for a shell with everything that results depend on; `threads` are those that cells ran with."""
        wanted = self.wanted
        words = ["gyroquant", "compare", self.model, "OUT", "--recipes", ",".join(wanted.recipes)]
        words += ["--opponents", ",".join(wanted.opponents)] if wanted.opponents else []
        for option, values in (("--bits", wanted.bits), ("--group-size", wanted.group_sizes)):
            words += [option, ",".join(map(str, values))]
        words += ["--symmetric"] if wanted.symmetric else []
        words += ["--seeds", str(len(wanted.seeds)), "--nsamples", str(wanted.nsamples), "--seqlen", str(wanted.seqlen)]
        words += ["--effort", wanted.effort] if wanted.effort else []
        words += [word for change in wanted.changes for word in ("--set", change)]
        words += ["--keep-activations"] if wanted.keep_activations else []
        words += [] if wanted.add_bos else ["--no-bos"]
        words += ["--text", self.calibration, *_measured_on(self.tests)]
        words += ["--tasks", ",".join(wanted.tasks)] if wanted.tasks else []
        words += ["--task-limit", str(wanted.task_limit)] if wanted.task_limit else []
        words += ["--dtype", self.dtype] if self.dtype != "float32" else []
        return shlex.join([*words, "--threads", str(threads)])

    def with_command(self, cell: Cell, threads: int) -> Cell:
        """The cell with the line that makes it: another program's is a comparison of that program alone."""
        if cell.kind == "recipe":
            return cell
        wanted = replace(
            self.wanted,
            recipes=("rtn",),
            opponents=(f"{cell.name.partition(':')[0]}:{cell.settings['variant']}",),
            bits=(cell.size.bits,),
            group_sizes=(cell.size.group_size,),
            seeds=tuple(range(cell.seed + 1)),
            effort=None,  # these three are of recipes alone
            changes=(),
            keep_activations=False,
        )
        return replace(cell, command=replace(self, wanted=wanted).again(threads))


def _measured_on(tests: Mapping[str, Trial]) -> list[str]:
    """The texts, each once, and the ways in which every one of them is cut into windows."""
    presets = {way: name for name, way in PRESETS.items()}
    words = [word for source in dict.fromkeys(test.source for test in tests.values()) for word in ("--test", source)]
    for window, windows in dict.fromkeys((test.window, test.windows) for test in tests.values()):
        if (window, windows) in presets:
            words += ["--preset", presets[window, windows]]
        else:
            words += ["--window", str(window), *(["--windows", str(windows)] if windows else [])]
    return words


__all__ = ["Asked"]
