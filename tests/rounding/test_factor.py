"""The factor of the inverse second moments, made in place, against one made the long way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError
from gyroquant.rounding.factor import cholesky_upper_, inverse_factor, invert_upper_


def moments(n: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 2 * n, n, generator=generator) * torch.logspace(-1, 1, n)
    gram = x.T @ x / len(x)
    return (gram + gram.T) / 2  # a product in fp32 is not quite symmetric on every processor


def long_way(gram: torch.Tensor, damp: float) -> torch.Tensor:
    h = gram.double() + damp * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


@given(st.integers(1, 700), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_it_is_the_factor_of_the_inverse(n: int, seed: int) -> None:
    gram = moments(n, seed)
    before = gram.clone()
    upper = inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)
    assert upper.dtype == torch.float64
    assert torch.equal(upper, upper.triu())
    wanted = long_way(gram, 0.01)  # small elements come from large ones that nearly cancel
    torch.testing.assert_close(upper, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 513])
def test_both_steps_work_where_the_matrix_lies(n: int) -> None:
    h = moments(n).double()
    place, wanted = h.data_ptr(), h.clone()
    assert cholesky_upper_(h)
    torch.testing.assert_close(h @ h.T, wanted, rtol=1e-10, atol=1e-10)
    root = h.clone()
    assert invert_upper_(h).data_ptr() == place
    torch.testing.assert_close(h @ root, torch.eye(n, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_only_the_upper_triangle_is_read() -> None:
    h = moments(300).double()
    dirty = h.triu() + torch.full_like(h, torch.nan).tril(-1)
    cholesky_upper_(h)
    assert cholesky_upper_(dirty)
    assert torch.equal(h, dirty)


def test_damping_is_raised_with_a_warning_until_there_is_a_factor() -> None:
    gram, said = moments(40, tokens=3), list[str]()
    gram -= 1e-3 * torch.eye(40) * gram.diagonal().mean()
    upper = inverse_factor(gram, 0.0, said.append)
    assert said
    assert all("not positive definite" in text for text in said)
    assert bool(upper.isfinite().all())


def test_what_is_not_finite_is_refused() -> None:
    gram = moments(40)
    gram[3, 5] = gram[5, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        inverse_factor(gram, 0.01)


def test_nothing_seen_is_the_identity() -> None:
    assert torch.equal(inverse_factor(torch.zeros(5, 5), 0.01), torch.eye(5, dtype=torch.float64))
