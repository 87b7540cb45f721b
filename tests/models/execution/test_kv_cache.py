"""The packed KV cache: the same tokens as without it, in the memory that its bits say."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from selection import some_pairs
from tiny_runs import run

import gyroquant as gq
from gyroquant.grids import IntegerGrid
from gyroquant.models.execution.packed_rows import PackedRows


@pytest.mark.parametrize(
    ("name", "bits"),
    some_pairs(
        ["llama", "qwen3", "gemma2", "gpt_neox", "cohere2"],
        [2, 3, 4, 8],
        [("llama", 2), ("llama", 8), ("qwen3", 3), ("gemma2", 4), ("gpt_neox", 2), ("cohere2", 3)],
    ),
)
def test_generation_gives_the_same_tokens(
    name: str, bits: int, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    recipe = ["transform.R1=null"] if name == "gemma2" else []
    changes = ["weights.bits=8", f"kv_cache.bits={bits}", "kv_cache.center_keys=true", *recipe]
    run(folders[name], tmp_path / "out", "quarot", corpus, *changes)
    model = gq.load(tmp_path / "out", dtype=torch.float32)
    prompt = tiny_models.tokens(model)[:, :12]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = gq.PackedKVCache(model)
    packed = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(packed, model.generate(prompt, **options))
    assert cache.get_seq_length() == 23


def test_its_bytes_are_those_of_its_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    run(folders["llama"], tmp_path / "out", "rtn", None, "weights.bits=8", "kv_cache.bits=3")
    model = gq.load(tmp_path / "out", dtype=torch.float32)
    cache = gq.PackedKVCache(model)
    assert cache.nbytes == 0
    with torch.no_grad():
        model(torch.ones(2, 10, dtype=torch.long), past_key_values=cache)
    vectors = 2 * 2 * 2 * 2 * 10  # keys and values, blocks, sequences, heads, tokens
    assert cache.nbytes == vectors * (16 * 3 // 8 + 2 + 1)  # codes, fp16 scale, zero point


def test_beams_and_batches_move_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    run(folders["llama"], tmp_path / "out", "rtn", None, "weights.bits=8", "kv_cache.bits=4")
    model = gq.load(tmp_path / "out", dtype=torch.float32)
    options = {"max_new_tokens": 8, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    prompt = tiny_models.tokens(model)[:, :6]
    packed = model.generate(prompt, past_key_values=gq.PackedKVCache(model), **options)
    assert torch.equal(packed, model.generate(prompt, **options))
    cache = gq.PackedKVCache(model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        before = cache.nbytes
        cache.crop(-2)
    assert cache.get_seq_length() == 4
    assert cache.nbytes == before * 4 // 6
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rows_come_back_as_the_grid_rounds_them(bits: int, symmetric: bool) -> None:
    grid = IntegerGrid(bits=bits, group_size=16, symmetric=symmetric, scale="minmax")
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    rows = PackedRows(grid, 32)
    rows.append(x[:, :, :4])
    rows.append(x[:, :, 4:])
    assert torch.equal(rows.decode(torch.float32), grid.fake(x))


def test_a_model_that_does_not_round_its_cache_is_refused() -> None:
    with pytest.raises(gq.UnsupportedModelError, match="kv_cache"):
        gq.PackedKVCache(tiny_models.build("llama"))
