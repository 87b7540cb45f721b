"""auto-round as a solver: what comes back from it, and what is refused before it is called."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

import gyroquant as gq
from gyroquant.errors import InputError, RecipeError, UnsupportedModelError
from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.rounding.solvers.auto_round import AutoRound
from gyroquant.rounding.solvers.rtn import RoundToNearest

SMALL = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32", "calibration.dtype=float32"]
SOLVER = "weights.solver={name: auto_round, iters: 20, batch_size: 4, options: {amp: false}}"
installed = pytest.mark.skipif(find_spec("auto_round") is None, reason="needs the extra gyroquant[auto-round]")


def job(model: Path, out: Path, corpus: Path, *changes: str, recipe: str = "rtn") -> Job:
    loaded = gq.load_recipe(recipe, [*SMALL, SOLVER, *changes])
    return prepare(model, out, loaded, corpus, tokenizer=tiny_models.tokenizer())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rounding to nearest in the place of auto-round; notes the models that it was given."""
    seen: list[dict[str, Any]] = []

    def quantize_model(
        self: AutoRound, model: Any, layers: dict[str, Grid], tokens: torch.Tensor, tokenizer: Any, seed: int
    ) -> dict[str, QuantizedWeight]:
        with torch.no_grad():
            seen.append({"logits": model(tokens).logits, "layers": layers, "tokens": tokens, "model": model})
        found = {}
        for name, grid in layers.items():
            layer = model.get_submodule(name)
            assert type(layer) is nn.Linear
            assert not layer._forward_pre_hooks
            found[name] = RoundToNearest().solve(layer.weight.detach(), grid, None)
        return found

    monkeypatch.setattr(AutoRound, "quantize_model", quantize_model)
    monkeypatch.setattr(AutoRound, "check", lambda self: None)
    return seen


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("recipe", ["quarot", "gsr"])
def test_it_is_given_the_transformed_model(
    name: str, recipe: str, pretended: list[dict[str, Any]], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """With its online maps, though outside solvers run no hooks of linear layers: the same function, other weights."""
    changes = ["activations=null", "kv_cache=null"]
    pipeline.run(job(folders[name], tmp_path / "out", corpus, *changes, recipe=recipe))
    with torch.no_grad():
        wanted = gq.load(folders[name], dtype="float32")(pretended[0]["tokens"]).logits
    assert (pretended[0]["logits"] - wanted).norm() < 1e-5 * wanted.norm()
    again = tmp_path / "again"
    pipeline.run(job(folders[name], again, corpus, "weights.solver=rtn", *changes, recipe=recipe))
    one, other = open_model(tmp_path / "out"), open_model(again)
    assert one.bits_per_weight() == other.bits_per_weight()
    for weight in one.read(one.shapes):
        assert torch.allclose(one.read([weight])[weight].float(), other.read([weight])[weight].float(), atol=1e-6)


def test_layers_have_their_own_grids(
    pretended: list[dict[str, Any]], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = ["weights.bits=2", "weights.overrides=[{layers: [down_proj], bits: 4}]"]
    pipeline.run(job(folders["llama_tied"], tmp_path / "out", corpus, *changes))
    bits = {name.rpartition(".")[2]: grid.bits for name, grid in pretended[0]["layers"].items()}
    assert bits["down_proj"] == 4
    assert bits["up_proj"] == bits["q_proj"] == 2


def test_what_cannot_be_is_refused(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="by itself: leave refine, tune out"):
        gq.load_recipe("rtn", [SOLVER, "weights.refine={passes: 1}", "weights.tune={iters: 1}"])
    with pytest.raises(RecipeError, match="integer grids only"):
        gq.load_recipe("rtn", [SOLVER, "weights.grid=mxfp4"])
    monkeypatch.setattr("gyroquant.rounding.solvers.auto_round.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'gyroquant\[auto-round\]'"):
        job(folders["llama_tied"], tmp_path / "out", corpus)
    monkeypatch.setattr("gyroquant.rounding.solvers.auto_round.find_spec", lambda name: name)
    for name, layer in (("gpt2", "c_attn"), ("qwen3_moe", "gate_up_proj")):
        with pytest.raises(UnsupportedModelError, match=f"{layer} is not one"):
            job(folders[name], tmp_path / "out", corpus)


@installed
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("recipe", ["rtn", "quarot"])
def test_the_real_one(recipe: str, symmetric: bool, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = ["activations=null", "kv_cache=null", f"weights.symmetric={symmetric}", "weights.bits=2"]
    done = pipeline.run(job(folders["llama_tied"], tmp_path / "out", corpus, *changes, recipe=recipe))
    nearest = ["weights.solver=rtn", *changes]
    plain = pipeline.run(job(folders["llama_tied"], tmp_path / "rtn", corpus, *nearest, recipe=recipe))
    assert done["bits"] == plain["bits"]
    scores = [
        gq.evaluate(
            tmp_path / out, corpus, against=folders["llama_tied"], window=32, tokenizer=tiny_models.tokenizer()
        )["kl"]
        for out in ("out", "rtn")
    ]
    assert scores[0] < scores[1]
