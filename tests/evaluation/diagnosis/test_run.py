"""A whole diagnosis, of models whose faults are known."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.calibration.text import load_text
from gyroquant.evaluation import perplexity
from gyroquant.evaluation.diagnosis.run import diagnose, prepare_diagnosis
from gyroquant.evaluation.perplexity import score_windows, text_windows
from gyroquant.models.stores.source import open_model

OPTIONS = gq.ReportOptions(prompts=4, prompt_tokens=8, steps=6)


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_models.build("llama", num_hidden_layers=4)


def changed(model: Any, noise: float, block: int | None = None) -> Any:
    """A copy with relative noise on all matrices, and, with `block`, with other random matrices in that block."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(5)
    broken = () if block is None else tuple(other.model.layers[block].parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                draw = torch.randn(parameter.shape, generator=generator) * parameter.std()
                parameter.copy_(draw if any(parameter is p for p in broken) else parameter + noise * draw)
    return other


def diagnosed(rounded: Any, model: Any, corpus: Path, options: gq.ReportOptions = OPTIONS) -> dict[str, Any]:
    store, against = open_model(rounded), open_model(model)
    text, tokenizer = load_text(corpus), tiny_models.tokenizer()
    batch = text_windows(text, store, 32, 6, tokenizer)
    inputs = prepare_diagnosis(options, store, against, text, batch, tokenizer, True)
    scores, found = diagnose(store, against, batch, inputs)
    same = score_windows(store, batch.ids, against, bos=batch.bos)
    assert torch.equal(scores.loss, same.loss)
    assert scores.kl is not None
    assert same.kl is not None
    assert torch.equal(scores.kl, same.kl)
    return found


def test_a_model_is_level_with_itself(original: Any, corpus: Path) -> None:
    rows = [{"prompt": "w1 w2", "completion": "w3 w4 w5"}]
    options = gq.ReportOptions(prompts=4, prompt_tokens=8, steps=6, generations=rows)
    found = diagnosed(original, original, corpus, options)
    assert found["verdict"]["kind"] == "level"
    assert found["acceptance"]["rate"] == 1
    assert found["acceptance"]["interval"] == [1, 1]
    assert found["smoothness"]["ratio"] == 1
    assert found["prediction_sets"]["rounded"] == found["prediction_sets"]["original"]
    assert found["continuations"]["first"] == [None] * 4
    assert found["generations"]["agreement"] == 1
    for row in found["blocks"]:
        assert row["relative_error"] == row["own_error"] == 0
        assert row["cosine"] == pytest.approx(1, abs=1e-6)
        assert row["linear_r2"]["original"] == row["linear_r2"]["rounded"]


def test_noise_everywhere_is_degradation(original: Any, corpus: Path) -> None:
    found = diagnosed(changed(original, 0.1), original, corpus)
    assert found["verdict"]["kind"] == "degradation"
    assert 0.5 < found["acceptance"]["rate"] < 0.99
    errors = [row["relative_error"] for row in found["blocks"]]
    assert errors == sorted(errors)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_broken_block_is_a_collapse_at_that_block(block: int, original: Any, corpus: Path) -> None:
    found = diagnosed(changed(original, 0.02, block), original, corpus)
    assert (found["verdict"]["kind"], found["verdict"]["block"]) == ("collapse", block)
    own = [row["own_cosine"] for row in found["blocks"]]
    assert own[block] < 0.3
    assert all(cosine > 0.9 for number, cosine in enumerate(own) if number != block)
    assert found["blocks"][block]["growth"] is None or found["blocks"][block]["growth"] > 2


def test_pieces_change_nothing(original: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and predictions are summed over pieces of windows. R^2 is of the first piece alone."""
    rounded = changed(original, 0.1)
    whole = diagnosed(rounded, original, corpus)
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", 4 * 32 * 64 * 4)  # four windows, then two
    monkeypatch.setattr("gyroquant.calibration.stream._HEAD_TOKENS", 20)
    monkeypatch.setattr("gyroquant.evaluation.diagnosis.hidden_states._TOKENS", 50)
    pieces = diagnosed(rounded, original, corpus)
    assert pieces["acceptance"]["rate"] == pytest.approx(whole["acceptance"]["rate"], abs=1e-6)
    assert pieces["prediction_sets"]["rounded"] == pytest.approx(whole["prediction_sets"]["rounded"], rel=1e-4)
    for one, other in zip(pieces["blocks"], whole["blocks"], strict=True):
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-4)
        assert one["own_cosine"] == pytest.approx(other["own_cosine"], rel=1e-4)
        assert (one["linear_r2"]["tokens"], other["linear_r2"]["tokens"]) == (4 * 31, 6 * 31)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3_moe"])
def test_other_architectures_are_level_with_themselves(name: str, corpus: Path) -> None:
    model = tiny_models.build(name)
    found = diagnosed(model, model, corpus)
    assert found["verdict"]["kind"] == "level"
    assert all(row["own_error"] < 1e-5 for row in found["blocks"])


def test_models_of_other_shapes_are_refused(original: Any, corpus: Path) -> None:
    with pytest.raises(gq.InputError, match=r"has blocks 2 and .* has 4, so their blocks cannot be compared"):
        diagnosed(tiny_models.build("llama"), original, corpus)
