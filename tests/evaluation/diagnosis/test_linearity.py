"""R^2 of a linear map on held-out tokens."""

import pytest
import torch

from gyroquant.evaluation.diagnosis.hidden_states import BlockStates
from gyroquant.evaluation.diagnosis.linearity import linear_r2, replaceability


def inputs(tokens: int, hidden: int) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0))


def test_an_affine_map_is_replaced_exactly_and_its_square_is_not() -> None:
    x = inputs(4000, 8)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    linear = x @ weight + 3
    assert linear_r2(x, linear) == pytest.approx(1, abs=1e-4)
    assert linear_r2(x, (x @ weight).square()) == pytest.approx(0, abs=0.05)


def test_noise_of_equal_power_leaves_half() -> None:
    x = inputs(8000, 8)
    noise = torch.randn(8000, 8, generator=torch.Generator().manual_seed(2))
    assert linear_r2(x, x + noise) == pytest.approx(0.5, abs=0.02)


def test_few_tokens_for_the_width_are_fitted_with_a_larger_ridge() -> None:
    x = inputs(120, 64)  # 60 tokens fit 64 features: without a ridge the error is far above the variance
    noise = torch.randn(120, 64, generator=torch.Generator().manual_seed(4))
    found = linear_r2(x, 0.5 * x + noise)
    assert found is not None
    assert -0.1 < found < 0.2


def test_an_orthogonal_change_of_basis_changes_nothing() -> None:
    x = inputs(600, 8)
    out = (x @ torch.ones(8, 8)).relu()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    assert linear_r2(x @ turn, out @ turn) == pytest.approx(linear_r2(x, out), abs=1e-6)


def test_what_cannot_be_measured_is_none() -> None:
    x = inputs(100, 8)
    assert linear_r2(x[:7], x[:7]) is None
    assert linear_r2(x, torch.zeros(100, 8)) is None
    assert linear_r2(x * torch.nan, x) is None
    assert linear_r2(x, x.clone().index_fill(0, torch.tensor([99]), torch.inf)) is None


def test_the_first_token_of_a_window_is_left_out() -> None:
    before = inputs(400, 8).view(20, 20, 8).clone()
    before[:, 0] *= 1e4
    after = before.clone()
    after[:, 1:] *= 3
    after[:, 0] += 1e6 * inputs(20, 8)
    found = replaceability(BlockStates(5, before, after, before, after, before, before, after))
    assert (found["block"], found["tokens"]) == (5, 380)
    assert found["original"] == pytest.approx(1, abs=1e-3)
    assert found["rounded"] is None
