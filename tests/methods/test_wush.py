"""WUSH: inputs and weights of a block have the same second moments after its map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_runs import run

import gyroquant as gq
from gyroquant.calibration.block_moments import BlockMoments
from gyroquant.errors import RecipeError
from gyroquant.maps import BlockDiagonal, hadamard
from gyroquant.methods import Context, Wush
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.base import ModuleStore


def site(name: str = "mlp_in") -> Any:
    return find_sites(ModuleStore(tiny_models.build("llama")).graph, name)[0]


def test_block_moments_are_the_blocks_of_the_second_moments() -> None:
    x = torch.randn(50, 96)
    observer = BlockMoments(96)
    observer(x[:20])
    observer(x[20:])
    whole = x.double().T @ x.double()
    for size in (32, 8):
        for number, block in enumerate(observer.blocks(size)):
            part = slice(number * size, (number + 1) * size)
            assert torch.allclose(block, whole[part, part], atol=1e-3)


def test_inputs_and_weights_are_balanced_and_spread() -> None:
    """Both Gram matrices are K^T S K, whose diagonal is flat."""
    place, generator = site(), torch.Generator().manual_seed(2)
    scales = torch.logspace(0, 2, place.n)
    x = torch.randn(400, place.n, generator=generator) * scales
    weights = [torch.randn(rows, place.n, generator=generator) for rows in (24, 40)]
    observer = BlockMoments(place.n)
    observer(x)
    m = Wush(block=16, damp_percent=1e-9).choose(place, Context(0, 16, {BlockMoments: observer}, lambda: iter(weights)))
    assert isinstance(m, BlockDiagonal)
    turned, w = m.apply(x.double()), m.contragredient().apply(torch.cat(weights).double())
    assert torch.allclose(turned @ w.T, x.double() @ torch.cat(weights).double().T, atol=1e-6)
    for start in range(0, place.n, 16):
        inputs, rows = turned[:, start : start + 16], w[:, start : start + 16]
        assert torch.allclose(inputs.T @ inputs, rows.T @ rows, rtol=1e-3, atol=1e-2)
        diagonal = (inputs.T @ inputs).diagonal()
        assert torch.allclose(diagonal, diagonal.mean().expand(16), rtol=1e-3)
        flat = hadamard(16).apply(hadamard(16).apply(inputs.T @ inputs, 0), 1)
        assert (flat - torch.diag(flat.diagonal())).norm() < 1e-3 * flat.norm()


def test_what_does_not_fit_is_refused_by_name() -> None:
    context = Context(0, 16)
    with pytest.raises(RecipeError, match="blocks of 2, 4, 8, 16, 32, 64, not 24"):
        Wush(block=24).check(site(), context)
    with pytest.raises(RecipeError, match="wush is for inputs of layers"):
        Wush().check(site("R1"), context)


def test_it_helps_4_bits_on_both_sides(corpus: Path, tmp_path: Path) -> None:
    model, errors = tiny_models.build("llama"), {}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[5] *= 30
    other = "[lm_head, q_proj, k_proj, v_proj, o_proj, down_proj]"
    four = [f"weights={{grid: mxfp4, ignore: {other}}}", f"activations={{grid: mxfp4, ignore: {other}}}"]
    for method in ("wush", "hadamard"):
        step = f"transform.mlp_in={{method: {method}, block: 32, online: true}}"
        run(model, tmp_path / method, "rtn", corpus, *four, step)
        ids = tiny_models.tokens(model)
        with torch.no_grad():
            expected, logits = model(input_ids=ids).logits, gq.load(tmp_path / method)(input_ids=ids).logits
        errors[method] = float((logits - expected).norm() / expected.norm())
    assert errors["wush"] < errors["hadamard"]
