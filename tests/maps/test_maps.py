"""What every map must satisfy, whatever its kind. A new kind of map adds one line to MAPS."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant import maps
from gyroquant.errors import MapError

GENERATOR = torch.Generator().manual_seed(5)
MAPS: dict[str, Callable[[], maps.Map]] = {
    "identity": lambda: maps.Identity(24),
    "hadamard": lambda: maps.hadamard(24),
    "hadamard transposed": lambda: maps.hadamard(24).transpose(),
    "walsh": lambda: maps.walsh(24),
    "signs": lambda: maps.random_signs(24, GENERATOR),
    "diagonal": lambda: maps.Diagonal(torch.rand(24, generator=GENERATOR) + 0.5),
    "permutation": lambda: maps.Permutation(torch.randperm(24, generator=GENERATOR)),
    "householder": lambda: maps.Householder(torch.randn(24, generator=GENERATOR)),
    "pairs": lambda: maps.PairRotation(24, 3 * torch.randn(12, generator=GENERATOR)),
    "interleaved pairs of some": lambda: maps.PairRotation(24, torch.randn(5, generator=GENERATOR), interleaved=True),
    "orthogonal": lambda: maps.random_orthogonal(24, GENERATOR),
    "dense": lambda: maps.Dense(torch.randn(24, 24, generator=GENERATOR, dtype=torch.float64) + 4 * torch.eye(24)),
    "blocks": lambda: maps.blocks(maps.walsh(8), 24),
    "butterfly": lambda: maps.blocks(maps.Butterfly(torch.randn(3, 4, generator=GENERATOR)), 24),
    "butterfly inverted": lambda: maps.blocks(maps.Butterfly(torch.randn(3, 4, generator=GENERATOR)).inverse(), 24),
    "unequal blocks": lambda: maps.BlockDiagonal((maps.hadamard(8), maps.random_orthogonal(4, GENERATOR)), 2),
    "across": lambda: maps.Across(maps.hadamard(4), 6),
    "across, of blocks": lambda: maps.Across(maps.BlockDiagonal((maps.random_orthogonal(3, GENERATOR),), 2), 4),
    "product": lambda: maps.random_signs(24, GENERATOR) @ maps.hadamard(24) @ maps.Diagonal(torch.arange(1.0, 25.0)),
    "fixing ones": lambda: maps.fixing_ones(maps.random_signs(24, GENERATOR) @ maps.hadamard(24)),
    "fixing ones in blocks": lambda: maps.fixing_ones(maps.blocks(maps.walsh(8), 24)),
}


@pytest.fixture(params=list(MAPS))
def m(request: pytest.FixtureRequest) -> maps.Map:
    return MAPS[request.param]()


def eye() -> torch.Tensor:
    return torch.eye(24, dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-9)


def test_apply_is_the_product_with_the_matrix(m: maps.Map) -> None:
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    assert close(m.apply(x), x @ m.dense())


def test_in_fp32_it_does_the_same_to_fp32_vectors(m: maps.Map) -> None:
    x, single = torch.randn(5, 24), m.in_fp32()
    assert torch.allclose(single.apply(x), m.apply(x), rtol=1e-5, atol=1e-5)
    assert single.storage_bits() <= m.storage_bits()
    assert single.orthogonal == m.orthogonal
    arrays: dict[str, torch.Tensor] = {}
    maps.dump(single, arrays)
    assert all(array.dtype != torch.float64 for array in arrays.values())


def test_apply_along_any_dimension(m: maps.Map) -> None:
    x = torch.randn(24, 5, dtype=torch.float64)
    assert close(m.apply(x, 0), m.dense().T @ x)
    assert close(m.apply(x[None], 1), (m.dense().T @ x)[None])


def test_inverse_transpose_and_contragredient(m: maps.Map) -> None:
    dense = m.dense()
    assert close(m.inverse().dense() @ dense, eye())
    assert close(dense @ m.inverse().dense(), eye())
    assert close(m.transpose().dense(), dense.T)
    assert close(m.contragredient().dense() @ dense.T, eye())


def test_a_changed_basis_leaves_a_linear_layer_the_same(m: maps.Map) -> None:
    x, w = torch.randn(7, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    assert close(m.apply(x) @ m.contragredient().apply(w, 1).T, x @ w.T)


def test_what_it_says_of_itself_is_true(m: maps.Map) -> None:
    dense = m.dense()
    assert m.orthogonal == close(dense @ dense.T, eye())
    assert m.diagonal == close(dense, torch.diag(dense.diagonal()))
    assert m.permuting == (set(dense.unique().tolist()) <= {0.0, 1.0})
    assert m.n == 24
    assert m.cost >= 0


def test_composition(m: maps.Map) -> None:
    other = maps.hadamard(24)
    assert close((m @ other).dense(), m.dense() @ other.dense())
    assert close((other @ m).dense(), other.dense() @ m.dense())
    assert close((m @ m.inverse()).dense(), eye())


def test_save_and_load(m: maps.Map) -> None:
    arrays: dict[str, torch.Tensor] = {}
    again = maps.load(maps.dump(m, arrays), arrays)
    assert torch.equal(again.dense(), m.dense())
    assert (m.storage_bits() > 0) == bool(arrays)


def test_dtype_and_shape_are_kept(m: maps.Map) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert m.apply(torch.zeros(2, 24, dtype=dtype)).dtype == dtype
    assert m.apply(torch.zeros(0, 24)).shape == (0, 24)


def test_a_wrong_size_is_refused(m: maps.Map) -> None:
    with pytest.raises(MapError, match="size 23"):
        m.apply(torch.zeros(2, 23))


def test_pairs_are_those_of_their_layout_and_turn_one_way() -> None:
    angles = torch.tensor([0.3, -1.2], dtype=torch.float64)
    for interleaved, pairs in ((False, ((0, 2), (1, 3))), (True, ((0, 1), (2, 3)))):
        dense = maps.PairRotation(5, angles, interleaved).dense()
        wanted = torch.eye(5, dtype=torch.float64)
        for angle, (a, b) in zip(angles, pairs, strict=True):
            c, s = angle.cos(), angle.sin()
            wanted[a, a], wanted[a, b], wanted[b, a], wanted[b, b] = c, s, -s, c
        assert close(dense, wanted)
        assert float(torch.linalg.det(dense)) == pytest.approx(1)


def test_fixing_ones_fixes_the_ones() -> None:
    ones = torch.ones(24, dtype=torch.float64)
    for name in ("fixing ones", "fixing ones in blocks"):
        assert close(MAPS[name]().apply(ones), ones)
    already = maps.Permutation(torch.arange(24).flip(0))
    assert maps.fixing_ones(already) is already


def test_fixing_ones_keeps_blocks_apart() -> None:
    dense = maps.fixing_ones(maps.blocks(maps.walsh(8), 24)).dense()
    assert dense[:8, 8:].abs().max() == 0


@given(st.integers(1, 300), st.sampled_from([8, 12, 96, 512]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_many_rows_are_applied_like_one(rows: int, n: int, walsh: bool) -> None:
    m = maps.walsh(n) if walsh else maps.hadamard(n)
    x = torch.randn(rows, n, dtype=torch.float64)
    assert close(m.apply(x)[-1], m.apply(x[-1]))


def test_rows_beyond_one_piece() -> None:
    x = torch.randn(3000, 512)
    assert torch.allclose(maps.hadamard(512).apply(x), x @ maps.hadamard(512).dense(torch.float32), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: maps.Diagonal(torch.tensor([1.0, 0.0])), "nonzero"),
        (lambda: maps.Permutation(torch.tensor([0, 0, 1])), "missing or doubled"),
        (lambda: maps.Dense(torch.zeros(2, 3)), "square"),
        (lambda: maps.Butterfly(torch.zeros(3, 8)), r"shape \(k, 2\^\(k-1\)\), not \(3, 8\)"),
        (lambda: maps.butterfly(24), "not 24; use blocks of 8"),
        (lambda: maps.butterfly(1), "power of two, not 1$"),
        (lambda: maps.product(maps.Identity(2), maps.hadamard(4)), "one order"),
        (lambda: maps.PairRotation(6, torch.zeros(4)), "4 pairs do not fit into 6"),
        (lambda: maps.blocks(maps.hadamard(8), 20), "do not divide"),
        (lambda: maps.load({"kind": "mystery"}, {}), "unknown kind"),
        (lambda: maps.load({"kind": "signs", "values": {"array": "gone"}}, {}), "missing"),
    ],
)
def test_impossible_maps_are_refused(make: Callable[[], maps.Map], what: str) -> None:
    with pytest.raises(MapError, match=what):
        make()


def test_gradients_reach_many_vectors_through_a_hadamard_map() -> None:
    """As many as are otherwise gone through in pieces."""
    m = maps.hadamard(2048)
    x = torch.randn(600, 2048, requires_grad=True)
    pushed = torch.randn(600, 2048)
    m.apply(x).backward(pushed)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, m.inverse().apply(pushed))
    torch.testing.assert_close(m.apply(x.detach()), m.apply(x).detach())
