"""Folders that release 0.1.0 wrote, before its rooms were rebuilt, load and verify unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gyroquant as gq
from gyroquant.inspection.model import read_layers

DATA = Path(__file__).parent.parent / "data" / "folders_of_0.1.0"
FOLDERS = ["packed-gsr", "packed-gyro"]


@pytest.mark.parametrize("name", FOLDERS)
def test_their_logits_are_what_they_were(name: str) -> None:
    """The second one has online maps across heads, a rounded KV cache and layers of two bit widths.

    Models are in fp16, whose products differ by a few units in the last place between processors.
    """
    model = gq.load(DATA / name)
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits[0, -4:].float()
    expected = load_file(DATA / f"{name}-logits.safetensors")["logits"]
    assert (logits - expected).abs().max() < 4e-3 * expected.abs().max()


@pytest.mark.parametrize("name", FOLDERS)
def test_they_verify_and_tell_how_to_make_them_again(name: str) -> None:
    result = gq.verify(DATA / name)
    assert result["passed"], result["problems"]
    assert result["tensors"] > 10
    assert result["command"].startswith("gyroquant quantize original-")


@pytest.mark.parametrize("name", FOLDERS)
def test_their_layers_are_read(name: str) -> None:
    layers = read_layers(DATA / name / "gyroquant.json")
    assert len(layers) == 14
    assert all(layer["output_error"] > 0 for layer in layers)
