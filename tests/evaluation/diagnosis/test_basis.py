"""The basis of the residual stream is found from the embeddings, whatever rotation was folded."""

from copy import deepcopy

import pytest
import tiny_models
import torch

from gyroquant.evaluation.diagnosis.basis import procrustes, residual_basis
from gyroquant.models.stores.source import open_model


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def with_embeddings(model: torch.nn.Module, change: object) -> torch.nn.Module:
    changed = deepcopy(model)
    with torch.no_grad():
        weight = changed.get_input_embeddings().weight  # type: ignore[operator]
        weight.copy_(change(weight))  # type: ignore[operator]
    return changed


def test_a_rotation_of_the_embeddings_is_found_and_the_rest_is_its_error() -> None:
    model, turn = tiny_models.build("llama"), orthogonal(64)
    noise = 0.03 * torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    turned = with_embeddings(model, lambda weight: weight @ turn.float() + noise * weight.norm() / noise.norm() * 0.03)
    basis = residual_basis(open_model(turned), open_model(model))
    assert basis.determined
    assert basis.matrix is not None
    assert (basis.matrix.double() - turn).norm() / turn.norm() < 0.03
    assert basis.error == pytest.approx(0.03, rel=0.5)
    states = torch.randn(2, 5, 64)
    assert torch.allclose(basis.apply(states), states @ basis.matrix)


def test_rounded_embeddings_in_the_same_basis_are_left_alone() -> None:
    model = tiny_models.build("llama")
    for step in (0.0, 0.2):
        other = with_embeddings(model, lambda w, step=step: w if not step else (w / step).round() * step)
        basis = residual_basis(open_model(other), open_model(model))
        assert basis.matrix is None
        states = torch.randn(3, 64)
        assert basis.apply(states) is states
        assert (basis.error > 0.02) == bool(step)


def test_too_few_directions_do_not_determine_a_basis() -> None:
    wide = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not procrustes(wide.T @ wide)[1]
    model = tiny_models.build("llama")
    flat = with_embeddings(model, lambda weight: weight[:16].repeat(6, 1))
    turned = with_embeddings(flat, lambda weight: weight @ orthogonal(64).float())
    assert not residual_basis(open_model(turned), open_model(flat)).determined
