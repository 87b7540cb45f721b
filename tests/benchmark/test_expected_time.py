"""What a run is expected to take."""

from __future__ import annotations

from typing import Any

import pytest

from gyroquant.benchmark.expected_time import expected_seconds


def done(name: str, seconds: float, kind: str = "recipe", **measured: float) -> dict[str, Any]:
    return {"kind": kind, "name": name, "measured": {"seconds": seconds, **measured}}


THERE = [
    done("rtn", 1.0, wall_seconds=5.0),
    done("gptq", 10.0, wall_seconds=20.0),
    done("gptq", 12.0, wall_seconds=30.0),
    done("gyro-w2", 100.0, wall_seconds=150.0),
    done("gsr-w2g64", 40.0),
    done("nncf: GPTQ", 70.0, "opponent", wall_seconds=90.0),
]


@pytest.mark.parametrize(
    ("kind", "name", "seconds"),
    [
        ("recipe", "gptq", 30.0),  # the longest of its name, all of it
        ("recipe", "gyro-w3", 150.0),  # a family's names hold their bits
        ("recipe", "gsr-w3g32", 40.0),  # a result without the time of the whole run
        ("recipe", "gyro-w3 (light)", 150.0),  # unknown: the longest of all recipes
        ("opponent", "nncf: data-free", 90.0),
    ],
)
def test_a_run_takes_as_long_as_the_longest_like_it(kind: str, name: str, seconds: float) -> None:
    assert expected_seconds(kind, name, THERE) == seconds


def test_what_nothing_is_known_of_takes_as_long_as_anything_and_nothing_at_first() -> None:
    assert expected_seconds("opponent", "nncf: GPTQ", THERE[:4]) == 150.0
    assert expected_seconds("recipe", "rtn", []) == 0.0
