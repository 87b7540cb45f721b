"""True bits are what is in the files, to the bit, on files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gyroquant.benchmark.external_tools import ExternalToolError
from gyroquant.benchmark.external_tools.stored import bytes_by_part, layer_weights, true_bits, wide_bytes

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    tensors = {f"{Q}.weight": torch.zeros(64, 32), f"{DOWN}.weight": torch.zeros(32, 128)}
    others = {"model.layers.0.input_layernorm.weight": 32, "model.embed_tokens.weight": (96, 32)}
    others |= {"lm_head.weight": (96, 32), f"{Q}.bias": 64, "model.layers.1.mlp.gate.weight": (4, 32)}
    save_file(tensors | {name: torch.zeros(shape) for name, shape in others.items()}, folder / "model.safetensors")
    return folder


def packed(bits: int, inputs: int, outputs: int, group: int) -> dict[str, torch.Tensor]:
    groups = inputs // group
    return {
        "qweight": torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32),
        "qzeros": torch.zeros(groups, outputs * bits // 32, dtype=torch.int32),
        "scales": torch.zeros(groups, outputs, dtype=torch.float16),
        "g_idx": torch.zeros(inputs, dtype=torch.int32),
        "bias": torch.zeros(outputs, dtype=torch.float16),
    }


def test_codes_scales_zeros_and_orders_count_and_biases_do_not(original: Path, tmp_path: Path) -> None:
    one = {f"{Q}.{name}": tensor for name, tensor in packed(2, 32, 64, 32).items()}
    two = {f"{DOWN}.{name}": tensor for name, tensor in packed(2, 128, 32, 32).items()}
    files = tmp_path / "files" / "model-w2g32"  # some write into a folder of their own
    files.mkdir(parents=True)
    save_file(one | {"model.embed_tokens.weight": torch.zeros(96, 32)}, files / "model-00001-of-00002.safetensors")
    save_file(two, files / "model-00002-of-00002.safetensors")
    weights = 64 * 32 + 32 * 128
    wanted = 2 + (2 + 16) / 32 + 32 * (32 + 128) / weights
    assert true_bits(tmp_path / "files", original) == wanted


def test_transforms_count_and_a_layer_left_out_counts_in_full(original: Path, tmp_path: Path) -> None:
    tensors = {
        f"{Q}.weight_packed": torch.zeros(64, 4, dtype=torch.int32),
        f"{Q}.weight_shape": torch.zeros(2, dtype=torch.int64),
        f"{Q}.v_input.weight": torch.zeros(32, 32, dtype=torch.float16),
        f"{Q}_other.weight": torch.zeros(7, 7),  # of another module
        f"{DOWN}.weight": torch.zeros(32, 128, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    files = tmp_path / "files"
    files.mkdir()
    (tmp_path / "model.safetensors").rename(files / "model.safetensors")
    stored = 64 * 4 * 32 + 2 * 64 + 32 * 32 * 16 + 32 * 128 * 16
    assert true_bits(files, original) == stored / (64 * 32 + 32 * 128)


def test_what_is_not_rounded_counts_16_bits_an_entry(original: Path, tmp_path: Path) -> None:
    rounded = {
        f"{Q}.qweight": torch.zeros(4, 32, dtype=torch.int32),
        f"{Q}.scales": torch.zeros(7, 64),  # of 32 bits, and paid for
        f"{Q}.v_input.weight": torch.zeros(32, 32),
    }
    narrow = {"lm_head.weight": torch.zeros(96, 32, dtype=torch.bfloat16), "ids": torch.zeros(9, dtype=torch.int64)}
    wide = {
        "model.embed_tokens.weight": torch.zeros(96, 32),
        "model.layers.0.input_layernorm.weight": torch.zeros(32, dtype=torch.float64),
        f"{Q}.bias": torch.zeros(64),
        f"{DOWN}.weight": torch.zeros(32, 128),  # left as it is
    }
    files = tmp_path / "files" / "inner"
    files.mkdir(parents=True)
    save_file(rounded | narrow, files / "model-00001-of-00002.safetensors")
    assert wide_bytes(tmp_path / "files", original) == 0
    save_file(wide, files / "model-00002-of-00002.safetensors")
    assert wide_bytes(tmp_path / "files", original) == 2 * (96 * 32 + 64 + 32 * 128) + 6 * 32


def test_embeddings_and_heads_count_as_a_tool_leaves_them(folders: dict[str, Path], tmp_path: Path) -> None:
    """Codes, scales and transforms belong to their layer, biases to the rest."""
    layer = "model.layers.0.mlp.up_proj"
    stored = {
        f"{layer}.qweight": torch.zeros(10, dtype=torch.int32),
        f"{layer}.v_input.weight": torch.zeros(4, 4, dtype=torch.float16),
        f"{layer}.scales": torch.zeros(5),  # of 32 bits, and paid for
        f"{layer}.bias": torch.zeros(6),
        "model.embed_tokens.qweight": torch.zeros(7, dtype=torch.int32),
        "lm_head.weight": torch.zeros(9, dtype=torch.float32),
        "model.norm.weight": torch.zeros(3, dtype=torch.float16),
    }
    save_file(stored, tmp_path / "model.safetensors")
    parts = bytes_by_part(tmp_path, folders["llama"])
    assert parts == {"layers": 40 + 32 + 20, "embeddings": 28, "head": 18, "rest": 12 + 6, "total": 156}


def test_layers_are_those_of_blocks_without_routers(original: Path) -> None:
    assert layer_weights(original) == {Q: 64 * 32, DOWN: 32 * 128}


def test_what_is_missing_or_broken_is_named(original: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    with pytest.raises(ExternalToolError, match=r"files holds no safetensors file"):
        true_bits(files, original)
    path = files / "model.safetensors"
    save_file({f"{Q}.weight": torch.zeros(64, 32)}, path)
    with pytest.raises(ExternalToolError, match=f"stores nothing for the layer {DOWN}"):
        true_bits(files, original)
    for text in (b"", b"\x05\0\0\0\0\0\0\0{]"):
        path.write_bytes(text)
        with pytest.raises(ExternalToolError, match=r"model.safetensors is not a safetensors file"):
            true_bits(files, original)
    header = json.dumps({"x": {"dtype": "F6_ODD", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ExternalToolError, match="x has the unknown type F6_ODD"):
        true_bits(files, original)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    save_file({"embedding.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ExternalToolError, match="no linear layers in blocks"):
        layer_weights(tmp_path)
