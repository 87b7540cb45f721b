"""Nothing is lost: whenever a run dies, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import fault_injection
import pytest
from fault_injection import Fault

EVERY = "learned, measured, tuned and finished"
STAGES = (
    *("opened.json", "measured.safetensors", "learning.safetensors", "proof.json", "tuning.safetensors"),
    *("block-00000.json", "block-00001.json", "finetuning.safetensors", "done.json", "out"),
)
"""Files of the journal of that recipe, in the order in which its stages write them, and the folder at the end."""
Runs = dict[str, tuple[dict[str, Any], int]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], corpus: Path) -> Runs:
    """By recipe, what an undisturbed run gives and how many steps it takes."""
    found: Runs = {}
    for name in fault_injection.RECIPES:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        code, steps = fault_injection.disturbed(
            None, partial(fault_injection.quantize, folders["llama"], out, corpus, name)
        )
        assert code == 0
        found[name] = (fault_injection.content(out), steps)
    return found


def lost(fault: Fault, name: str, folders: dict[str, Path], corpus: Path, place: Path, undisturbed: Runs) -> str:
    """What a fault has cost; nothing when the second run ends as the undisturbed one."""
    out, (wanted, _) = place / "out", undisturbed[name]
    code, _ = fault_injection.disturbed(fault, partial(fault_injection.quantize, folders["llama"], out, corpus, name))
    if code not in (0, 3, -signal.SIGKILL):
        return f"the run ended with {code}"
    if not code and isinstance(fault.at, str):
        return f"no file is called {fault.at}"
    if code:
        done = out.exists() and not (place / ".out.journal").exists()  # killed at the very end
        code, _ = fault_injection.disturbed(
            None, partial(fault_injection.quantize, folders["llama"], out, corpus, name)
        )
        if code and not done:
            return f"the second run ended with {code}"
    left = sorted(path.name for path in place.iterdir())
    if code == 0 and not {*left} <= {"out", ".out.lock", ".out.journal"}:
        return f"{left} was left"
    return "" if fault_injection.content(out) == wanted else "the result is another"


def assert_nothing_is_lost(
    faults: Iterable[Fault], name: str, place: Path, folders: Any, corpus: Path, undisturbed: Runs
) -> None:
    for number, fault in enumerate(faults):
        assert not lost(fault, name, folders, corpus, place / str(number), undisturbed), fault


def spread(steps: int, killed: int, full: int) -> list[Fault]:
    """A run is killed at so many of its steps, and its disk is full at so many, at equal distances."""
    assert steps > 40
    kills = [Fault("kill", at, before=at % 2 == 0) for at in range(1, steps, steps // killed)]
    return kills + [Fault("full", at) for at in range(1, steps, steps // full)]


@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_is_killed_in_a_stage_ends_with_the_same_bytes(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, undisturbed: Runs
) -> None:
    """Before or after a file of that stage has its name."""
    fault = Fault("kill", name, before=STAGES.index(name) % 2 == 0)
    assert_nothing_is_lost([fault], EVERY, tmp_path, folders, corpus, undisturbed)


@pytest.mark.parametrize(
    ("name", "killed", "full"), [("rtn", 2, 2), pytest.param("gptq", 2, 2, marks=pytest.mark.slow), (EVERY, 1, 5)]
)
def test_a_run_that_ends_anywhere_ends_with_the_same_bytes(
    name: str, killed: int, full: int, folders: dict[str, Path], corpus: Path, tmp_path: Path, undisturbed: Runs
) -> None:
    faults = spread(undisturbed[name][1], killed, full)
    assert_nothing_is_lost(faults, name, tmp_path, folders, corpus, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", fault_injection.RECIPES)
def test_a_run_that_ends_at_any_of_many_steps_ends_with_the_same_bytes(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, undisturbed: Runs
) -> None:
    faults = spread(undisturbed[name][1], 20, 20)
    assert_nothing_is_lost(faults, name, tmp_path, folders, corpus, undisturbed)
