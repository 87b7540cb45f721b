"""`make check` finds the tests of what changed."""

from __future__ import annotations

from pathlib import Path

from changed import ALWAYS, selected

SOURCE = Path("src/gyroquant")


def test_a_module_brings_the_tests_that_mirror_it() -> None:
    assert selected([SOURCE / "maps/construct.py"]) == sorted(["tests/maps/test_construct.py", *ALWAYS])


def test_a_module_is_found_by_its_name() -> None:
    found = selected([SOURCE / "system/environment.py"])
    assert found == sorted(["tests/system/test_environment.py", *ALWAYS])
    assert "tests/system/test_worker_pool.py" in selected([SOURCE / "system/worker_pool.py"])


def test_a_module_that_is_only_used_through_its_room_brings_the_room() -> None:
    found = set(selected([SOURCE / "grids/integer.py"])) - set(ALWAYS)
    assert found == {str(path) for path in Path("tests/grids").glob("test_*.py")}


def test_tests_bring_themselves_and_nothing_else_is_run() -> None:
    assert selected([Path("tests/test_security.py"), Path("benchmarks/ablation.py")]) == sorted(
        ["tests/test_security.py", *ALWAYS]
    )


def test_every_room_has_tests() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"testing"}
    assert all(any((Path("tests") / room).rglob("test_*.py")) for room in rooms)
