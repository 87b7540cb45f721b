"""A decoder class of a user's own: derived, proven, rounded and opened again, without a line about it in gyroquant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from deriving_examples import CustomConfig, CustomModel, custom_config
from tiny_runs import run
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import gyroquant as gq
from gyroquant.models.deriving.tiny import randomise, tiny_tokens


@pytest.fixture
def registered() -> Iterator[None]:
    """The class, known to transformers for the duration of a test."""
    AutoConfig.register(CustomConfig.model_type, CustomConfig)
    AutoModelForCausalLM.register(CustomConfig, CustomModel)
    yield
    CONFIG_MAPPING._extra_content.pop(CustomConfig.model_type)
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(CustomConfig)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("sandwich", [False, True])
def test_it_is_rotated_rounded_and_opened_again(sandwich: bool, corpus: Path, tmp_path: Path) -> None:
    model: Any = randomise(CustomModel(custom_config(sandwich=sandwich))).eval()
    maps = [f"transform.{site}.method=hadamard" for site in ("R1", "R4")]
    changes = ("weights.bits=8", "weights.group_size=-1", *maps)
    online = ("transform.R1.online=true",) if sandwich else ()
    manifest: Any = run(model, tmp_path / "out", "gptq-w4", corpus, *changes, *online)
    assert manifest["rotation"] == ("online" if sandwich else "fused")
    assert manifest["described_by"] == "odd_decoder (derived)"
    assert manifest["proof"]["relative_logit_error"] < 5e-6
    rounded = {layer["name"] for layer in manifest["layers"]}
    assert {"body.stack.0.ask", "body.stack.2.experts.1.land", "body.stack.1.common.lift"} <= rounded
    assert "body.stack.0.router" not in rounded
    ids = tiny_tokens(model)
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected, logits = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.08  # 8 bits


def test_without_a_registration_its_reason_is_said(corpus: Path, tmp_path: Path) -> None:
    model: Any = randomise(CustomModel(custom_config(sandwich=False))).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(gq.InputError, match="odd_decoder"):
        run(tmp_path / "model", tmp_path / "out", "rtn-w4", corpus)
