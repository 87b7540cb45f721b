"""Outlier figures are those of the activations at the sites."""

from pathlib import Path

import pytest
import tiny_models
import torch

from gyroquant.evaluation.outliers import measure_outliers
from gyroquant.inspection.model import inspect_model
from gyroquant.models.stores.source import open_model


def test_figures_match_the_activations() -> None:
    model = tiny_models.build("llama")
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    ids = tiny_models.tokens(model)
    rows = {(row.site, row.block): row for row in measure_outliers(open_model(model), ids)}
    x = seen[-1].reshape(-1, 96).double()
    row = rows["R4", 1]
    assert row.kurtosis == pytest.approx(float((x**4).mean() / (x**2).mean() ** 2), rel=1e-4)
    assert row.rms == pytest.approx(float((x**2).mean().sqrt()), rel=1e-4)
    ratio = (x.abs().amax(1) / (x**2).mean(1).sqrt()).mean()
    assert row.max_over_rms == pytest.approx(float(ratio), rel=1e-4)
    assert {site for site, _ in rows} == {"attn_in", "R2", "mlp_in", "R4"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "qwen2_moe", "gpt2"])
def test_inspection_covers_every_architecture(name: str, folders: dict[str, Path], corpus: Path) -> None:
    small = ["weights.group_size=16", "calibration.nsamples=4", "calibration.seqlen=32"]
    result = inspect_model(folders[name], "gptq", small, corpus)
    data = result.to_dict()
    fused = name not in ("gemma2", "olmo2")
    assert (data["recipes"]["gsr"] == "") == fused
    assert data["recipes"]["rtn"] == ""
    assert {site["site"] for site in data["sites"]} >= {"R1", "R2", "R3", "R4", "linear"}
    assert data["outliers"]
    assert data["prediction"]["seconds"] > 0
    assert data["prediction"]["peak_memory_bytes"] > 10**7
