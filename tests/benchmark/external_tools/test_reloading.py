"""What the sides share when they read the weights that a program really applies."""

from __future__ import annotations

import importlib.util

import torch

from gyroquant.benchmark.external_tools.base import RUNNERS

spec = importlib.util.spec_from_file_location("reloading", RUNNERS / "shared" / "reloading.py")
assert spec is not None
assert spec.loader is not None
reloading = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reloading)


def test_a_layers_answers_to_the_identity_are_its_weight_without_bias_and_dust() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    weight[0, 1], weight[2, 2] = 0.0, -3e-42
    found = reloading.by_identity(lambda x: x @ weight.T, 4)
    assert torch.equal(found, torch.where(weight.abs() < 1e-40, 0.0, weight))
    assert torch.allclose(reloading.by_identity(lambda x: x @ weight.T + bias, 4, bias), weight, atol=1e-6)
