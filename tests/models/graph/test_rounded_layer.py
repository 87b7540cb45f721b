"""A rounded layer is decoded once, whatever is made of it."""

from collections import Counter
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_runs import run

from gyroquant.grids import IntegerGrid, QuantizedWeight
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.models.stores.base import ModuleStore
from gyroquant.rounding.solvers.rtn import RoundToNearest

TUNE = "weights.tune={iters: 3, batch_size: 4}"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The codes of every call of `dequantize`, kept so that no two of them lie in the same place."""
    codes: list[torch.Tensor] = []
    original = QuantizedWeight.dequantize

    def dequantize(weight: QuantizedWeight) -> torch.Tensor:
        codes.append(weight.codes)
        return original(weight)

    monkeypatch.setattr(QuantizedWeight, "dequantize", dequantize)
    return codes


@pytest.mark.parametrize(
    ("name", "recipe", "changes", "dense"),
    [
        ("llama", "rtn", [], False),
        ("llama", "gptq", ["weights.ignore=[]"], True),
        ("llama", "qronos", [], False),
        ("gpt2", "qronos", ["weights.correct_bias=true"], True),
        ("gpt2", "gptq", ["calibration.inputs=original", "weights.correct_bias=true"], False),
        ("mixtral", "gptq", [], True),
        ("llama", "bbt-spectral", [], True),
    ],
)
def test_a_run_decodes_every_layer_once(
    name: str,
    recipe: str,
    changes: list[str],
    dense: bool,
    decoded: list[torch.Tensor],
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
) -> None:
    manifest = run(folders[name], tmp_path / "out", recipe, corpus, *changes, dense=dense)
    assert len(decoded) == len(manifest["layers"])  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [[TUNE], ["weights.refine={passes: 1}"], [TUNE, "weights.true_sequential=true"]])
def test_no_codes_are_decoded_twice(
    changes: list[str], decoded: list[torch.Tensor], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Refinement and tuning make other codes, and may read those that they start from."""
    run(folders["llama"], tmp_path / "out", "gptq", corpus, "weights.bits=2", *changes, dense=True)
    assert max(Counter(codes.data_ptr() for codes in decoded).values()) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_is_kept_in_the_stored_shape_until_it_is_released(name: str, decoded: list[torch.Tensor]) -> None:
    store = ModuleStore(tiny_models.build(name))
    for op in store.graph.block_linears:
        if not op.entry.quantize:
            continue
        stored = store.read([op.weight])[op.weight].float()
        layer = RoundedLayer(op, RoundToNearest().solve(op.to_matrix(stored), IntegerGrid(bits=8, group_size=16)))
        decoded.clear()
        assert layer.param.shape == stored.shape
        assert float((layer.param - stored).abs().max()) < 0.02 * float(stored.abs().max())
        assert layer.matrix.shape == op.matrix_shape
        assert torch.equal(op.to_param(layer.matrix), layer.param)
        assert len(decoded) == 1
        layer.release()
        assert torch.equal(layer.param, op.to_param(layer.matrix))
        assert len(decoded) == 2
