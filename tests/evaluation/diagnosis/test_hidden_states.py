"""Errors of hidden states, token by token and block by block."""

import math

import pytest
import torch

from gyroquant.evaluation.diagnosis.hidden_states import BlockStates, StateErrors, token_errors


def test_errors_and_cosines_of_known_vectors() -> None:
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    other = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [torch.nan, 0.0], [-2.0, 0.0]])
    error, cosine = token_errors(expected, other)
    assert error.tolist() == [0, pytest.approx(math.sqrt(2)), 0, math.inf, math.inf, 2]
    assert cosine.tolist() == [1, 0, 1, 0, 0, -1]


def test_rows_are_means_over_the_tokens_of_all_windows() -> None:
    errors = StateErrors(2)
    zero, one = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    turned = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # the first token is turned by 90 degrees
    for _ in range(2):
        errors.see(BlockStates(0, zero, one, zero, one, zero, turned, one))
        errors.see(BlockStates(1, one, 2 * one, one, 2 * one, turned, 2 * turned, one + turned))
    start, rows = errors.rows()
    assert start == {"relative_error": 0, "cosine": 1}
    assert rows[0] == {
        "block": 0,
        "relative_error": pytest.approx(math.sqrt(2) / 2),
        "cosine": 0.5,
        "own_error": 0,
        "own_cosine": 1,
        "growth": None,
    }
    assert rows[1]["own_error"] == pytest.approx(math.sqrt(2) / 2)
    assert rows[1]["own_cosine"] == 0.5
    assert rows[1]["growth"] == pytest.approx(1)
