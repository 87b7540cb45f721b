"""Bases of their inputs in which weights are rounded."""

import pytest
import torch

from gyroquant.errors import InputError
from gyroquant.grids import Basis
from gyroquant.grids.basis import spectrum
from gyroquant.maps import hadamard


def basis(columns: int, order: int, parts: int = 1) -> Basis:
    generator = torch.Generator().manual_seed(1)
    return Basis(columns, order, (1 + torch.rand(parts, order, generator=generator)).half().float())


@pytest.mark.parametrize("order", [96, 128])
@pytest.mark.parametrize("parts", [1, 3])
def test_decoding_undoes_encoding(order: int, parts: int) -> None:
    weight = torch.randn(12, 96)
    there = basis(96, order, parts).encode(weight)
    assert there.shape == (12, order)
    assert not torch.allclose(there[:, :96], weight, atol=0.1)
    assert torch.allclose(basis(96, order, parts).decode(there), weight, atol=1e-5)


@pytest.mark.parametrize("order", [96, 128])
def test_the_layer_computes_the_same_on_inputs_in_the_basis(order: int) -> None:
    x, weight, b = torch.randn(40, 96), torch.randn(12, 96), basis(96, order)
    assert b.scale is not None
    moved = hadamard(order).apply(torch.nn.functional.pad(x, (0, order - 96))) / b.scale
    assert torch.allclose(moved @ b.encode(weight).T, x @ weight.T, atol=1e-4)
    assert torch.allclose(b.second_moments(x.T @ x).float(), moved.T @ moved, atol=1e-4)
    assert torch.allclose(spectrum(x.T @ x, order).diagonal(), (moved * b.scale).square().sum(0), rtol=1e-4, atol=1e-4)


def test_what_is_stored_gives_the_basis_back() -> None:
    for b in (basis(96, 128), basis(96, 96, 4), Basis(96, 128)):
        again = Basis.unpack(b.describe(), b.pack(), 96)
        assert (again.columns, again.order) == (b.columns, b.order)
        assert torch.equal(again.encode(torch.eye(96)[:8]), b.encode(torch.eye(96)[:8]))
    assert Basis(96, 128).pack() == {}


def test_contradictory_files_are_refused() -> None:
    for spec, arrays in (({"order": 64}, {}), ({"order": 128}, {"basis": torch.ones(1, 96)})):
        with pytest.raises(InputError, match="does not fit"):
            Basis.unpack(spec, arrays, 96)
