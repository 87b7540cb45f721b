"""Maps as tensors, and the steps of those that have no constraints."""

import pytest
import torch

from gyroquant import maps
from gyroquant.finetuning.parameters import Adam, Angles, Parameter, Rotation, Scales, parameter_of

GENERATOR = torch.Generator().manual_seed(4)
CASES: dict[str, tuple[maps.Map, type[Parameter]]] = {
    "hadamard": (maps.hadamard(24), Rotation),
    "blocks": (maps.blocks(maps.walsh(8), 24), Rotation),
    "unequal blocks": (maps.BlockDiagonal((maps.hadamard(8), maps.hadamard(16))), Rotation),
    "butterfly": (maps.Butterfly(torch.randn(3, 4, generator=GENERATOR, dtype=torch.float64)), Angles),
    "butterflies": (maps.blocks(maps.butterfly(8), 24), Angles),
    "inverse butterfly": (maps.butterfly(8).inverse(), Rotation),
    "scales": (maps.Diagonal(torch.rand(24, generator=GENERATOR, dtype=torch.float64) + 0.5), Scales),
}


@pytest.mark.parametrize("name", CASES)
def test_a_map_comes_back_from_its_tensor(name: str) -> None:
    m, kind = CASES[name]
    parameter = parameter_of(m)
    assert isinstance(parameter, kind)
    value = parameter.start(m)
    assert value.dtype == torch.float64
    assert torch.allclose(parameter.map(value).dense(), m.dense(), atol=1e-12)
    value.requires_grad_()
    parameter.map(value).apply(torch.randn(4, m.n, dtype=torch.float64)).square()[:, :3].sum().backward()
    assert float(value.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_adam_is_that_of_torch() -> None:
    goal, value = torch.linspace(-1, 1, 6), torch.zeros(6)
    theirs = torch.zeros(6, requires_grad=True)
    optimizer, adam = torch.optim.Adam([theirs], lr=0.1, eps=1e-12), Adam()
    for number in range(10):
        value = adam.step("x", value, 2 * (value - goal), 0.1, number)
        optimizer.zero_grad()
        (theirs - goal).square().sum().backward()
        optimizer.step()
    assert torch.allclose(value, theirs, atol=1e-5)
