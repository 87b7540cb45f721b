"""The contract of maps, for every kind that is registered, and what is special about some."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant import maps
from gyroquant.errors import MapError
from gyroquant.maps import Map
from gyroquant.testing import check_map, parametrize_with_checks

GENERATOR = torch.Generator().manual_seed(5)
MAPS: dict[str, Callable[[], maps.Map]] = {
    "blocks": lambda: maps.blocks(maps.walsh(8), 24),
    "butterfly": lambda: maps.blocks(maps.Butterfly(torch.randn(3, 4, generator=GENERATOR)), 24),
    "unequal blocks": lambda: maps.BlockDiagonal((maps.hadamard(8), maps.random_orthogonal(4, GENERATOR)), 2),
    "across, of blocks": lambda: maps.KroneckerLeft(maps.BlockDiagonal((maps.random_orthogonal(3, GENERATOR),), 2), 4),
    "product": lambda: maps.random_signs(24, GENERATOR) @ maps.hadamard(24) @ maps.Diagonal(torch.arange(1.0, 25.0)),
    "fixing ones": lambda: maps.preserve_mean(maps.random_signs(24, GENERATOR) @ maps.hadamard(24)),
    "fixing ones in blocks": lambda: maps.preserve_mean(maps.blocks(maps.walsh(8), 24)),
}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-9)


@parametrize_with_checks(Map.registry)
def test_every_map_keeps_its_contract(instance: Map, check: Any) -> None:
    check(instance)


@pytest.mark.parametrize("name", MAPS)
def test_composed_maps_keep_the_contract(name: str) -> None:
    check_map(MAPS[name]())


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
    assert maps.preserve_mean(already) is already


def test_fixing_ones_keeps_blocks_apart() -> None:
    dense = maps.preserve_mean(maps.blocks(maps.walsh(8), 24)).dense()
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
        (lambda: maps.load({"kind": "mystery"}, {}), "there is no map 'mystery'"),
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
