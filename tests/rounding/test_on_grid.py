"""A model that lies on its grid already stays what it is, whatever is done to round it."""

from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.grids import IntegerGrid
from gyroquant.models.stores.source import open_model
from gyroquant.rounding import InputStatistics
from gyroquant.rounding.base import PreparedWeight
from gyroquant.rounding.layers import RoundingConfig
from gyroquant.rounding.solvers.gptaq import Gptaq
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.qronos import Qronos
from gyroquant.rounding.solvers.rtn import RoundToNearest

SMALL = ["calibration.nsamples=4", "calibration.seqlen=32", "calibration.dtype=float32", "weights.group_size=32"]
RECIPES = {
    "rtn": ["weights.bits=2"],
    "gptq": ["weights.bits=2", "weights.target={}"],
    "gptq-act-order": ["weights.bits=4"],
    "gptaq": ["weights.bits=2", "weights.refine.passes=2"],
    "qronos": ["weights.bits=3"],
    "signround": ["weights.bits=2", "weights.tune.iters=3"],
}


def ternary(scale: float) -> torch.nn.Module:
    model = tiny_models.build("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(scale * torch.randint(-1, 2, parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_a_ternary_model_stays(name: str, corpus: Path, tmp_path: Path) -> None:
    for scale in (0.125, 0.1234567):  # fp16 holds the first
        model = ternary(scale)
        recipe = gq.load_recipe(name, [*SMALL, *RECIPES[name]])
        gq.quantize(model, recipe, corpus, out=tmp_path / str(scale), tokenizer=tiny_models.tokenizer())
        store = open_model(tmp_path / str(scale))
        for label, parameter in model.named_parameters():
            if "proj" in label:
                off = (store.read([label])[label] - parameter).abs()
                assert (off <= (0 if scale == 0.125 else 2.0**-11) * parameter.abs()).all()


@pytest.mark.parametrize("solver", [Gptq(), Gptaq(), Qronos(alpha=1e-3)], ids=["gptq", "gptaq", "qronos"])
def test_rows_on_the_grid_stay_beside_rows_that_are_not(solver: Gptq, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    input_error_cross = 0.1 * torch.randn(96, 96, generator=generator) * (x.T @ x).diagonal().mean()
    statistics = InputStatistics(x.T @ x, 300, input_error_cross, input_error_cross.abs())
    weight = 0.1 * torch.randn(32, 96, generator=generator)
    weight[::2] = 0.25 * torch.randint(-1, 2, (16, 96), generator=generator)
    grid = IntegerGrid(bits=2, group_size=32)
    rounding = RoundingConfig([solver], grid, None, lambda text: None)
    found = rounding.solve(PreparedWeight("some", weight, statistics, None), grid).dequantize()
    assert torch.equal(found[::2], weight[::2])
    alone = solver.solve(weight, grid, statistics).dequantize()
    assert torch.equal(found[1::2], alone[1::2])
    assert not torch.equal(found, RoundToNearest().solve(weight, grid).dequantize())
