from pathlib import Path

import pytest
import torch
from external_tool_tasks import LARGEST, error, interpreter, opened, task
from safetensors.torch import load_file

from gyroquant.benchmark.external_tools import Size
from gyroquant.benchmark.external_tools.brevitas import Brevitas


def test_widths_that_it_has() -> None:
    assert not Brevitas().problem("GPTQ", Size(2, 64))
    assert "not 1" in Brevitas().problem("GPTQ", Size(1, 64))


def test_what_its_front_door_is_asked_for() -> None:
    found = " ".join(Brevitas().options("GPTQ", Size(3, 64), seed=7))
    assert "--weight-bit-width 3 --weight-quant-granularity per_group --weight-group-size 64" in found
    assert "--weight-quant-type asym --quantize-weight-zero-point --seed 7 --gptq" in found
    found = " ".join(Brevitas().options("rotation + MassDiff + Qronos", Size(2, -1, symmetric=True), seed=0))
    assert "per_channel --weight-quant-type sym --seed 0 --rotation fused_no_fx" in found
    assert "--permute-fn massdiff" in found
    assert "--qronos" in found
    assert "--gptq" not in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "size", "true_bits"),
    [
        ("GPTQ", Size(4, 32), 4 + (16 + 4) / 32),
        ("GPTQ", Size(4, 32, symmetric=True), 4 + 16 / 32),
        ("rotation + MassDiff + Qronos", Size(4, 32), 4 + (16 + 4) / 32),
    ],
)
def test_it_deploys_a_model_of_the_size_asked_for(
    variant: str, size: Size, true_bits: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = folders["llama_tied"]
    found = Brevitas().run(variant, task(model, tmp_path / "out", size), interpreter(Brevitas))
    assert found.true_bits == pytest.approx(true_bits, abs=1e-9)
    assert 0 < error(found, model) < LARGEST
    rotated = variant.startswith("rotation")
    plain, original = opened(found.dense).state_dict(), opened(model).state_dict()
    name = "model.embed_tokens.weight"
    assert torch.equal(plain[name], original[name]) is not rotated
    assert torch.equal(plain["lm_head.weight"], plain[name]) is not rotated


@pytest.mark.slow
def test_its_weights_lie_on_the_grid_that_was_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    found = Brevitas().run("GPTQ", task(folders["llama"], tmp_path / "out", Size(2, 32)), interpreter(Brevitas))
    files = load_file(tmp_path / "out" / "files" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    scales = files[f"{name}_scales"].float()
    steps = opened(found.dense).state_dict()[name].reshape(96, 2, 32) / scales
    assert torch.allclose(steps, steps.round(), atol=1e-5)
    assert float((steps.amax(-1) - steps.amin(-1)).max()) <= 3 + 1e-5
    assert files[f"{name}_codes"].numel() == 96 * 64 * 2 / 8
