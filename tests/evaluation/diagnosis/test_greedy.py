"""Greedy continuations by Jacobi iteration are those of one token a step."""

import pytest
import tiny_models
import torch

from gyroquant.evaluation.diagnosis import greedy as module
from gyroquant.evaluation.diagnosis.greedy import choices, continuations, first_difference, summary
from gyroquant.models.stores.source import open_model


@pytest.mark.parametrize("guess", ["random", "right"])
def test_continuations_are_greedy(guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    text = tiny_models.tokens(model, 3, 22)
    expected = text[:, :10]
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    given = expected if guess == "right" else text
    passes: list[int] = []
    real = module.choices
    monkeypatch.setattr(module, "choices", lambda *args: passes.append(1) or real(*args))
    steps: list[int] = []
    found = continuations(open_model(model), given, 10, torch.float32, "cpu", lambda: steps.append(1))
    assert torch.equal(found, expected)
    assert len(steps) == 12
    assert len(passes) == (1 if guess == "right" else len(passes))
    assert len(passes) <= 12


def test_the_first_difference_under_the_original_is_that_of_both_continuations() -> None:
    """One pass of the second model over the first's text finds where two continuations of their own differ."""
    first, second = tiny_models.build("llama"), tiny_models.build("llama")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    text = tiny_models.tokens(first, 4, 26)
    one, two = (continuations(open_model(m), text, 10, torch.float32, "cpu", lambda: None) for m in (first, second))
    forced = choices(open_model(second), one, torch.float32, "cpu")[:, 9:-1]
    for number in range(4):
        own = first_difference(one[number, 10:].tolist(), two[number, 10:].tolist())
        assert first_difference(one[number, 10:].tolist(), forced[number].tolist()) == own


def test_first_differences_and_their_distribution() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [0, 2, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2, 0]) == 3
    found = summary([2, None, 4, None], [9, 9, 9, 9])
    assert (found["different"], found["median"], found["first"]) == (0.5, None, [2, None, 4, None])
    assert summary([2, 3, 4, None], [9] * 4)["median"] == 3.5
