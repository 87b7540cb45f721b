"""AWQ's search finds what its formula says, on the recipe's own grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.calibration.observers import MeanAbs, MeanSquare
from gyroquant.grids import IntegerGrid
from gyroquant.maps import Diagonal, Identity
from gyroquant.methods import Context
from gyroquant.methods.awq import Awq, rounding_error, scales
from gyroquant.models.graph.sites import Site

SITE = Site(name="mlp_in", block=0, label="mlp_in of block 0", n=64)
GRID = IntegerGrid(bits=3, group_size=16, scale="minmax")


def context(x: torch.Tensor, *weights: torch.Tensor, grid: IntegerGrid = GRID) -> Context:
    seen = {kind: kind(x.shape[1]) for kind in (MeanAbs, MeanSquare)}
    for observer in seen.values():
        observer(x)
    return Context(seed=0, group_size=16, statistics=seen, weights=lambda: iter(weights), grid=grid)


def data(outliers: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent channels, a few of them large, and weights that read them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, 64, generator=generator)
    x[:, ::16] *= outliers
    return x, torch.randn(48, 64, generator=generator)


def output_error(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> float:
    """|X (W - Q(W s) / s)^T|^2 from the tokens themselves."""
    return float((x.double() @ (w - GRID.fake(w * s.to(w)) / s.to(w)).double().T).square().sum())


def test_the_exponent_is_that_of_the_smallest_output_error() -> None:
    x, w = data()
    mean = x.abs().double().mean(0)
    candidates = [(mean.pow(i / 20), i) for i in range(20)]
    errors = [output_error(x, w, s / (s.max() * s.min()).sqrt()) for s, _ in candidates]
    m = Awq().choose(SITE, context(x, w))
    assert isinstance(m, Diagonal)
    best = int(torch.tensor(errors).argmin())
    assert best > 0
    assert output_error(x, w, 1 / m.values) == pytest.approx(errors[best], rel=1e-6)
    assert errors[best] < 0.5 * errors[0]


def test_its_measure_is_the_output_error_of_independent_channels() -> None:
    x, w = data()
    s = scales(x.abs().mean(0), 0.5)
    power = x.square().double().mean(0)
    assert float(rounding_error(w, s, power, GRID)) * len(x) == pytest.approx(output_error(x, w, s), rel=0.05)


def test_scales_are_centred_and_bounded() -> None:
    mean = torch.tensor([0.0, 1.0, 4.0, 16.0])
    s = scales(mean, 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1)
    assert s[3] / s[2] == pytest.approx(2)
    assert s[3] / s[0] == pytest.approx(100)
    assert torch.equal(scales(torch.zeros(4), 0.5), torch.ones(4, dtype=torch.float64))


def test_flat_activations_and_no_activations_are_left_alone() -> None:
    _, w = data()
    assert isinstance(Awq().choose(SITE, context(torch.zeros(0, 64), w)), Identity)
    assert isinstance(Awq().choose(SITE, context(torch.ones(5, 64), w)), Identity)


def test_all_readers_count_each_as_often_as_it_repeats_the_site() -> None:
    x, w = data()
    small = 1e-3 * torch.randn(8, 64)
    alone = Awq().choose(SITE, context(x, w))
    assert torch.equal(Awq().choose(SITE, context(x, w, small)).dense(), alone.dense())
    halves = context(x, w[:24], w[24:])
    assert torch.allclose(Awq().choose(SITE, halves).dense(), alone.dense())
    side_by_side = torch.cat([w[:24], w[24:]], dim=1)  # two heads: groups of 16 do not cross them
    assert torch.allclose(Awq().choose(SITE, context(x, side_by_side)).dense(), alone.dense())


def test_weights_that_the_groups_do_not_divide_are_named() -> None:
    x, w = data()
    with pytest.raises(
        gq.RecipeError, match="group_size 16 does not divide the 40 inputs of the weights that read mlp_in"
    ):
        Awq().choose(SITE, context(x, w[:, :40]))


def test_large_weights_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = data()
    whole = Awq().choose(SITE, context(x, w)).dense()
    monkeypatch.setattr("gyroquant.methods.awq._PIECE", 5 * 64)
    assert torch.equal(Awq().choose(SITE, context(x, w)).dense(), whole)


def test_the_grid_of_the_recipe_decides() -> None:
    """Rounded finely or coarsely, symmetric or not: the error is that grid's, with its own scales where asked for."""
    x, w = data()
    mse = GRID.model_copy(update={"scale": "mse"})
    power, mean = x.square().mean(0), x.abs().mean(0)
    for scale, judge in (("minmax", GRID), ("recipe", mse)):
        m = Awq(scales=scale).choose(SITE, context(x, w, grid=mse))
        errors = [float(rounding_error(w, scales(mean, i / 20), power, judge)) for i in range(20)]
        s = scales(mean, int(torch.tensor(errors).argmin()) / 20)
        assert torch.allclose(1 / m.dense().diagonal(), s)


def test_rounding_gains_on_a_model_with_outliers(corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::16] *= 8
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    small = ["calibration.nsamples=8", "calibration.seqlen=32", "weights.bits=3", "weights.group_size=32"]
    error = {}
    for name in ("awq", "rtn"):
        gq.quantize(tmp_path / "model", gq.load_recipe(name, small), corpus, out=tmp_path / name)
        error[name] = gq.evaluate(tmp_path / name, corpus, tmp_path / "model", window=32)["kl"]
    assert error["awq"] < 0.8 * error["rtn"]
