"""The acceptance rate is 1 minus the total variation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gyroquant.evaluation.diagnosis.acceptance import acceptance

NUMBERS = st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8).filter(lambda values: sum(values) > 0.1)


def test_known_distributions_have_their_known_total_variation() -> None:
    first = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    second = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
    assert acceptance(first, second).tolist() == [0.75, 0.0, 1.0]


@given(NUMBERS, NUMBERS)
def test_it_is_the_sum_of_the_smaller_probabilities_in_either_order(first: list[float], second: list[float]) -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) / sum(x) for x in (first, second))
    rate = float(acceptance(p, q))
    assert rate == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)
    assert rate == float(acceptance(q, p))
    assert float(acceptance(p, p)) == 1


def test_what_is_not_a_number_is_never_accepted() -> None:
    assert float(acceptance(torch.tensor([torch.nan, 1.0]), torch.tensor([0.5, 0.5]))) == 0
