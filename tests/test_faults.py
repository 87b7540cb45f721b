"""Nothing is lost: whenever a run dies, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import fault_injection
import pytest
from fault_injection import Fault

EVERY = "learned, measured, tuned and finished"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], corpus: Path) -> dict[str, object]:
    """By recipe, what an undisturbed run gives and how many steps it takes."""
    found: dict[str, object] = {}
    for name in fault_injection.RECIPES:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        code, steps = fault_injection.disturbed(
            None, partial(fault_injection.quantize, folders["llama"], out, corpus, name)
        )
        assert code == 0
        found[name] = (fault_injection.content(out), steps)
    return found


def lost(
    fault: Fault, name: str, folders: dict[str, Path], corpus: Path, place: Path, undisturbed: dict[str, object]
) -> str:
    """What a fault has cost; nothing when the second run ends as the undisturbed one."""
    out, (wanted, _) = place / "out", undisturbed[name]
    code, _ = fault_injection.disturbed(fault, partial(fault_injection.quantize, folders["llama"], out, corpus, name))
    if code not in (0, 3, -signal.SIGKILL):
        return f"the run ended with {code}"
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


@pytest.mark.parametrize("name", fault_injection.RECIPES)
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    _, steps = undisturbed[name]  # type: ignore[misc]
    assert steps > 40
    points = range(1, steps, max(1, steps // 9))
    for number in points:
        fault = Fault("kill", number, before=number % 2 == 0)
        assert not lost(fault, name, folders, corpus, tmp_path / str(number), undisturbed), fault
    for number in points:
        fault = Fault("full", number)
        assert not lost(fault, name, folders, corpus, tmp_path / f"full-{number}", undisturbed), fault
