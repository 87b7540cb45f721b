"""The weight-basis form of BBT: which basis is chosen, and rounding in it."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from selection import some

from gyroquant.errors import RecipeError
from gyroquant.grids import IntegerGrid
from gyroquant.grids.basis import spectrum
from gyroquant.maps import hadamard
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.sizes import expected_bytes
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import InputStatistics, WeightBasis, output_error
from gyroquant.rounding.layers import RoundingConfig
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.qronos import Qronos
from gyroquant.rounding.solvers.rtn import RoundToNearest

SMALL = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32", "calibration.dtype=float32"]


def inputs(columns: int = 96, tokens: int = 500) -> torch.Tensor:
    """Inputs with energy in a few coefficients of their transform."""
    generator = torch.Generator().manual_seed(2)
    return (
        hadamard(columns)
        .inverse()
        .apply(torch.randn(tokens, columns, generator=generator) * torch.logspace(1, -1, columns))
    )


@pytest.mark.parametrize("padding", ["exact", "pad"])
def test_scales_are_those_of_the_paper(padding: str) -> None:
    x = inputs()
    section = WeightBasis(padding=padding)  # type: ignore[arg-type]
    basis = section.fit(96, x.T @ x)
    assert basis.order == {"exact": 96, "pad": 128}[padding]
    assert basis.scale is not None
    h = hadamard(basis.order).apply(torch.nn.functional.pad(x, (0, basis.order - 96)).double())
    energy = h.square().mean(0)
    expected = (1 + basis.order * energy / energy.sum()).sqrt()
    assert torch.allclose(basis.scale[0].double(), expected, rtol=1e-3)


def test_the_authors_code_leaves_the_tail_unscaled() -> None:
    x = inputs()
    basis = WeightBasis(padding="pad", energy="kept").fit(96, x.T @ x)
    assert basis.scale is not None
    energy = spectrum(x.T @ x, 128).diagonal()[:96]
    assert torch.allclose(basis.scale[0, :96], (1 + 96 * energy / energy.sum()).sqrt(), rtol=1e-3)
    assert torch.equal(basis.scale[0, 96:], torch.ones(32))


def test_alpha_zero_is_the_plain_transform_and_needs_no_text() -> None:
    section = WeightBasis(alpha=0)
    assert not section.needs_statistics
    assert WeightBasis().needs_statistics
    assert section.fit(96, None).scale is None


def test_gptq_in_a_basis_is_gptq_on_the_moved_layer() -> None:
    x, weight = inputs(), torch.randn(24, 96)
    basis = WeightBasis().fit(96, x.T @ x)
    assert basis.scale is not None
    grid, how = IntegerGrid(bits=2, group_size=32), RoundingConfig([Gptq()], IntegerGrid(), WeightBasis(), print)
    shift = torch.randn(500, 96, generator=torch.Generator().manual_seed(9))
    statistics = InputStatistics(x.T @ x, len(x), shift.T @ x)
    prepared = how.prepare("layer", weight, statistics)
    found = how.solve(prepared, grid)
    moved = hadamard(96).apply(x) / basis.scale
    alone = Gptq().solve(basis.encode(weight), grid, InputStatistics(moved.T @ moved, len(x)))
    assert (found.codes == alone.codes).float().mean() > 0.98  # the sums are taken in another order
    assert prepared.statistics is not None
    assert prepared.statistics.input_error_cross is not None
    input_error_cross = (
        hadamard(96).apply(shift) / basis.scale
    ).T @ moved  # rows are features of what drifts: not symmetric
    assert torch.allclose(prepared.statistics.input_error_cross.float(), input_error_cross, rtol=1e-3, atol=1e-2)
    nearest = RoundingConfig([RoundToNearest()], grid, WeightBasis(), print).solve(prepared, grid)
    errors = [output_error(weight, one.dequantize(), statistics) for one in (found, nearest)]
    assert errors[0] < errors[1]


def typical_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over tokens, which a router that sends one of them elsewhere does not move."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("name", some(["llama_tied", "qwen2_moe", "gpt2"], ["qwen2_moe", "gpt2"]))
@pytest.mark.parametrize(
    "changes",
    [(), ("weights.basis.padding=pad",), ("weights.basis.alpha=0", "weights.solver=rtn"), ("weights.solver=rtn",)],
    ids=["exact", "pad", "no text", "rtn"],
)
def test_what_is_loaded_is_what_was_rounded(
    name: str, changes: tuple[str, ...], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = None if "weights.basis.alpha=0" in changes else corpus
    recipe = load_recipe("bbt-spectral", ["weights.bits=8", *SMALL, *changes])
    manifest = pipeline.run(prepare(folders[name], out, recipe, text, tokenizer=tiny_models.tokenizer()))
    ids, original = tiny_models.tokens(tiny_models.build(name)), tiny_models.build(name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        before, after = original(ids).logits, loaded(ids).logits
    assert typical_error(after, before) < 0.05
    stored = json.loads((out / "config.json").read_text())["quantization_config"]["tensors"]
    assert all("basis" in entry for entry in stored.values())
    assert manifest["bits"]["per_weight"] == pytest.approx(open_model(out).bits_per_weight())
    assert ("basis" in manifest["bits"]["stored_bits"]) == (text is not None)
    dense = tmp_path / "dense"
    pipeline.run(
        prepare(folders[name], dense, recipe, text, tokenizer=tiny_models.tokenizer(), dense=True, save_dtype="float32")
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        assert typical_error(plain(ids).logits, after) < 0.01  # norms are float32 here and float16 there


def test_padding_is_counted(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    bits, expected = {}, {}
    for padding in ("exact", "pad"):
        recipe = load_recipe("bbt-spectral", [*SMALL, f"weights.basis.padding={padding}"])
        job = prepare(folders["llama"], tmp_path / padding, recipe, corpus, tokenizer=tiny_models.tokenizer())
        expected[padding] = expected_bytes(job)
        bits[padding] = pipeline.run(job)["bits"]["stored_bits"]["codes"]
        stored = json.loads((tmp_path / padding / "config.json").read_text())["quantization_config"]
        assert stored["format_version"] == 2
    down = 2 * 2 * 64 * (128 - 96)  # two blocks, two bits, 64 rows, 96 columns become 128
    assert bits["pad"] - bits["exact"] == down
    assert expected["pad"] > expected["exact"]


@pytest.mark.parametrize("padding", ["exact", "pad"])
def test_qronos_works_where_second_moments_are_singular(padding: str) -> None:
    x, weight, warnings = inputs(), torch.randn(24, 96, generator=torch.Generator().manual_seed(1)), list[str]()
    shift = 0.05 * torch.randn(500, 96, generator=torch.Generator().manual_seed(9))
    statistics = InputStatistics(x.T @ x, len(x), shift.T @ x)
    section = WeightBasis(padding=padding)  # type: ignore[arg-type]
    errors = {}
    for solver in (Qronos(), RoundToNearest()):
        how = RoundingConfig([solver], IntegerGrid(bits=4, group_size=32), section, warnings.append)
        found = how.solve(how.prepare("layer", weight, statistics), how.grid)
        errors[solver.name] = output_error(weight, found.dequantize(), statistics)
    assert not warnings
    assert errors["qronos"] < 2 * errors["rtn"] + 0.01


def test_an_expert_without_tokens_is_warned_of() -> None:
    warnings: list[str] = []
    how = RoundingConfig([RoundToNearest()], IntegerGrid(bits=4, group_size=32), WeightBasis(), warnings.append)
    assert how.prepare("expert", torch.randn(8, 96), None).basis.scale.eq(1).all()  # type: ignore[union-attr]
    assert len(warnings) == 1
    assert "expert: no calibration token" in warnings[0]


def test_orders_without_a_matrix_name_the_remedy(tmp_path: Path, corpus: Path) -> None:
    model = tiny_models.build("llama", intermediate_size=92)
    changes = ["weights.group_size=-1", *SMALL[1:]]
    with pytest.raises(RecipeError, match=r"down_proj.*weights.basis.padding=pad"):
        prepare(
            model, tmp_path / "out", load_recipe("bbt-spectral", changes), corpus, tokenizer=tiny_models.tokenizer()
        )
    padded = load_recipe("bbt-spectral", [*changes, "weights.basis.padding=pad"])
    prepare(model, tmp_path / "out", padded, corpus, tokenizer=tiny_models.tokenizer())


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'padding'"):
        load_recipe("gptq", ["weights.basis.pading=pad"])
    with pytest.raises(RecipeError, match=r"weights\.basis holds settings such as padding"):
        load_recipe("gptq", ["weights.basis=false"])
    with pytest.raises(RecipeError, match="round_weights"):
        load_recipe("spinquant", ["weights.basis.alpha=0", "learn.round_weights=true"])
