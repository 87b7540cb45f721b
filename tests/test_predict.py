"""What is predicted grows with what takes time; the figures themselves are looked at on a real model."""

from pathlib import Path

import tiny

import gyroquant as gq
from gyroquant.job import Job, prepare
from gyroquant.planning import measuring_passes
from gyroquant.predict import predict

BRIEF = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32"]


def job(folder: Path, corpus: Path, tmp_path: Path, recipe: str, *changes: str) -> Job:
    loaded = gq.load_recipe(recipe, [*BRIEF, *changes])
    return prepare(folder, tmp_path / "out", loaded, corpus, tokenizer=tiny.tokenizer())


def test_measured_maps_behind_each_other_take_several_passes() -> None:
    assert [measuring_passes(gq.load_recipe(name)) for name in ("quarot", "smoothquant", "perq", "duquant")] == [
        0,
        1,
        1,
        2,
    ]


def test_learning_is_counted_step_by_step(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    for recipe in ("spinquant", "optrot"):
        few, many = (
            predict(job(folders["llama"], corpus, tmp_path, recipe, f"learn.steps={steps}")).seconds
            for steps in (1, 2000)
        )
        assert many > 10 * few


def test_a_pass_that_measures_is_counted(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    seconds = {}
    for recipe in ("rtn", "smoothquant"):
        made = job(folders["llama"], corpus, tmp_path, recipe, "activations=null")
        if made.tokens is not None:
            made.tokens = made.tokens.repeat(20_000, 1)
        seconds[recipe] = predict(made).seconds
    assert seconds["smoothquant"] > 5 * seconds["rtn"]
    assert not (tmp_path / "out").exists()
