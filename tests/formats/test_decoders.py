"""A graph that we build is the model that we saved, in every format that is one: every architecture, grid and map, step
by step and in batches.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_models
import tiny_models
import torch
from graph_formats import GRAPH_FORMATS, GraphFormat, close, saved
from selection import some

import gyroquant as gq
from gyroquant import maps
from gyroquant.errors import InputError
from gyroquant.formats.base import Layer, ModelRequirements, format_named
from gyroquant.formats.export import export
from gyroquant.formats.runtime import open_runtime
from gyroquant.formats.usage_check import DEFAULT_ERROR
from gyroquant.grids import Basis, E8pGrid, FloatZeroGrid, Fp4Grid, IntegerGrid, QuantizedWeight, TrellisGrid
from gyroquant.maps import Map
from gyroquant.models.deriving.tiny import default_config

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


@pytest.fixture(params=GRAPH_FORMATS.values(), ids=GRAPH_FORMATS)
def graphs(request: pytest.FixtureRequest) -> GraphFormat:
    """Each format whose runtime is installed."""
    pytest.importorskip(request.param.package)
    return request.param


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rotated and rounded models by name, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            transform = {key: value for key, value in ROTATED.items() if name != "gemma3" or key != "R1"}
            self[name] = saved(tiny_models.build(name), tmp_path_factory.mktemp("rounded") / name, transform)
            return self[name]

    return Made()


@torch.no_grad()
def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return gq.load(folder, dtype="float32")(input_ids=ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_saved_model(
    name: str, graphs: GraphFormat, rounded: dict[str, Path], tmp_path: Path
) -> None:
    facts = export(rounded[name], graphs.name, tmp_path / "x")
    assert facts["check"]["relative_logit_error"] < 1e-5
    ids = tiny_models.tokens(tiny_models.build(name), 1)[0]
    runtime, wanted = open_runtime(graphs.name, tmp_path / "x", exact=True), ours(rounded[name], ids[None])[0]
    assert close(runtime.logits(ids), wanted)
    runtime.start()
    pieces = [runtime.feed(ids[None, a:b]) for a, b in ((0, 5), (5, 6), (6, 24))]  # longer than gemma3's window
    assert close(torch.cat(pieces), wanted)


@pytest.mark.parametrize("bits", some(range(1, 9), (1, 2, 3, 4, 8)))
@pytest.mark.parametrize("kind", [{"symmetric": False}, {"symmetric": True}, {"symmetric": True, "midrise": True}])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_every_grid_is_exact(bits: int, kind: dict[str, bool], group_size: int, graphs: GraphFormat) -> None:
    torch.manual_seed(0)
    grid = IntegerGrid(bits=bits, group_size=group_size, **kind)
    groups = torch.randn(24, 96).view(24, -1, grid.group_of(96))
    params = grid.fit(groups)
    weight = QuantizedWeight(grid, grid.encode(groups, params).view(24, 96), params)
    x = torch.randn(2, 3, 96)
    assert close(graphs.compute(lambda ops, given: ops.rounded(given, weight), x), x @ weight.dequantize().T)


@pytest.mark.parametrize("bits", some(range(1, 9), (2, 3, 4, 8)))
@pytest.mark.parametrize("group_size", some([16, 32, 48, -1], (16, 48, -1)))
@pytest.mark.parametrize("far", [0.0, 4.0])
def test_float_zero_points_are_exact(bits: int, group_size: int, far: float, graphs: GraphFormat) -> None:
    """Also of groups far from zero, in products of one row and of many, and in a table and the head tied to it."""
    torch.manual_seed(0)
    grid = FloatZeroGrid(bits=bits, group_size=group_size)
    groups = (torch.randn(24, 96) + far).view(24, -1, grid.group_of(96))
    params = grid.fit(groups)
    weight = QuantizedWeight(grid, grid.encode(groups, params).view(24, 96), params)
    for x in (torch.randn(1, 1, 96), torch.randn(2, 9, 96)):
        assert close(graphs.compute(lambda ops, given: ops.rounded(given, weight), x), x @ weight.dequantize().T)
    ids = torch.tensor([[3, 17, 3], [0, 23, 1]])
    assert close(graphs.compute(lambda ops, given: ops.looked_up(given, weight), ids), weight.dequantize()[ids])

    def tied(ops: Any, given: Any) -> Any:
        return ops.rounded(ops.looked_up(given, weight), weight)

    assert close(graphs.compute(tied, ids), weight.dequantize()[ids] @ weight.dequantize().T)


@pytest.mark.parametrize("bits", some([2, 3, 4, 8], (2, 4)))
def test_a_model_with_float_zero_points(bits: int, graphs: GraphFormat, tmp_path: Path) -> None:
    """In fp32 and as the program runs by default: a prompt, single tokens after it, a padded batch."""
    weights = {"weights": {"grid": "float_zero", "bits": bits, "group_size": 32, "solver": "rtn"}}
    out = saved_models.rounded(tiny_models.build("llama_tied"), tmp_path / "out", ROTATED, more=weights).folder
    check = export(out, graphs.name, tmp_path / "x")["check"]
    assert check["relative_logit_error"] < 1e-5
    assert check["step_error"] < 1e-5
    ids = tiny_models.tokens(tiny_models.build("llama_tied"), 1)[0]
    runtime, wanted = open_runtime(graphs.name, tmp_path / "x", exact=False), ours(out, ids[None])[0]
    runtime.start()
    pieces = torch.cat([runtime.feed(ids[None, a:b]) for a, b in ((0, 12), (12, 13), (13, 14))])
    assert (pieces - wanted[:14]).abs().max() < DEFAULT_ERROR * wanted.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(576, 48), (576, 96), (576, 192), (576, 36), (3072, 24)])
def test_every_group_size_is_exact_in_calls_of_any_length(
    bits: int, symmetric: bool, columns: int, group_size: int, graphs: GraphFormat
) -> None:
    """Kernels for a few rows are others than those for many."""
    torch.manual_seed(0)
    grid = IntegerGrid(bits=bits, group_size=group_size, symmetric=symmetric, scale="minmax")
    if not format_named(graphs.name).capabilities.type_of(Layer("a", grid, columns)):
        pytest.skip(f"{graphs.name} has no such groups")
    groups = torch.randn(16, columns).view(16, -1, group_size)
    params = grid.fit(groups)
    weight = QuantizedWeight(grid, grid.encode(groups, params).view(16, columns), params)
    for rows in (1, 4, 5):
        x = torch.randn(1, rows, columns)
        assert close(graphs.compute(lambda ops, given: ops.rounded(given, weight), x), x @ weight.dequantize().T)


@pytest.mark.parametrize("order", [96, 128])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_basis_of_the_inputs_is_exact(order: int, scaled: bool, graphs: GraphFormat) -> None:
    torch.manual_seed(0)
    basis = Basis(96, order, (torch.rand(1, order) + 0.5).half().float() if scaled else None)
    grid = IntegerGrid(bits=3, group_size=32, symmetric=False)
    groups = basis.encode(torch.randn(24, 96)).view(24, -1, 32)
    params = grid.fit(groups)
    weight = QuantizedWeight(grid, grid.encode(groups, params).view(24, order), params, basis)
    x = torch.randn(2, 3, 96)
    assert close(graphs.compute(lambda ops, given: ops.rounded(given, weight), x), x @ weight.dequantize().T)


@pytest.mark.parametrize("padding", ["exact", "pad"])
def test_a_model_rounded_in_a_basis(padding: str, graphs: GraphFormat, tmp_path: Path) -> None:
    out = saved(tiny_models.build("qwen2"), tmp_path / "out", {}, basis={"padding": padding})
    facts = export(out, graphs.name, tmp_path / "x")
    assert facts["check"]["relative_logit_error"] < 1e-5
    assert not format_named("gguf").capabilities.basis
    with pytest.raises(InputError, match=r"which is rounded in its own weights.basis"):
        export(out, "gguf", tmp_path / "y")


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
        maps.KroneckerLeft(maps.hadamard(12), 8),
        maps.random_orthogonal(96, draw),
        maps.product(maps.random_signs(96, draw), maps.walsh(96)),
        maps.Householder(torch.randn(96, generator=draw)),
        maps.Identity(96),
        maps.butterfly(64),
    ]


@pytest.mark.parametrize("m", some_maps(), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rank", [3, 4])
def test_every_map_is_exact(m: Map, rank: int, graphs: GraphFormat) -> None:
    x = torch.randn(*(2, 3, 5)[: rank - 1], m.n)
    assert close(graphs.compute(lambda ops, given: ops.mapped(m, given), x), m.in_fp32().apply(x))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padded_sequences_do_not_see_each_other(
    name: str, graphs: GraphFormat, rounded: dict[str, Path], tmp_path: Path
) -> None:
    export(rounded[name], graphs.name, tmp_path / "x", check=False)
    ids = tiny_models.tokens(tiny_models.build(name), 2, 16)
    mask = np.ones((2, 16), np.int64)
    mask[1, :3] = 0
    positions = np.stack([np.arange(16), (np.arange(16) - 3).clip(0)])
    logits = graphs.padded(tmp_path / "x", ids, mask, positions)
    assert close(logits[0], ours(rounded[name], ids[:1])[0])
    assert close(logits[1, 3:], ours(rounded[name], ids[1:, 3:])[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_rounded_keeps_its_dtype(dtype: str, graphs: GraphFormat, tmp_path: Path) -> None:
    recipe = {"weights": {"bits": 4, "group_size": 32, "solver": "rtn"}, "proof": {"seqlen": 32}}
    recipe |= {"calibration": {"nsamples": 2, "seqlen": 32}}
    text, out = [tiny_models.prose(3000)], tmp_path / "out"
    gq.quantize(
        tiny_models.build("qwen2"),
        recipe,
        text,
        out=out,
        tokenizer=tiny_models.tokenizer(),
        options=gq.OutputOptions(save_dtype=dtype),
    )
    assert export(out, graphs.name, tmp_path / "x")["check"]["relative_logit_error"] < 1e-5
    assert graphs.dtypes(tmp_path / "x", [96, 64]) == {dtype}


def test_what_it_cannot_hold_is_said_before_any_work(graphs: GraphFormat, tmp_path: Path) -> None:
    one = format_named(graphs.name)
    for grid in (Fp4Grid(), TrellisGrid(), E8pGrid()):
        layer = Layer("a", grid, 128)
        assert f"no type for the grid {grid.grid}" in one.incompatibilities(ModelRequirements("llama", (layer,)))[0]
    mamba = default_config("mamba")
    assert "does not support mamba" in one.incompatibilities(ModelRequirements("mamba", (), (), mamba))[0]
    config = tiny_models.CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "RoPE of type dynamic" in one.incompatibilities(ModelRequirements("llama", (), (), config))[0]
    recipe = {"weights": {"bits": 4, "group_size": 32, "solver": "rtn"}, "activations": {"bits": 8}}
    recipe |= {"calibration": {"nsamples": 2, "seqlen": 32}, "proof": {"seqlen": 32}}
    gq.quantize(
        tiny_models.build("llama"),
        recipe,
        [tiny_models.prose(3000)],
        out=tmp_path / "a8",
        tokenizer=tiny_models.tokenizer(),
    )
    with pytest.raises(InputError, match="does not round activations"):
        export(tmp_path / "a8", graphs.name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_opens_without_gyroquant(graphs: GraphFormat, rounded: dict[str, Path], tmp_path: Path) -> None:
    export(rounded["qwen3"], graphs.name, tmp_path / "x", check=False)
    ids = tiny_models.tokens(tiny_models.build("qwen3"), 1, 6)
    code = 'import sys; sys.modules["gyroquant"] = None' + graphs.script(tmp_path / "x", ids)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert close(torch.tensor([float(word) for word in done.stdout.split()]), ours(rounded["qwen3"], ids)[0, -1])
