"""Gradients that are taken block by block are those of the whole model."""

import pytest
import tiny_models
import torch

from gyroquant.evaluation.diagnosis import smoothness as module
from gyroquant.evaluation.diagnosis.smoothness import candidates, input_gradients, measured_windows, smoothness
from gyroquant.models.stores.source import open_model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_equal_the_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEAD_TOKENS", 16)  # several pieces
    model = tiny_models.build(name)
    ids = tiny_models.tokens(model, 3, 40)
    counted = ids != 1
    calls: list[int] = []
    found = input_gradients(open_model(model), ids, counted, "cpu", lambda: calls.append(1))
    expected = []
    for row, keep in zip(ids, counted, strict=True):
        inputs: list[torch.Tensor] = []
        block = model.model.layers[0] if name == "llama" else model.transformer.h[0]

        def keep_input(_: object, args: tuple[torch.Tensor, ...], inputs: list[torch.Tensor] = inputs) -> object:
            state = args[0].detach().requires_grad_()
            inputs.append(state)
            return (state, *args[1:])

        handle = block.register_forward_pre_hook(keep_input)
        logs = model(row[None]).logits[0, :-1].log_softmax(-1)
        handle.remove()
        losses = -logs.gather(1, row[1:, None])[:, 0] * keep[1:]
        (gradient,) = torch.autograd.grad(losses.sum() / keep[1:].sum(), inputs[0])
        expected.append(gradient.double().norm(dim=-1).mean())
    assert torch.allclose(found, torch.stack(expected), rtol=1e-4)
    assert len(calls) == 2 * model.config.num_hidden_layers


def test_the_ratio_is_of_means() -> None:
    found = smoothness(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert found["ratio"] == 1
    assert found["interval"][0] == pytest.approx(0.5)
    assert found["interval"][1] == pytest.approx(1.5)
    assert smoothness(torch.tensor([6.0]), torch.tensor([2.0]))["ratio"] == 3


def test_candidates_are_tokens_above_epsilon() -> None:
    assert candidates(torch.tensor([[0.5, 0.485, 0.01, 0.005], [0.25, 0.25, 0.25, 0.25]])).tolist() == [2, 4]


def test_few_windows_are_measured_and_one_at_least() -> None:
    assert len(measured_windows(torch.zeros(9, 1024))) == 4
    assert len(measured_windows(torch.zeros(2, 8192))) == 1
