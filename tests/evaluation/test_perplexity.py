"""Perplexity and divergence equal what transformers computes on the whole model."""

import math
from pathlib import Path

import pytest
import tiny
import torch

import gyroquant as gq
from gyroquant.calibration.text import load_text, tokenize, windows
from gyroquant.evaluation import perplexity as module
from gyroquant.evaluation.perplexity import WindowScores, interval, score_windows, summary
from gyroquant.models.source import open_model


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_scores_equal_the_whole_models(name: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5 * 40 * 64 * 4)  # several pieces of five windows
    monkeypatch.setattr("gyroquant.calibration.stream._HEAD_TOKENS", 16)
    model, other = tiny.build(name), tiny.build(name, seed=3)
    ids = windows(tokenize(load_text(corpus), tiny.tokenizer(), 96), 40)[:12]
    scores = score_windows(open_model(model), ids, open_model(other))
    with torch.no_grad():
        ours, theirs = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    loss = -ours.gather(-1, ids[:, 1:, None]).sum((1, 2))
    kl = (theirs.exp() * (theirs - ours)).sum((1, 2))
    agree = (ours.argmax(-1) == theirs.argmax(-1)).sum(1)
    assert torch.allclose(scores.loss, loss, rtol=1e-5)
    assert scores.kl is not None
    assert scores.agree is not None
    assert torch.allclose(scores.kl, kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.agree.long(), agree)
    assert scores.predicted.tolist() == [39] * 12


def test_a_model_agrees_with_itself(corpus: Path, folders: dict[str, Path]) -> None:
    result = gq.evaluate(folders["llama"], corpus, folders["llama"], window=64, max_windows=5)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1_agreement"] == 1
    assert result["tokens"] == 320
    assert result["true_bits_per_weight"] == 32
    low, high = result["perplexity_interval"]
    assert low <= result["perplexity"] <= high


def test_presets_and_overrides(corpus: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PRESETS, "bbt", (64, 3))
    assert gq.evaluate(folders["llama"], corpus, preset="bbt")["windows"] == 3
    assert gq.evaluate(folders["llama"], corpus, preset="bbt", max_windows=2)["windows"] == 2
    assert gq.evaluate(folders["llama"], corpus, preset="bbt", window=32)["windows"] > 3
    for arguments, error in (
        ({"preset": "tea"}, "no preset 'tea'"),
        ({"window": 1}, "needs at least 2"),
        ({"window": 500}, "does not fit a model of 128 positions"),
    ):
        with pytest.raises(gq.InputError, match=error):
            gq.evaluate(folders["llama"], corpus, **arguments)


def test_models_of_other_vocabularies_are_not_compared(corpus: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(gq.InputError, match="another vocabulary"):
        gq.evaluate(folders["llama"], corpus, tiny.build("llama", vocab_size=100), window=32)


def test_intervals_cover_the_mean() -> None:
    """Over many draws a 95 % interval holds the true mean about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        low, high = interval(torch.randn(40, generator=generator, dtype=torch.float64), 1)
        hits += low <= 0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_hopeless_models_still_get_a_number() -> None:
    result = summary(WindowScores(torch.tensor([1e6, 1e6], dtype=torch.float64), torch.tensor([10, 10])))
    assert math.isfinite(result["perplexity"])
    assert result["perplexity"] > 1e300
    assert result["kl"] is None
