"""Prediction sets: exact thresholds, and the guarantee of their coverage."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gyroquant as gq
from gyroquant.evaluation.diagnosis.conformal import PredictionSets, least_probability


def test_the_threshold_is_the_score_of_the_conformal_rank() -> None:
    right = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.4, 0.8, 0.6])  # scores 0.1 to 0.9
    assert least_probability(right, 0.9) == pytest.approx(0.1)  # rank ceil(10 * 0.9) = 9 of 9
    assert least_probability(right, 0.8) == pytest.approx(0.2)
    assert least_probability(right, 0.5) == pytest.approx(0.5)
    with pytest.raises(gq.InputError, match="9 tokens are too few"):
        least_probability(right, 0.91)


def test_sets_of_known_predictions() -> None:
    sets = PredictionSets(8, 0.6)  # 4 tokens calibrate: rank ceil(5 * 0.6) = 3, the third largest of 0.7, 0.2, 0.2, 0.1
    table = torch.tensor([0.7, 0.2, 0.1])
    sets.see(table.expand(3, 3), torch.tensor([0, 1, 1]))
    sets.see(table.expand(3, 3), torch.tensor([2, 0, 2]))  # the halves meet within a piece
    sets.see(torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]), torch.tensor([2, 1]))
    found = sets.summary()
    assert found["least_probability"] == pytest.approx(0.2)
    assert found["set_size"] == (2 + 2 + 3 + 1) / 4
    assert found["coverage"] == 2 / 4  # held: 0 of the first table, and 0.2 of the third; not 0.1 twice


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 0.9]), st.integers(20, 60))
def test_exchangeable_tokens_are_covered_as_asked(seed: int, coverage: float, half: int) -> None:
    """The mean over many splits of the coverage of one new token is at least what was asked, less sampling noise, and
    above it by at most 1 / (n + 1), as scores have no ties.
    """
    generator = torch.Generator().manual_seed(seed)
    trials = 800
    right = torch.rand(trials, half + 1, generator=generator, dtype=torch.float64)
    held = sum(float(row[-1]) >= least_probability(row[:-1], coverage) for row in right)
    noise = 5 * math.sqrt(coverage * (1 - coverage) / trials)
    assert coverage - noise <= held / trials <= coverage + 1 / (half + 1) + noise


def test_a_flatter_model_needs_larger_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 50, generator=generator)
    wanted = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    sizes = []
    for heat in (1.0, 3.0):
        sets = PredictionSets(400, 0.9)
        sets.see((logits + heat * torch.randn(400, 50, generator=generator)).softmax(1), wanted)
        sizes.append(sets.summary()["set_size"])
    assert sizes[1] > 1.2 * sizes[0]
