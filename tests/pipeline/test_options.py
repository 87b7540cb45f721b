"""The options of an output, and their names of the last release."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.options import OutputOptions

RTN = {"weights": {"bits": 4, "group_size": 16}}
PROOF = {"nsamples": 2, "seqlen": 24}


def test_they_are_frozen_and_keywords_change_a_copy() -> None:
    options = OutputOptions(dense=True)
    assert options.changed("quantize", {"device": "meta"}) == replace(options, device="meta")
    with pytest.raises(FrozenInstanceError):
        options.dense = False  # type: ignore[misc]


def test_a_keyword_that_is_no_option_is_told_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"quantize\(\) got an unexpected keyword argument 'overwrit'; .*'overwrite'"):
        gq.quantize("model", "rtn", overwrit=True)
    with pytest.raises(TypeError, match=r"prepare\(\) got an unexpected keyword argument 'denses'"):
        prepare("model", "out", "rtn", denses=True)


def test_options_and_keywords_prepare_the_same_output(folders: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"dense": True, "save_dtype": "float32", "offload": tmp_path, "fresh": True}
    by_options = prepare(folders["llama"], tmp_path / "out", RTN, options=OutputOptions(**given)).output
    by_keywords = prepare(folders["llama"], tmp_path / "out", RTN, **given).output
    assert by_options == by_keywords
    assert (by_options.dense, by_options.fresh, by_options.offload) == (True, True, tmp_path)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `quantize` prepares, in place of doing it."""
    seen: dict[str, Any] = {}

    def remember(model: Any, out: Any, recipe: Any, text: Any, **rest: Any) -> None:
        seen.update(text=text, **rest)

    monkeypatch.setattr("gyroquant.api.prepare", remember)
    monkeypatch.setattr(pipeline, "run", lambda job, progress: {})
    monkeypatch.setattr("gyroquant.api.load", lambda folder, device: type("Loaded", (), {})())
    return seen


@pytest.mark.parametrize("name", [field.name for field in fields(OutputOptions)])
def test_old_keywords_of_quantize_work_with_a_warning(name: str, prepared: dict[str, Any]) -> None:
    values: dict[str, Any] = {"device": "cpu", "save_dtype": "float32", "offload": "x", "workers": gq.Workers(2)}
    value = values.get(name, True)
    with pytest.warns(FutureWarning, match=rf"{name}= of quantize\(\) is now options=gyroquant.Output") as caught:
        gq.quantize("model", "rtn", **{name: value})
    assert caught[0].filename == __file__
    assert prepared["options"] == OutputOptions(**{name: value})


def test_the_calibration_text_is_called_text(prepared: dict[str, Any]) -> None:
    with pytest.warns(FutureWarning, match=r"calibration= of quantize\(\) is now text="):
        gq.quantize("model", "rtn", calibration="a.txt")
    assert prepared["text"] == "a.txt"
    gq.quantize("model", "rtn", text="b.txt", options=OutputOptions(fresh=True))
    assert prepared["text"] == "b.txt"
    assert prepared["options"].fresh


def test_old_words_of_the_other_functions_work_with_a_warning(folders: dict[str, Path], corpus: Path) -> None:
    model = folders["llama"]
    new = gq.evaluate(model, corpus, window=32, windows=2)
    with pytest.warns(FutureWarning, match=r"max_windows= of evaluate\(\) is now windows="):
        old = gq.evaluate(model, corpus, window=32, max_windows=2)  # type: ignore[call-arg]
    assert (old["windows"], old["loss"]) == (new["windows"], new["loss"])
    ids = tiny_models.tokens(tiny_models.build("llama"))
    recipe = {"transform": {"R1": "hadamard"}, "weights": {"bits": 4, "group_size": 16}, "proof": PROOF}
    with pytest.warns(FutureWarning, match=r"calibration= of transform\(\) is now text="):
        gq.transform(tiny_models.build("llama"), recipe, calibration=ids)  # type: ignore[call-arg]
    with (
        pytest.warns(FutureWarning, match=r"max_windows= of verify_export\(\) is now windows="),
        pytest.raises(gq.InputError),
    ):
        gq.verify_export(model, model, max_windows=1)  # type: ignore[call-arg]


def test_the_defaults_are_those_of_the_last_release() -> None:
    assert OutputOptions() == OutputOptions(False, False, "cpu", "auto", None, False, None)
