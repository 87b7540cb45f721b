"""Grids whose groups choose between two kinds of elements or two scales: IF4 and Four Over Six."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, Layer, ModelRequirements
from gyroquant.grids import Grid, GroupParams, If4Grid, Mxfp4Grid, MxIf4Grid, Nvfp4Grid, QuantizedWeight, grid_from
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding.steps.tunable import TunableWeight
from gyroquant.testing.grids import rounded

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
INTEGERS = [Fraction(6 * k, 7) for k in range(8)]
ONE, MINUS_ONE = (GroupParams(torch.full((1, 1), value), torch.zeros(1, 1)) for value in (1.0, -1.0))
MX = ("floor", "round", "ceil", "mse", "four_over_six")
SEEDS = st.integers(0, 10**6)
SPREADS = st.floats(0.5, 4)


def groups(seed: int, spread: float, size: int, count: int = 24) -> torch.Tensor:
    """Groups of random numbers, shape (4, count, size). The larger `spread`, the larger are their outliers."""
    normal = torch.randn(4, count, size, generator=torch.Generator().manual_seed(seed))
    return 0.05 * normal.sign() * normal.abs() ** spread


def errors(grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """The squared error of each group, for a grid that is bound already or needs no tensor scale."""
    return (grid.nearest(x, grid.fit(x)) - x).square().sum(-1)


@pytest.mark.parametrize("grid", [If4Grid(), MxIf4Grid()], ids=str)
def test_the_sign_of_a_scale_says_which_numbers_codes_stand_for(grid: Grid) -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert grid.decode(codes, ONE)[0].tolist() == [*E2M1, *(-value for value in E2M1)]
    whole = [*range(8), 0, *range(-7, 0)]  # two's complement
    assert grid.decode(codes, MINUS_ONE)[0].tolist() == pytest.approx([6 * k / 7 for k in whole], abs=1e-6)
    assert float(grid.decode(codes, MINUS_ONE).max()) == 6


@given(st.floats(-9, 9, width=32))
@settings(max_examples=200, deadline=None)
def test_integers_are_rounded_to_the_nearest(value: float) -> None:
    found = float(If4Grid().nearest(torch.tensor([[value]]), MINUS_ONE))
    distance = min(abs(abs(Fraction(value)) - number) for number in INTEGERS)
    assert abs(abs(Fraction(value)) - abs(Fraction(found))) <= distance + Fraction(1, 10**5)
    assert found * value >= 0


@given(SEEDS, SPREADS, st.sampled_from(["minmax", "mse"]))
@settings(max_examples=20, deadline=None)
def test_if4_is_never_worse_than_nvfp4_in_any_group(seed: int, spread: float, scale: str) -> None:
    x = groups(seed, spread, 16)
    bound = Nvfp4Grid(scale=scale).with_tensor_scale(x)
    grid = If4Grid(scale=scale)._with(bound.tensor_scale)
    assert (errors(grid, x) <= errors(bound, x)).all()


@given(SEEDS, SPREADS, st.sampled_from(MX))
@settings(max_examples=40, deadline=None)
def test_mxif4_is_never_worse_than_mxfp4_in_any_group(seed: int, spread: float, rounding: str) -> None:
    x = groups(seed, spread, 32)
    own, plain = (kind(scale_rounding=rounding) for kind in (MxIf4Grid, Mxfp4Grid))
    assert (errors(own, x) <= errors(plain, x)).all()


@given(SEEDS, SPREADS)
@settings(max_examples=40, deadline=None)
def test_four_over_six_takes_the_better_of_two_scales(seed: int, spread: float) -> None:
    """Held against both scales, computed from the definition, for nvfp4."""
    x = groups(seed, spread, 16)
    grid = Nvfp4Grid(scale="four_over_six").with_tensor_scale(x)
    assert grid.tensor_scale == pytest.approx(float(x.abs().max()) / (6 * 256), rel=1e-6)
    peak = x.abs().amax(-1, keepdim=True)
    both = []
    for element in (6, 4):
        scale = (peak / element / grid.tensor_scale).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
        params = GroupParams(scale * grid.tensor_scale, torch.zeros_like(scale))
        both.append((grid.nearest(x, params) - x).square().sum(-1))
    assert torch.allclose(errors(grid, x), torch.minimum(*both), rtol=1e-3)
    plain = Nvfp4Grid(scale="minmax")._with(grid.tensor_scale)
    assert (errors(grid, x) <= errors(plain, x)).all()


@given(SEEDS, SPREADS)
@settings(max_examples=40, deadline=None)
def test_four_over_six_of_mxfp4_lies_between_the_fixed_roundings_and_the_search(seed: int, spread: float) -> None:
    x = groups(seed, spread, 32)
    error = {rounding: errors(Mxfp4Grid(scale_rounding=rounding), x) for rounding in MX}
    for fixed in ("floor", "round", "ceil"):
        assert (error["four_over_six"] <= error[fixed]).all(), fixed
    assert (error["mse"] <= error["four_over_six"]).all()


def test_groups_take_what_suits_them() -> None:
    """Integers are exact on a ramp, E2M1 on its own numbers. 4 is the better largest element for quarters of it."""
    ramp, floats = torch.arange(-7.0, 9.0).clamp(max=7), torch.tensor(E2M1).repeat(2) * 7 / 6
    x = torch.stack([ramp, floats])[None]
    grid = If4Grid(scale="minmax").with_tensor_scale(x)
    params = grid.fit(x)
    assert params.scale.sign().flatten().tolist() == [-1, 1]
    assert torch.allclose(grid.nearest(x, params), x, rtol=1e-6)
    uneven = torch.tensor([1, 0.75, -0.5, 0.25]).repeat(4)[None, None]
    four = Nvfp4Grid(scale="four_over_six").with_tensor_scale(uneven)
    assert torch.equal(four.nearest(uneven, four.fit(uneven)) / uneven, torch.ones_like(uneven))
    assert float(errors(Nvfp4Grid(scale="minmax").with_tensor_scale(uneven), uneven)) > 0


def test_the_choice_is_free_in_the_sign_of_e4m3_and_a_bit_beside_powers_of_two() -> None:
    weight = groups(0, 1.0, 32, 16).view(4, -1)
    nv, free = rounded(Nvfp4Grid(scale="minmax"), weight), rounded(If4Grid(scale="minmax"), weight)
    assert free.bits == nv.bits
    assert {part: array.shape for part, array in free.pack().items()} == {p: a.shape for p, a in nv.pack().items()}
    chosen = free.params.scale.flatten() < 0
    assert 0.2 < float(chosen.float().mean()) < 0.9
    assert torch.equal(free.pack()["scales"].flatten() >= 128, chosen)
    assert torch.equal(free.pack()["scales"] & 127, nv.pack()["scales"])
    mx = rounded(MxIf4Grid(), weight)
    assert mx.bits / weight.numel() == 4 + 9 / 32
    assert mx.pack()["choices"].numel() == 4 * 16 / 8


def test_four_over_six_is_plain_nvfp4() -> None:
    """A grid that knows nothing of the rule reads the arrays."""
    weight = groups(1, 1.0, 16).view(4, -1)
    four = rounded(Nvfp4Grid(scale="four_over_six"), weight)
    codes, params = Nvfp4Grid().unpack(four.pack(), (4, weight.shape[1]))
    assert torch.equal(QuantizedWeight(Nvfp4Grid(), codes, params).dequantize(), four.dequantize())
    assert four.bits == rounded(Nvfp4Grid(), weight).bits
    assert not (four.pack()["scales"] >= 128).any()


def test_choices_that_do_not_fit_are_refused() -> None:
    arrays = rounded(MxIf4Grid(), groups(0, 1.0, 32, 16).view(4, -1)).pack()
    with pytest.raises(InputError, match="array of choices of a rounded weight is missing"):
        MxIf4Grid().unpack({part: array for part, array in arrays.items() if part != "choices"}, (4, 512))
    with pytest.raises(InputError, match="choices of shape"):
        MxIf4Grid().unpack(arrays | {"choices": arrays["choices"][1:]}, (4, 512))


@pytest.mark.parametrize("grid", [If4Grid(), If4Grid(scale="minmax"), MxIf4Grid()], ids=str)
def test_scales_keep_their_kind_when_they_are_rounded(grid: Grid) -> None:
    weight = rounded(grid, groups(2, 1.0, 32).view(4, -1))
    wanted = weight.params.scale * torch.linspace(0.6, 1.4, weight.params.scale.shape[1])[:, None]
    moved = weight.grid.round_params(wanted, weight.params.zero)
    assert torch.equal(moved.scale < 0, weight.params.scale < 0)
    assert (moved.scale != weight.params.scale).any()


def test_steps_are_those_of_the_groups_kind() -> None:
    """SignRound starts from the codes of the solver: its first matrix is the rounded one."""
    matrix = groups(3, 1.0, 16).view(4, -1)
    weight = rounded(If4Grid(scale="minmax"), matrix)
    numbers = torch.tensor([[-6.0, 6.0]])
    assert weight.grid.group_step_below(numbers, MINUS_ONE).tolist() == [[pytest.approx(6 / 7)] * 2]
    assert weight.grid.group_step_below(numbers, ONE).tolist() == [[2.0, 2.0]]
    assert torch.equal(TunableWeight(matrix, weight).result().codes, weight.codes)
    assert torch.equal(TunableWeight(matrix, weight).matrix(), weight.dequantize())


@given(SEEDS)
@settings(max_examples=8, deadline=None)
def test_what_random_codes_of_if4_stand_for_is_given_back(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = (1 + 446 * torch.rand(3, 6, 1, generator=generator)).to(torch.float8_e4m3fn).float() * 1.7e-4
    scale *= 1 - 2 * torch.randint(0, 2, scale.shape, generator=generator)
    codes = torch.randint(0, 16, (3, 6, 16), generator=generator).to(torch.uint8)
    x = If4Grid().decode(codes, GroupParams(scale, torch.zeros_like(scale)))
    bound = If4Grid().with_tensor_scale(x)
    assert torch.allclose(bound.nearest(x, bound.fit(x)), x, rtol=1e-5, atol=0)


def test_saved_grids_name_their_rule() -> None:
    for grid in (Nvfp4Grid(scale="four_over_six"), If4Grid(), MxIf4Grid(scale_rounding="floor")):
        assert grid_from(grid.model_dump(mode="json")) == grid


@pytest.mark.parametrize("grid", [If4Grid(), MxIf4Grid(), Nvfp4Grid(scale="four_over_six")], ids=str)
def test_formats_that_cannot_hold_them_refuse_them_by_name(grid: Grid) -> None:
    """Four Over Six goes wherever nvfp4 goes."""
    layer = Layer("model.layers.0.mlp.down_proj.weight", grid, 64)
    refused = refusing(layer)
    assert {"gguf", "onnx", "openvino"} <= refused
    assert "dense" not in refused
    if isinstance(grid, Nvfp4Grid):
        assert refused == refusing(replace(layer, grid=Nvfp4Grid()))


def refusing(layer: Layer) -> set[str]:
    """The formats that have no type for a layer."""
    text, needs = f"no type for the grid {layer.grid.grid}", ModelRequirements("llama", (layer,))
    return {name for name, kind in Format.registry.items() if any(text in r for r in kind().incompatibilities(needs))}


def test_activations_take_them_too() -> None:
    recipe = load_recipe("rtn", ["activations={grid: nvfp4, scale: four_over_six}", "weights.grid=if4"])
    assert recipe.activations is not None
    assert recipe.activations.grid == Nvfp4Grid(scale="four_over_six")
    assert recipe.weights.grid == If4Grid()
