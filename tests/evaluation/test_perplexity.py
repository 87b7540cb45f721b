"""Perplexity and divergence equal what transformers computes on the whole model."""

import json
import math
from pathlib import Path

import pytest
import tiny_models
import torch
from rich.console import Console

import gyroquant as gq
from gyroquant.calibration.text import load_text, tokenize, windows
from gyroquant.evaluation import perplexity as module
from gyroquant.evaluation.perplexity import WindowScores, interval, score_windows, summary
from gyroquant.models.stores.source import open_model
from gyroquant.report.summaries import evaluated


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_scores_equal_the_whole_models(name: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5 * 40 * 64 * 4)  # several pieces of five windows
    monkeypatch.setattr("gyroquant.calibration.stream._HEAD_TOKENS", 16)
    model, other = tiny_models.build(name), tiny_models.build(name, seed=3)
    ids = windows(tokenize(load_text(corpus), tiny_models.tokenizer(), 96), 40)[:12]
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
    result = gq.evaluate(folders["llama"], corpus, folders["llama"], window=64, windows=5)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1_agreement"] == 1
    assert result["tokens"] == 320
    assert result["true_bits_per_weight"] == 32
    low, high = result["perplexity_interval"]
    assert low <= result["perplexity"] <= high


def test_every_window_begins_with_bos_and_no_prediction_of_it_counts(
    corpus: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gyroquant.calibration.stream._HEAD_TOKENS", 16)
    folder, tokenizer = folders["llama"], tiny_models.beginning()
    found = gq.evaluate(folder, corpus, window=40, windows=3, tokenizer=tokenizer)
    ids = torch.tensor(tiny_models.tokenizer()(corpus.read_text())["input_ids"])
    rows = torch.stack([torch.cat([torch.tensor([1]), ids[39 * i : 39 * (i + 1)]]) for i in range(3)])
    with torch.no_grad():
        logs = tiny_models.build("llama")(rows).logits.double().log_softmax(-1)
    loss = -logs[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert (found["add_bos"], found["bos"]) == (True, "<s>")
    assert (found["predicted"], found["tokens"], found["text"]["tokens"]) == (3 * 39, 3 * 39, 6000)
    off = gq.evaluate(folder, corpus, window=40, windows=3, tokenizer=tokenizer, add_bos=False)
    assert (off["add_bos"], off["bos"], off["tokens"], off["predicted"]) == (False, None, 120, 117)
    assert off["loss"] != found["loss"]


def test_a_tokenizer_without_bos_gives_the_same_numbers_with_and_without_it(
    corpus: Path, folders: dict[str, Path]
) -> None:
    on, off = (gq.evaluate(folders["llama"], corpus, window=40, windows=3, add_bos=add) for add in (True, False))
    assert on["bos"] is off["bos"] is None
    for key in ("perplexity", "perplexity_interval", "loss", "tokens", "predicted"):
        assert on[key] == off[key]


def test_bos_within_a_window_is_read_and_not_predicted() -> None:
    model = tiny_models.build("llama")
    ids = tiny_models.tokens(model, 2, 30).clamp_min(3)
    ids[0, [0, 9, 21]] = 1
    ids[1, [0, 12]] = 1
    scores = score_windows(open_model(model), ids, open_model(tiny_models.build("llama", seed=3)), bos=(1,))
    with torch.no_grad():
        logs = model(ids).logits[:, :-1].double().log_softmax(-1)
    each = -logs.gather(-1, ids[:, 1:, None])[..., 0]
    counted = ids[:, 1:] != 1
    assert scores.predicted.tolist() == [27, 28]
    assert torch.allclose(scores.loss, (each * counted).sum(1), rtol=1e-5)
    assert summary(scores)["loss"] == pytest.approx(float((each * counted).sum() / counted.sum()), rel=1e-5)
    with pytest.raises(gq.InputError, match="only BOS tokens"):
        score_windows(open_model(model), torch.ones(1, 5, dtype=torch.long), bos=(1,))


def test_conversations_are_measured_as_their_template_writes_them(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"prompt": tiny_models.prose(20, i), "completion": tiny_models.prose(20, i + 50)} for i in range(6)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = gq.evaluate(
        folders["llama"], tmp_path / "chat.jsonl", window=32, tokenizer=tiny_models.beginning(template=tiny_models.CHAT)
    )
    assert found["text"]["conversations"] == 6
    assert found["predicted"] < found["tokens"]  # conversations begin within windows
    assert found["bos"] == "<s>"


def test_fewer_windows_than_asked_for_are_told(corpus: Path, folders: dict[str, Path]) -> None:
    found = gq.evaluate(folders["llama"], [tiny_models.prose(100)], window=32, windows=9)
    assert (found["windows"], found["windows_asked"], found["tokens"], found["text"]["tokens"]) == (3, 9, 96, 100)
    console = Console(record=True, width=160)
    console.print(*evaluated(found))
    assert "96 of 100 in 3 windows of 32 (9 requested; the text has no more)" in console.export_text()


def test_presets_and_overrides(corpus: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PRESETS, "bbt", (64, 3))
    assert gq.evaluate(folders["llama"], corpus, preset="bbt")["windows"] == 3
    assert gq.evaluate(folders["llama"], corpus, preset="bbt", windows=2)["windows"] == 2
    assert gq.evaluate(folders["llama"], corpus, preset="bbt", window=32)["windows"] > 3
    for arguments, error in (
        ({"preset": "tea"}, "no preset 'tea'"),
        ({"window": 1}, "use 2 to 128 tokens"),
        ({"window": 500}, "does not fit a model of 128 positions"),
    ):
        with pytest.raises(gq.InputError, match=error):
            gq.evaluate(folders["llama"], corpus, **arguments)


def test_models_of_other_vocabularies_are_not_compared(corpus: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(gq.InputError, match="different vocabularies"):
        gq.evaluate(folders["llama"], corpus, tiny_models.build("llama", vocab_size=100), window=32)


def test_intervals_cover_the_mean() -> None:
    """Over many draws a 95 % interval holds the true mean about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        low, high = interval(torch.randn(40, generator=generator, dtype=torch.float64), 1)
        hits += low <= 0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_windows_count_by_what_is_predicted_in_them() -> None:
    scores = WindowScores(torch.tensor([10.0, 40.0], dtype=torch.float64), torch.tensor([10, 20]))
    assert summary(scores)["loss"] == pytest.approx(50 / 30)
    low, high = interval(torch.tensor([10.0, 40.0]).double(), torch.tensor([10, 20]))
    assert (low, high) == (1.0, 2.0)


def test_hopeless_models_still_get_a_number() -> None:
    result = summary(WindowScores(torch.tensor([1e6, 1e6], dtype=torch.float64), torch.tensor([10, 10])))
    assert math.isfinite(result["perplexity"])
    assert result["perplexity"] > 1e300
    assert result["kl"] is None
