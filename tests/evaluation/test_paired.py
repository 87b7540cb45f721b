"""Differences are judged window by window, and nobody on the front is beaten."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from gyroquant.evaluation.paired import LEVEL, front, max_t, mcnemar, paired

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


def test_one_candidate_is_a_pair_and_none_is_nothing() -> None:
    for seed in range(5):
        noise = (0.2 + torch.randn(8 + 3 * seed, generator=torch.Generator().manual_seed(seed)).double()).tolist()
        assert max_t({"a": noise}, [0.0] * len(noise)) == {"a": paired(noise, [0.0] * len(noise))["p"]}
    assert max_t({}, BASE) == {}


def test_neither_one_that_is_far_worse_nor_one_that_is_the_same_hides_who_is_better() -> None:
    found = {
        "better": [x - 0.1 - 0.01 * i for i, x in enumerate(BASE)],
        "lost": [x + 9 + 0.3 * i for i, x in enumerate(BASE)],
        "same": BASE,
    }
    assert max_t(found, BASE) == {"better": 2 / 2**8, "lost": 2 / 2**8, "same": 1.0}


def test_the_best_of_many_is_seldom_significant_by_chance_and_a_real_one_is_found() -> None:
    chance, zero = torch.Generator().manual_seed(0), [0.0] * 8
    draws = torch.randn(1000, 25, 8, generator=chance, dtype=torch.float64)

    def adjusted(draw: torch.Tensor) -> dict[str, float]:
        return max_t({str(i): one for i, one in enumerate(draw.tolist())}, zero)

    wrong = [min(adjusted(draw).values()) < LEVEL for draw in draws]
    assert 0.03 < sum(wrong) / len(wrong) < 0.06  # 12 of 256 turnings: 0.047
    alone = [paired(draw[draw.mean(1).argmin()].tolist(), zero)["significant"] for draw in draws[:200]]
    assert sum(alone) / len(alone) > 0.2
    draws[:, 0] -= 4  # standard deviations
    right = [adjusted(draw)["0"] < LEVEL for draw in draws[:200]]
    assert sum(right) / len(right) > 0.95


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_are_not_compared(loss: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        paired([loss, *BASE[1:]], BASE)
    with pytest.raises(ValueError, match="not finite"):
        max_t({"a": BASE, "b": BASE}, [loss, *BASE[1:]])


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.floats(1, 5), st.floats(0, 9)), min_size=1))
def test_nothing_on_the_front_is_beaten_and_all_else_is(points: dict[str, tuple[float, float]]) -> None:
    kept = front(points)
    for key, (bits, gap) in points.items():
        beaten = any(b <= bits and g <= gap and (b, g) != (bits, gap) for b, g in points.values())
        if key in kept:
            assert not beaten
        else:
            assert any(points[k][0] <= bits and points[k][1] <= gap for k in kept)


ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12)


def test_differences_that_cancel_are_no_evidence() -> None:
    """Their mean is 0 but for rounding, and no combination of signs has a smaller one."""
    ours, theirs = [0.0, 1, 0, 0, 1, 1, 0, 0], [0.0, 0, 0, 1, 0, 0, 1, 1]
    assert paired(ours, theirs)["p"] == 1


@given(ANSWERS)
def test_the_test_on_answers_is_that_on_windows(answers: list[tuple[float, float]]) -> None:
    """With so few items `paired` tries all signs, which is McNemar's exact test."""
    ours, theirs = (list(side) for side in zip(*answers, strict=True))
    found, expected = mcnemar(ours, theirs), paired(ours, theirs)
    assert found["p"] == pytest.approx(expected["p"])
    assert found["difference"] == pytest.approx(expected["difference"])
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert mcnemar(theirs, ours)["interval"] == pytest.approx([-end for end in found["interval"][::-1]])


def test_only_items_that_one_model_gets_right_count() -> None:
    ours, theirs = [1.0] * 9 + [0.0] * 2 + [1.0] * 50, [0.0] * 9 + [1.0] * 2 + [1.0] * 50
    found = mcnemar(ours, theirs)
    assert (found["gained"], found["lost"]) == (9, 2)
    assert found["p"] == pytest.approx(binomtest(2, 11).pvalue)
    assert mcnemar(ours, ours) | {"interval": None} == {
        "difference": 0.0,
        "interval": None,
        "p": 1.0,
        "significant": False,
        "gained": 0,
        "lost": 0,
    }
    assert mcnemar(ours, ours)["interval"][1] > 0.01  # no difference seen is not no difference


@pytest.mark.parametrize(("gained", "lost"), [(0.02, 0.02), (0.05, 0.1), (0.01, 0.2)])
def test_the_interval_of_a_paired_difference_covers(gained: float, lost: float) -> None:
    cells = np.random.default_rng(0).choice(3, (800, 200), p=[gained, lost, 1 - gained - lost])
    covered = [
        low <= gained - lost <= high
        for row in cells
        for low, high in [mcnemar((row != 1).astype(float).tolist(), (row != 0).astype(float).tolist())["interval"]]
    ]
    assert 0.93 < np.mean(covered) < 0.99


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 0.0]), ([0.5], [1.0])])
def test_other_numbers_than_right_and_wrong_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="1 \\(right\\) or 0 \\(wrong\\)"):
        mcnemar(ours, theirs)
