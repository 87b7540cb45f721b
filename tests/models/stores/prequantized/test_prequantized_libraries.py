"""Folders of compressed-tensors as its own library writes them, held against what transformers opens them as."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from gyroquant.models.stores.source import open_model

pytest.importorskip("compressed_tensors", exc_type=ImportError)

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float"}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}

# The scheme of the weights, that of their inputs, and the format that it is stored in.
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    **{
        f"{bits} bits{'' if symmetric else ', asymmetric'}": (
            {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32},
            None,
            "pack-quantized",
        )
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "a row": ({"num_bits": 4, "symmetric": False, "strategy": "channel"}, None, "pack-quantized"),
    "a matrix": ({"num_bits": 5, "symmetric": False, "strategy": "tensor"}, None, "pack-quantized"),
    "int8": ({"num_bits": 8, "strategy": "channel"}, TOKENS, "int-quantized"),
    "int8, asymmetric": ({"num_bits": 8, "symmetric": False, "strategy": "tensor"}, TOKENS, "int-quantized"),
    "fp8": (FP8 | {"strategy": "tensor"}, FP8 | {"strategy": "tensor", "dynamic": False}, "float-quantized"),
    "fp8 a row": (FP8 | {"strategy": "channel"}, FP8 | TOKENS, "float-quantized"),
    "fp8 in blocks": (FP8 | {"strategy": "block", "block_structure": [32, 32]}, FP8 | TOKENS, "float-quantized"),
    "mxfp4": (MX | {"num_bits": 4}, None, "mxfp4-pack-quantized"),
    "mxfp6": (MX | {"num_bits": 6}, None, "mxfp6-pack-quantized"),
    "mxfp8": (MX | {"num_bits": 8}, None, "mxfp8-quantized"),
    "nvfp4": (NV, None, "nvfp4-pack-quantized"),
}


def grouped(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """What has one scale each, along the last axis."""
    if args.strategy in ("tensor", "channel"):
        return weight if args.strategy == "channel" else weight.reshape(1, -1)
    if args.strategy == "block":
        high, wide = args.block_structure
        return weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, args.group_size))


def compressed(out: Path, weights: dict[str, Any], inputs: dict[str, Any] | None) -> None:
    """A tiny model as llm-compressor saves it after rounding to nearest, in fp32."""
    model = tiny_models.build("llama")
    arguments = None if inputs is None else QuantizationArgs(**inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=arguments)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args, weight, whole = module.quantization_scheme.weights, module.weight.data, None
        if args.strategy == "tensor_group":
            whole = module.weight_global_scale.data = generate_gparam(weight.min()[None], weight.max()[None])
        groups = grouped(weight, args)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
        if not args.symmetric:
            module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.01)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_are_what_transformers_opens(name: str, tmp_path: Path) -> None:
    weights, inputs, layout = SCHEMES[name]
    compressed(tmp_path, weights, inputs)
    asked = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=asked)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == layout
    store = open_model(tmp_path)
    # The library multiplies NVFP4's elements in bfloat16, by scales that it has divided in the same.
    rounding = 2.0**-7 if name == "nvfp4" else 0.0
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(store.read([key])[key], tensor.float(), rtol=rounding, atol=0)
    source = store.source_quantization
    assert source is not None
    assert source["bits"] == [weights["num_bits"]]
    assert source["layout"] == layout
    assert any("rounds input activations to 8 bits" in note for note in source["notes"]) == (inputs is not None)
    assert any("14 x input_scale" in note for note in source["notes"]) == (name == "fp8")
