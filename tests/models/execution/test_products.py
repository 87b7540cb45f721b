"""Products with parameters of which no module and no experts' function is in charge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gyroquant.errors import MapError
from gyroquant.grids.integer import IntegerGrid
from gyroquant.maps import Dense
from gyroquant.models.execution.online import InputQuantizer, OnlineMap, attach, attached
from gyroquant.models.execution.products import intercept
from gyroquant.models.graph.sites import HookPoint


class Experts(nn.Module):
    """One expert at a time, all experts at once, and a weight that is used as it is."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 8, 4, generator=generator))
        self.down = nn.Parameter(torch.randn(3, 8, 4, generator=generator))
        self.plain = nn.Parameter(torch.randn(4, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([nn.functional.linear(x, self.up[e]) for e in range(3)])
        return torch.bmm(each.relu(), self.down).sum(0) @ self.plain.T


def rotation(n: int) -> Dense:
    return Dense(torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double())[0])


def test_maps_run_at_the_input_of_a_parameter() -> None:
    module = nn.Sequential(Experts())
    experts, x = module[0], torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = module(x)
    maps = {"up": rotation(4), "down": rotation(8), "plain": rotation(4)}
    with torch.no_grad():
        for name, m in maps.items():
            axis = 1 if name == "down" else -1
            getattr(experts, name).copy_(m.contragredient().apply(getattr(experts, name).double(), axis))
    ops = [OnlineMap(HookPoint("parameter", f"0.{name}"), m.in_fp32()) for name, m in maps.items()]
    with attached(module, ops):
        assert torch.allclose(module(x), expected, atol=1e-4)
        assert torch.allclose(copy.deepcopy(module)(x), expected, atol=1e-4)
    assert not torch.allclose(module(x), expected, atol=1e-2)
    assert not experts._forward_hooks


def test_rounding_and_observers_see_the_inputs_of_every_expert() -> None:
    module = nn.Sequential(Experts())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    seen: dict[int, Tensor] = {}
    state, release = intercept(module[0], "down")
    state.observers = [lambda expert, rows: seen.update({expert: rows})]
    detach = attach(module, [InputQuantizer(HookPoint("parameter", "0.down"), IntegerGrid(bits=4, group_size=-1))])
    module(x)
    assert {expert: rows.shape for expert, rows in seen.items()} == dict.fromkeys(range(3), (5, 8))
    assert all(len(row.unique()) <= 16 for rows in seen.values() for row in rows)
    detach()
    state.observers = []
    release()
    assert not module[0]._forward_hooks


def test_an_error_in_the_module_ends_the_interception() -> None:
    module = nn.Sequential(Experts())
    with attached(module, [OnlineMap(HookPoint("parameter", "0.up"), rotation(4))]):
        with pytest.raises(MapError):
            module(torch.randn(5, 7))
        assert not torch.overrides._get_current_function_mode_stack()
