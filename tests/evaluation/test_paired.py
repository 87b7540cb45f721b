"""Differences are judged window by window, and nobody on the front is beaten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyroquant.evaluation.paired import front, paired

BASE = [2.0, 2.4, 1.8, 2.2, 2.1, 2.3, 1.9, 2.5]


def test_a_difference_in_every_window_is_significant_and_one_that_cancels_is_not() -> None:
    better = paired([x - 0.1 for x in BASE], BASE)
    assert better["significant"]
    assert better["difference"] == pytest.approx(-0.1)
    assert better["p"] == 2 / 2**8  # the smallest that eight windows can give
    noise = [x + (0.1 if i % 2 else -0.1) for i, x in enumerate(BASE)]
    assert not paired(noise, BASE)["significant"]
    assert paired(noise, BASE)["p"] > 0.5
    assert not paired(BASE[:4], [x + 1 for x in BASE[:4]])["significant"]  # and four can give none that counts
    many = paired([0.1] * 100, [0.0] * 100)
    assert many["p"] == 1 / 10_000
    assert paired(BASE, BASE) == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0, "significant": False}


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.floats(1, 5), st.floats(0, 9)), min_size=1))
def test_nothing_on_the_front_is_beaten_and_all_else_is(points: dict[str, tuple[float, float]]) -> None:
    kept = front(points)
    for key, (bits, gap) in points.items():
        beaten = any(b <= bits and g <= gap and (b, g) != (bits, gap) for b, g in points.values())
        if key in kept:
            assert not beaten
        else:
            assert any(points[k][0] <= bits and points[k][1] <= gap for k in kept)
