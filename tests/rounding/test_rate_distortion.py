"""The rate-distortion bound: against its definition, its own inverse, and what rounding reaches."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import run

import gyroquant as gq
from gyroquant.grids import IntegerGrid
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.rounding import InputStatistics, output_error
from gyroquant.rounding.base import output_energy
from gyroquant.rounding.rate_distortion import least_bits, least_error, rate_distortion, spectrum
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.solvers import problem


def falling(*values: float) -> torch.Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def test_equal_variances_lose_six_decibels_a_bit() -> None:
    assert least_error(torch.full((7,), 3.0, dtype=torch.float64), 2.0) == pytest.approx(3 / 16)


def test_what_lies_under_the_water_is_not_coded() -> None:
    """Of variances 16 and 1, one bit each on average, the first takes both and is left at 1."""
    assert least_error(falling(16, 1), 1.0) == pytest.approx(1.0)
    assert least_error(falling(16, 0.01), 1.0) == pytest.approx((16 / 16 + 0.01) / 2)
    assert least_error(falling(5, 0, 0), 0.0) == pytest.approx(5 / 3)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(0.01, 9))
@settings(deadline=None)
def test_bits_and_error_are_inverse_and_the_definition(values: list[float], bits: float) -> None:
    variances = falling(*values)
    error = least_error(variances, bits)
    assert least_bits(variances, error) == pytest.approx(bits, rel=1e-6)
    low, high = 0.0, float(variances[0])
    for _ in range(200):  # the water level by bisection
        level = (low + high) / 2
        spent = float((variances / level).clamp_min(1).log2().mean()) / 2
        low, high = (level, high) if spent > bits else (low, level)
    assert error == pytest.approx(float(variances.clamp(max=high).mean()), rel=1e-6)


def test_no_error_takes_infinitely_many_bits_and_all_of_it_none() -> None:
    assert least_bits(falling(2, 1), 0.0) == math.inf
    assert least_bits(falling(2, 1), 1.5) == 0.0
    assert rate_distortion(torch.ones(2, 2), falling(1, 1), 0.0, 1.0, 2.0) is None


def test_gaussian_weights_lie_above_it_and_gptq_nearer_than_rounding_to_nearest() -> None:
    weight, statistics = problem(rows=256)
    grid, found = IntegerGrid(bits=3, group_size=64), {}
    for solver in (RoundToNearest(), Gptq()):
        rounded = solver.solve(weight, grid, statistics)
        error = output_error(weight, rounded.dequantize(), statistics)
        bits = rounded.bits / weight.numel()
        assert bits == 3 + (16 + 3) / 64
        found[solver.name] = rate_distortion(
            weight, spectrum(statistics.second_moments), error, output_energy(weight, statistics), bits
        )
        assert found[solver.name].decibels == pytest.approx(10 * math.log10(error / found[solver.name].output_error))
    assert 1.5 < found["gptq"].decibels < found["rtn"].decibels
    assert 0.25 < found["gptq"].excess_bits < found["rtn"].excess_bits


def test_rounding_to_nearest_is_measured_when_asked(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    small = ["weights.bits=3", "weights.group_size=16", "calibration.nsamples=4", "calibration.seqlen=32"]
    layers = {}
    for name, changes in (("plain", []), ("measured", ["weights.measure=true"])):
        recipe = gq.load_recipe("rtn", [*small, *changes])
        asked = prepare(folders["llama"], tmp_path / name, recipe, corpus, tokenizer=tiny_models.tokenizer())
        layers[name] = pipeline.run(asked)["layers"]
    assert all(layer["rate_distortion"] is None for layer in layers["plain"])
    assert all(layer["rate_distortion"]["decibels"] > 0 for layer in layers["measured"])
    assert [one["weight_error"] for one in layers["plain"]] == [one["weight_error"] for one in layers["measured"]]


def test_the_bound_is_met_by_no_bits_at_all() -> None:
    """A layer of zeros costs nothing and loses everything: at 0 bits that is the bound, but for the weights' luck."""
    weight, statistics = problem(rows=512)
    energy = output_energy(weight, statistics)
    found = rate_distortion(weight, spectrum(statistics.second_moments), 1.0, energy, 0.0)
    assert found is not None
    assert found.decibels == pytest.approx(0, abs=0.2)


def test_a_spectrum_has_no_negative_numbers() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = spectrum(InputStatistics(x.T @ x, 5).second_moments)
    assert bool((found >= 0).all())
    assert torch.equal(found, found.sort(descending=True).values)
    assert float(found.sum()) == pytest.approx(float(x.square().sum()), rel=1e-4)


def test_the_bound_can_be_left_out(corpus: Path, tmp_path: Path) -> None:
    """Errors of outputs are reported as before, and the weights are the same."""
    manifests: dict[bool, Any] = {}
    for bound in (True, False):
        model, table = tiny_models.build("llama_tied"), ["embeddings.group_size=16", "keep_ties=true"]
        manifests[bound] = run(model, tmp_path / str(bound), "gptq-w4", corpus, f"weights.bound={bound}", *table)
    for with_it, without in zip(manifests[True]["layers"], manifests[False]["layers"], strict=True):
        assert with_it["rate_distortion"] is not None
        assert without == with_it | {"rate_distortion": None}
    one, other = ((tmp_path / str(bound) / "model.safetensors").read_bytes() for bound in manifests)
    assert one == other
    assert "bound" not in gq.load_recipe("gptq-w4").to_dict()["weights"]
