"""What a dtype does not hold is refused before any work, by name and with the remedy; so are scales, by formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats.base import check_fit, format_named, requirements_of
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.ranges import Ranges
from gyroquant.models.stores.source import open_model

RTN8 = ["weights.bits=8", "weights.group_size=32", "weights.symmetric=true"]


def ranges(dtype: torch.dtype, **tensors: torch.Tensor) -> Ranges:
    found = Ranges(dtype)
    for name, tensor in tensors.items():
        for piece in tensor.split(7):
            found.add(name, piece)
    return found


def test_numbers_are_held_or_refused_by_name() -> None:
    usual = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert ranges(torch.float16, a=usual, b=1e-3 * usual, c=torch.zeros(5), d=torch.empty(0)).check("abcd") == []
    with pytest.raises(InputError, match=r"b holds values up to 1e\+05: too large for float16.*--save-dtype bfloat16"):
        ranges(torch.float16, a=usual, b=torch.tensor([1e5])).check("ab")
    with pytest.raises(InputError, match=r"b is off by .* % in float16.*--save-dtype bfloat16 or float32"):
        ranges(torch.float16, a=usual, b=1e-7 * usual).check("ab")
    assert ranges(torch.bfloat16, a=1e9 * usual, b=1e-30 * usual).check("ab") == []
    assert ranges(torch.float16, a=1e9 * usual).check("b") == []
    (said,) = ranges(torch.float16, q_bias=1e-7 * usual).check(["q_bias"])
    assert "q_bias is off by" in said


def sized(name: str, size: float, where: str = "proj") -> Any:
    model = tiny_models.build(name)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if where in label:
                parameter.mul_(size)
    return model


def quantized(model: Any, out: Path, *changes: str, **options: Any) -> dict[str, Any]:
    gq.quantize(model, gq.load_recipe("rtn", [*RTN8, *changes]), out=out, **options)
    found: dict[str, Any] = json.loads((out / "gyroquant.json").read_text())
    return found


@pytest.mark.parametrize(
    ("where", "size", "says"),
    [
        ("layers.1.mlp.down_proj", 1e7, "model.layers.1.mlp.down_proj.weight holds"),
        ("embed_tokens", 1e6, "model.embed_tokens.weight holds"),
        ("layers.0.input_layernorm", 1e6, "model.layers.0.input_layernorm.weight holds"),
        ("layers.1.mlp.down_proj", 1e-6, "model.layers.1.mlp.down_proj.weight is off by"),
    ],
)
def test_a_model_that_float16_does_not_hold_is_refused(where: str, size: float, says: str, tmp_path: Path) -> None:
    model = sized("llama", size, where)
    with pytest.raises(InputError, match=f"{says}.*--save-dtype bfloat16 or float32"):
        quantized(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantized(model, tmp_path / "out", save_dtype="bfloat16", fresh=True)


def test_small_weights_are_kept_and_the_report_says_what_is_true(tmp_path: Path) -> None:
    usual = quantized(sized("llama", 1), tmp_path / "usual")
    model = sized("llama", 2.0**-26)
    found = quantized(model, tmp_path / "out", save_dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert found["bits"]["stored_bits"]["global"] == 32 * 14
    assert "global" not in usual["bits"]["stored_bits"]
    store = open_model(tmp_path / "out")
    assert isinstance(store, PackedStore)
    weights = dict(model.named_parameters())
    for layer, before in zip(found["layers"], usual["layers"], strict=True):
        weight = weights[f"{layer['name']}.weight"].detach()
        decoded = store.read([f"{layer['name']}.weight"])[f"{layer['name']}.weight"]
        assert layer["weight_error"] == pytest.approx(float((decoded - weight).norm() / weight.norm()) ** 2, rel=1e-3)
        assert layer["weight_error"] < 1.05 * before["weight_error"]
    needs = requirements_of(store)
    for name in ("gptq", "gguf", "openvino", "compressed-tensors"):
        with pytest.raises(InputError, match=r"fp16 scales, and the scales of model.layers.0"):
            check_fit(format_named(name), needs)
    for name in ("dense", "onnx"):
        assert not [text for text in format_named(name).incompatibilities(needs) if "scales" in text]


def test_a_scale_of_the_whole_weight_that_is_missing_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from gyroquant.system.checksums import write_checksums

    quantized(sized("llama", 2.0**-26), tmp_path / "out", save_dtype="bfloat16")
    file = tmp_path / "out" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("q_proj.weight_global")}
    save_file(kept, file, metadata={"format": "pt"})
    (tmp_path / "out" / "SHA256SUMS").unlink()
    write_checksums(tmp_path / "out")
    with pytest.raises(InputError, match=r"q_proj.weight is not stored as its description states.*global.*missing"):
        open_model(tmp_path / "out").read(["model.layers.0.self_attn.q_proj.weight"])
