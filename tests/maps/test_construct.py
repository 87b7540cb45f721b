"""Hadamard matrices: every order that real models need, and a clear refusal elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gyroquant as gq
from gyroquant.errors import MapError
from gyroquant.maps.construct import factors, kronecker, largest_constructible, split
from gyroquant.maps.galois import jacobsthal, prime_power

# Hidden and feed-forward sizes of published models.
ORDERS = [
    *(576, 768, 896, 960, 1152, 1536, 2560, 3072, 4864, 5632, 8960, 9728, 11008),
    *(13824, 14336, 17408, 18944, 25600, 29568),
]


@pytest.mark.parametrize("n", ORDERS + [2**k for k in range(17)])
def test_every_order_of_real_models_exists(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    h = gq.maps.hadamard(n)
    y = h.apply(x)
    assert torch.allclose(h.inverse().apply(y), x, atol=1e-9)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("n", [2, 12, 20, 28, 36, 44, 60, 76, 100, 148, 172, 576, 924])
def test_matrices_are_hadamard(n: int) -> None:
    found = factors(n)
    assert found is not None
    h = kronecker(found).astype(np.int64)
    assert set(np.unique(h)) == {-1, 1}
    assert np.array_equal(h @ h.T, n * np.eye(n, dtype=np.int64))
    assert (h[0] == 1).all()
    assert (h[:, 0] == 1).all()


def test_all_orders_up_to_256_but_the_seven_unreachable_ones() -> None:
    missing = [n for n in range(4, 257, 4) if factors(n) is None]
    assert missing == [92, 116, 156, 184, 188, 232, 236]


@given(st.integers(1, 40000))
@settings(max_examples=200, deadline=None)
def test_factors_multiply_to_the_order(n: int) -> None:
    found = factors(n)
    if found is not None:
        left, right = split(n)
        assert np.prod(found or (1,)) == n == np.prod(left or (1,)) * np.prod(right or (1,))
        assert sorted(left + right) == sorted(found)


def test_kronecker_factorisations_are_all_searched() -> None:
    assert factors(29568) == (44, 28, 12, 2)  # the first divisor found would leave 924


@pytest.mark.parametrize("n", [92, 37, 6, 1234, 0, -4])
def test_a_missing_order_names_a_block_size_that_works(n: int) -> None:
    with pytest.raises(MapError) as caught:
        gq.maps.hadamard(n)
    if n > 0 and largest_constructible(n) > 1:
        assert f"blocks of {largest_constructible(n)}" in str(caught.value)
        gq.maps.hadamard(largest_constructible(n))


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 81, 121, 125, 343])
def test_jacobsthal_over_prime_powers(q: int) -> None:
    j = jacobsthal(q).astype(np.int64)
    assert np.array_equal(j @ j.T, q * np.eye(q, dtype=np.int64) - 1)
    assert (j.sum(1) == 0).all()
    assert np.array_equal(j, j.T if q % 4 == 1 else -j.T)


def test_jacobsthal_refuses_what_is_no_field() -> None:
    with pytest.raises(ValueError, match="12 is not"):
        jacobsthal(12)
    assert prime_power(1) is None
    assert prime_power(64) == (2, 6)


@pytest.mark.parametrize("n", [2, 4, 8, 64, 512])
def test_walsh_is_the_walsh_matrix(n: int) -> None:
    w = gq.maps.walsh(n).dense()
    assert torch.equal(w, w.T)
    assert (w[1:].sign() != w[:-1].sign()).sum(0).tolist() == list(range(n))


@pytest.mark.parametrize("n", [12, 576, 172])
def test_walsh_of_other_orders_sorts_by_sign_changes(n: int) -> None:
    w = gq.maps.walsh(n).dense()
    changes = (w[1:].sign() != w[:-1].sign()).sum(0)
    assert (changes.diff() >= 0).all()
    assert changes[0] == 0
    assert torch.allclose(w @ w.T, torch.eye(n, dtype=w.dtype), atol=1e-12)
