"""The OpenVINO graph is the model that we saved: every architecture, grid and map, step by step and in batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import gyroquant as gq
from gyroquant import maps
from gyroquant.deploy import export
from gyroquant.errors import InputError
from gyroquant.export.formats import Layer, Needs, format_named
from gyroquant.grids import Fp4Grid, IntegerGrid, QuantizedWeight
from gyroquant.maps import Map
from gyroquant.runtimes import OpenVinoRuntime

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")
NAMES = (
    "llama",
    "llama_tied",
    "llama_bias",
    "mistral",
    "smollm3",
    "granite",
    "granite_bias",
    "seed_oss",
    "qwen2",
    "qwen3",
    "gemma3",
)
ROTATED = {
    "R1": {"method": "hadamard"},
    "R2": {"method": "hadamard"},
    "R3": {"method": "hadamard"},
    "R4": {"method": "hadamard", "block": 32, "random_signs": True},
}


def saved(model: Any, folder: Path, transform: dict[str, Any], **weights: Any) -> Path:
    """The folder of a tiny model rounded to nearest."""
    recipe = {
        "transform": transform,
        "weights": {"bits": 4, "group_size": 32, "solver": "rtn"} | weights,
        "calibration": {"nsamples": 2, "seqlen": 32},
        "proof": {"seqlen": 32},
    }
    gq.quantize(model, recipe, [tiny.prose(3000)], out=folder, tokenizer=tiny.tokenizer())
    return folder


@torch.no_grad()
def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return gq.load(folder, dtype="float32")(input_ids=ids).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_saved_model(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    transform = {key: value for key, value in ROTATED.items() if name != "gemma3" or key != "R1"}
    out = saved(model, tmp_path / "out", transform)
    facts = export(out, "openvino", tmp_path / "ir")
    assert facts["check"]["relative_logit_error"] < 1e-5
    assert facts["facts"]["graph"] == "built"
    ids = tiny.tokens(model, 1)[0]
    runtime, wanted = OpenVinoRuntime(tmp_path / "ir", exact=True), ours(out, ids[None])[0]
    assert close(runtime.logits(ids), wanted)
    runtime.start()
    pieces = [runtime.feed(ids[None, a:b]) for a, b in ((0, 5), (5, 6), (6, 24))]  # longer than gemma3's window
    assert close(torch.cat(pieces), wanted)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", [{"symmetric": False}, {"symmetric": True}, {"symmetric": True, "midrise": True}])
@pytest.mark.parametrize("group_size", [32, -1])
def test_every_grid_is_exact(bits: int, kind: dict[str, bool], group_size: int) -> None:
    from gyroquant.export.openvino_decoder import exact_settings
    from gyroquant.export.openvino_ops import rounded

    torch.manual_seed(0)
    grid = IntegerGrid(bits=bits, group_size=group_size, **kind)
    groups = torch.randn(24, 96).view(24, -1, grid.group_of(96))
    params = grid.fit(groups)
    weight = QuantizedWeight(grid, grid.encode(groups, params).view(24, 96), params)
    x = torch.randn(2, 3, 96)
    given = ov.opset13.parameter([-1, -1, 96], np.float32)
    graph = ov.Model([rounded(weight).product(given)], [given])
    found = torch.from_numpy(ov.Core().compile_model(graph, "CPU", exact_settings())(x.numpy())[0])
    assert close(found, x @ weight.dequantize().T)


def some_maps() -> list[Map]:
    draw = torch.Generator().manual_seed(0)
    return [
        maps.hadamard(96),
        maps.hadamard(96).transpose(),
        maps.walsh(96),
        maps.walsh(96).transpose(),
        maps.hadamard(2),
        maps.random_signs(96, draw),
        maps.Diagonal(torch.rand(96, generator=draw) + 1),
        maps.Permutation(torch.randperm(96, generator=draw)),
        maps.blocks(maps.hadamard(16), 96),
        maps.BlockDiagonal((maps.hadamard(16), maps.hadamard(8)), 4),
        maps.Across(maps.hadamard(12), 8),
        maps.random_orthogonal(96, draw),
        maps.product(maps.random_signs(96, draw), maps.walsh(96)),
        maps.Householder(torch.randn(96, generator=draw)),
        maps.Identity(96),
        maps.butterfly(64),
    ]


@pytest.mark.parametrize("m", some_maps(), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rank", [3, 4])
def test_every_map_is_exact(m: Map, rank: int) -> None:
    from gyroquant.export.openvino_ops import mapped

    x = torch.randn(*(2, 3, 5)[: rank - 1], m.n)
    given = ov.opset13.parameter([-1] * (rank - 1) + [m.n], np.float32)
    graph = ov.Model([ov.opset13.multiply(mapped(m, given), np.float32(1))], [given])
    found = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    assert close(torch.from_numpy(found), m.in_fp32().apply(x))


def test_padded_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    model = tiny.build("llama")
    out = saved(model, tmp_path / "out", {}, bits=8)
    export(out, "openvino", tmp_path / "ir")
    from gyroquant.export.openvino_decoder import exact_settings

    ids = tiny.tokens(model, 2, 8)
    request = ov.Core().compile_model(str(tmp_path / "ir" / "openvino_model.xml"), "CPU", exact_settings())
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    positions = np.stack([np.arange(8), np.array([0, 0, 0, 0, 1, 2, 3, 4])])
    feed = {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions}
    logits = torch.from_numpy(
        request.create_infer_request().infer(feed | {"beam_idx": np.arange(2, dtype=np.int32)})[0]
    )
    assert close(logits[0], ours(out, ids[:1])[0])
    assert close(logits[1, 3:], ours(out, ids[1:, 3:])[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_rounded_keeps_its_dtype(dtype: str, tmp_path: Path) -> None:
    recipe = {"weights": {"bits": 4, "group_size": 32, "solver": "rtn"}, "proof": {"seqlen": 32}}
    recipe |= {"calibration": {"nsamples": 2, "seqlen": 32}}
    text, out = [tiny.prose(3000)], tmp_path / "out"
    gq.quantize(tiny.build("qwen2"), recipe, text, out=out, tokenizer=tiny.tokenizer(), save_dtype=dtype)
    assert export(out, "openvino", tmp_path / "ir")["check"]["relative_logit_error"] < 1e-5
    graph = ov.Core().read_model(str(tmp_path / "ir" / "openvino_model.xml"))
    kinds = {op.get_element_type() for op in graph.get_ops() if list(op.get_output_partial_shape(0)) == [96, 64]}
    wanted = {"float16": ov.Type.f16, "bfloat16": ov.Type.bf16, "float32": ov.Type.f32}[dtype]
    assert wanted in kinds


def test_weights_stay_compressed(tmp_path: Path) -> None:
    """Two bits a code in the file; a mid-rise grid, whose zero lies between two codes, as well."""
    model = tiny.build("llama", hidden_size=128, intermediate_size=256, vocab_size=96)
    out = saved(model, tmp_path / "out", {}, bits=2, symmetric=True, midrise=True, group_size=-1)
    export(out, "openvino", tmp_path / "ir")
    graph = ov.Core().read_model(str(tmp_path / "ir" / "openvino_model.xml"))
    kinds = [op.get_element_type() for op in graph.get_ops() if op.get_type_name() == "Constant"]
    assert kinds.count(ov.Type.u2) == 14
    assert graph.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).astype(str) == "0"


def test_what_it_cannot_hold_is_said_before_any_work(tmp_path: Path) -> None:
    one = format_named("openvino")
    fp4 = Layer("a", Fp4Grid(), 128)
    assert "no type for the grid fp4" in one.problems(Needs("llama", (fp4,)))[0]
    assert "not for mixtral" in one.problems(Needs("mixtral", ()))[0]
    config = tiny.CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "not dynamic" in one.problems(Needs("llama", (), (), config))[0]
    model = tiny.build("llama")
    recipe = {"weights": {"bits": 4, "group_size": 32, "solver": "rtn"}, "activations": {"bits": 8}}
    recipe |= {"calibration": {"nsamples": 2, "seqlen": 32}, "proof": {"seqlen": 32}}
    gq.quantize(model, recipe, [tiny.prose(3000)], out=tmp_path / "a8", tokenizer=tiny.tokenizer())
    with pytest.raises(InputError, match="does not round activations"):
        export(tmp_path / "a8", "openvino", tmp_path / "ir")
    assert not (tmp_path / "ir").exists()


def test_opens_without_gyroquant(tmp_path: Path) -> None:
    model = tiny.build("qwen3")
    out = saved(model, tmp_path / "out", ROTATED)
    export(out, "openvino", tmp_path / "ir")
    from gyroquant.export.openvino_decoder import exact_settings

    ids = tiny.tokens(model, 1, 6)
    code = f"""
import sys; sys.modules["gyroquant"] = None
import numpy as np, openvino as ov
r = ov.Core().compile_model({str(tmp_path / "ir" / "openvino_model.xml")!r}, "CPU",
    {exact_settings()!r}).create_infer_request()
r.infer({{"input_ids": np.array({ids.tolist()}), "attention_mask": np.ones((1, 6), np.int64),
    "position_ids": np.arange(6)[None], "beam_idx": np.zeros(1, np.int32)}})
print(*r.get_tensor("logits").data[0, -1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert close(torch.tensor([float(word) for word in done.stdout.split()]), ours(out, ids)[0, -1])
