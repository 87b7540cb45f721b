"""The low-rank branch as it runs: what it reads, what it adds, and where it is left out."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from gyroquant.grids import IntegerGrid, LowRankFactors
from gyroquant.maps import hadamard
from gyroquant.models.execution.low_rank import LowRankBranch
from gyroquant.models.execution.online import InputQuantizer, OnlineMap, OnlineOp, attach, attached, observing_rounding
from gyroquant.models.execution.switches import no_fake_quant
from gyroquant.models.graph.sites import HookPoint

GRID = IntegerGrid(bits=2, group_size=-1, symmetric=True, scale="minmax")


def parts() -> tuple[nn.Sequential, LowRankBranch, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    factors = LowRankFactors.of(torch.randn(8, 3, generator=draw), torch.randn(3, 16, generator=draw))
    return model, LowRankBranch(HookPoint("input", "0"), factors), torch.randn(2, 5, 16, generator=draw)


@torch.no_grad()
def test_the_branch_reads_the_mapped_and_unrounded_input_and_runs_before_a_map_at_the_output() -> None:
    """In whatever order the operations are given."""
    model, branch, x = parts()
    before, after = hadamard(16), hadamard(8)
    turned = before.apply(x)
    layer, product = model[0], turned @ branch.factors.product().T
    expected = after.apply(layer(GRID.fake(turned)) + product)
    operations: list[OnlineOp] = [
        InputQuantizer(HookPoint("input", "0"), GRID),
        branch,
        OnlineMap(HookPoint("output", "0"), after),
        OnlineMap(HookPoint("input", "0"), before),
    ]
    for order in (operations, operations[::-1]):
        with attached(model, order):
            torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_it_is_left_out_of_the_unrounded_model_and_of_a_detached_one() -> None:
    model, branch, x = parts()
    plain = model(x)
    with attached(model, [branch]):
        assert not torch.allclose(model(x), plain)
        with no_fake_quant():
            assert torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_gradients_pass_through_it() -> None:
    model, branch, x = parts()
    x.requires_grad_()
    with attached(model, [branch]):
        model(x).sum().backward()
    weight = model[0].weight + branch.factors.product()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


@torch.no_grad()
def test_copies_of_a_model_do_not_share_inputs_and_16_bits_are_multiplied_in_fp32() -> None:
    model, branch, x = parts()
    attach(model, [branch])
    copy = deepcopy(model)
    assert torch.equal(copy(x), model(x))
    x = x.bfloat16()
    expected = model[0].bfloat16().forward(x) + (x.float() @ branch.factors.right.T @ branch.factors.left.T).bfloat16()
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_rounding_of_an_input_is_observed_where_it_happens() -> None:
    model, _, x = parts()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with attached(model, [InputQuantizer(HookPoint("input", "0"), GRID)]):
        with observing_rounding(model[0], lambda u, rounded: seen.append((u, rounded))):
            model(x)
            with no_fake_quant():
                model(x)
        model(x)
    ((unrounded, rounded),) = seen
    assert torch.equal(unrounded, x)
    assert torch.equal(rounded, GRID.fake(x))
