"""Butterflies: what their stages are, and where they meet Hadamard matrices."""

from math import cos, pi, sin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant import maps


def parity(n: int) -> torch.Tensor:
    """-1 to the number of ones in the binary digits of 0 .. n - 1."""
    return torch.tensor([(-1) ** i.bit_count() for i in range(n)], dtype=torch.int8)


@pytest.mark.parametrize("n", [2, 4, 64, 512])
def test_with_angles_of_an_eighth_it_is_the_hadamard_matrix(n: int) -> None:
    expected = maps.Signs(parity(n)) @ maps.hadamard(n)
    assert torch.allclose(maps.butterfly(n).dense(), expected.dense(), atol=1e-12)


def test_with_angles_of_zero_it_is_the_identity() -> None:
    assert torch.equal(maps.butterfly(16, 0.0).dense(), torch.eye(16, dtype=torch.float64))


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_it_is_the_product_of_its_givens_rotations(k: int, seed: int) -> None:
    n = 2**k
    angles = torch.rand(k, n // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 * pi
    expected = torch.eye(n, dtype=torch.float64)
    for stage in range(k):
        firsts = [i for i in range(n) if not i & (1 << stage)]
        for i, angle in zip(firsts, angles[stage].tolist(), strict=True):
            givens = torch.eye(n, dtype=torch.float64)
            j = i + (1 << stage)
            givens[i, i], givens[i, j], givens[j, i], givens[j, j] = cos(angle), sin(angle), -sin(angle), cos(angle)
            expected = expected @ givens
    assert torch.allclose(maps.Butterfly(angles).dense(), expected, atol=1e-12)


def test_it_costs_n_log_n_and_stores_its_angles() -> None:
    m = maps.butterfly(256)
    assert m.cost == 2 * 256 * 8
    assert m.storage_bits() == 8 * 128 * 64


def test_its_angles_can_be_learned() -> None:
    angles = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: maps.Butterfly(a).apply(x), (angles,))
    assert torch.autograd.gradcheck(lambda a: maps.Butterfly(a).inverse().apply(x), (angles,))
