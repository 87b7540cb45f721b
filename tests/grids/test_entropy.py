"""The entropy of codes: known distributions, and what a manifest, `inspect` and `evaluate` make of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import run

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.grids import IntegerGrid, code_bits, code_entropy, stored_bits
from gyroquant.inspection.model import inspect_model
from gyroquant.models.stores.source import open_model
from gyroquant.report import summaries
from gyroquant.rounding.solvers.rtn import RoundToNearest


def test_known_distributions() -> None:
    assert code_entropy(torch.zeros(3, 4, dtype=torch.uint8)) == 0
    assert code_entropy(torch.arange(16, dtype=torch.uint8).view(4, 4)) == 4
    quarters = torch.tensor([0, 0, 1, 3], dtype=torch.uint8)
    assert code_entropy(quarters) == 1.5


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_no_more_than_the_logarithm_of_the_codes_and_the_same_in_any_order(codes: list[int]) -> None:
    found = code_entropy(torch.tensor(codes, dtype=torch.uint8))
    assert 0 <= found <= math.log2(len(set(codes))) + 1e-12
    assert code_entropy(torch.tensor(sorted(codes), dtype=torch.uint8)) == pytest.approx(found)


def test_codes_never_need_more_than_they_take() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rounded = RoundToNearest().solve(weight, IntegerGrid(bits=3, group_size=32))
    arrays = rounded.pack()
    assert code_bits(rounded, arrays) == pytest.approx(code_entropy(rounded.codes) * 32 * 64)
    assert 2.4 * 32 * 64 < code_bits(rounded, arrays) < stored_bits({"codes": arrays["codes"]})
    assert code_bits(rounded, arrays | {"codes": arrays["codes"][:10]}) == 80


def test_a_manifest_states_it_and_both_commands_show_it(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = run(folders["llama"], out, "rtn", None)
    bits, store = manifest["bits"], open_model(out)
    needed = 0.0
    for layer in manifest["layers"]:
        weight = store.quantized(f"{layer['name']}.weight")
        assert layer["code_entropy"] == code_entropy(weight.codes)
        needed += layer["code_entropy"] * weight.codes.numel()
    others = sum(count for part, count in bits["stored_bits"].items() if part != "codes")
    assert bits["effective"] == pytest.approx((needed + others) / bits["rounded_weights"])
    assert store.effective_bits_per_weight() == pytest.approx(bits["effective"])
    assert bits["effective"] < bits["per_weight"]
    result = gq.evaluate(out, text=corpus, windows=1, window=16)
    assert result["effective_bits_per_weight"] == pytest.approx(bits["effective"])
    assert gq.evaluate(folders["llama"], text=corpus, windows=1, window=16)["effective_bits_per_weight"] is None
    inspection = inspect_model(out)
    assert inspection.to_dict()["effective_bits_per_weight"] == bits["effective"]
    for tables in (summaries.evaluated(result), summaries.inspected(inspection), summaries.quantized(manifest, "x")):
        assert f"{bits['effective']:.4f}" in [str(cell) for cell in tables[0].columns[1].cells]
    damaged = json.loads((out / "gyroquant.json").read_text())
    damaged["bits"]["effective"] = "many"
    (out / "gyroquant.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match=r"bits\.effective is 'many'"):
        inspect_model(out)
