"""Divergence and agreement are those of their definitions, and the sums of one definition agree with each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gyroquant.evaluation.divergence import agreeing, mean_divergence, summed_divergence
from gyroquant.models.execution.predictions import divergence_terms, same_choice


def predictions(seed: int, tokens: int = 6, words: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple((3 * torch.randn(2, tokens, words, generator=generator)).log_softmax(-1))


@given(st.integers(0, 1000))
def test_divergence_is_that_of_torch_never_negative_and_zero_from_itself(seed: int) -> None:
    wanted, predicted = predictions(seed)
    expected = torch.nn.functional.kl_div(predicted, wanted, reduction="sum", log_target=True)
    assert torch.allclose(summed_divergence(wanted, predicted), expected, rtol=1e-5)
    assert torch.allclose(mean_divergence(wanted, predicted) * len(wanted), expected, rtol=1e-5)
    assert torch.allclose(divergence_terms(wanted, predicted).sum(), expected, rtol=1e-5)
    assert summed_divergence(wanted, predicted) >= 0
    assert summed_divergence(wanted, wanted) == 0


def test_divergence_has_a_direction() -> None:
    wanted, predicted = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()[:, None]
    assert float(mean_divergence(wanted, predicted)) == pytest.approx(0.3681, abs=1e-4)
    assert float(mean_divergence(predicted, wanted)) == pytest.approx(0.5108, abs=1e-4)


def test_top_compares_the_likeliest_words_alone() -> None:
    wanted = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    predicted = torch.tensor([[0.25, 0.15, 0.1, 0.5]]).log()
    assert float(mean_divergence(wanted, predicted, top=2)) == pytest.approx(0, abs=1e-6)  # 5 to 3 in both
    assert float(mean_divergence(wanted, predicted, top=3)) > 0
    assert torch.equal(mean_divergence(wanted, predicted, top=4), mean_divergence(wanted, predicted))


def test_gradients_reach_what_is_predicted() -> None:
    wanted, predicted = predictions(0)
    predicted.requires_grad_()
    mean_divergence(wanted, predicted).backward()
    assert predicted.grad is not None
    assert torch.allclose(predicted.grad, -wanted.exp() / len(wanted))


def test_agreement_counts_tokens_with_the_same_likeliest_word() -> None:
    wanted = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]).log()
    predicted = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.9, 0.1]]).log()
    assert same_choice(wanted, predicted).tolist() == [True, False, True]
    assert int(agreeing(wanted, predicted)) == 2
