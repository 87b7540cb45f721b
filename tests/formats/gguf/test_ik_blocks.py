"""Types of ik_llama.cpp: the bytes that we write and read, against its published layouts and against the program."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ik_reading
import numpy as np
import pytest
import saved_models
import tiny_models
import torch
from selection import some

import gyroquant as gq
from gyroquant.errors import InputError, RecipeError
from gyroquant.formats.gguf.header import stored_tensors
from gyroquant.formats.gguf.ik_blocks import encode_ik, ik_deviation
from gyroquant.formats.gguf.llama_cpp_runtime import LlamaCppRuntime, LlamaModel
from gyroquant.formats.runtime import open_runtime
from gyroquant.grids import IqkGrid, KtGrid
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.ik_types import IK_TYPES, decode_ik
from gyroquant.models.stores.source import open_model
from gyroquant.testing.grids import rounded

GRIDS = [*IqkGrid.examples(), *KtGrid.examples()]
# The sum of the numbers of one block, and that of number j times j. Byte i is (17 i + 5) mod 251, the number of the
# block or row is 1. dequantize_row_* of ik-llama-cpp-python 0.1.5 gave them.
SUMS = {
    "IQ2_K": (-1790, -233392),
    "IQ3_K": (-13896, -2150619),
    "IQ4_K": (-2852, -1504904),
    "IQ4_KS": (6045, -2880222),
    "IQ2_KS": (1848, 368492),
    "IQ2_KT": (5963, 771756),
    "IQ3_KT": (3203, -142436),
    "IQ4_KT": (784, -1617783),
    "IQ3_KS": (-3946, 503031),
}
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}


def head(kind: str, number: float = 1.0) -> bytes:
    """The number of a row or a block, as it is stored."""
    return np.array([number], "<f4" if IK_TYPES[kind].row == 4 else "<f2").tobytes()


def random_rows(kind: str, rows: int = 20) -> np.ndarray:
    """Random bytes of rows of two blocks, whose numbers are finite."""
    draw, (_, _, size, row, _) = np.random.default_rng(0), IK_TYPES[kind]
    raw = draw.integers(0, 256, (rows, row + 2 * size), dtype=np.uint8)
    for line in raw:
        for start in (0,) if row else (0, size):
            own = np.frombuffer(head(kind, draw.standard_normal()), np.uint8)
            line[start : start + len(own)] = own
    return raw


@pytest.mark.parametrize("kind", IK_TYPES)
def test_a_block_stands_for_the_numbers_of_the_program(kind: str) -> None:
    size = IK_TYPES[kind].row + IK_TYPES[kind].size
    raw = ((17 * np.arange(size) + 5) % 251).astype(np.uint8)
    raw[: len(head(kind))] = np.frombuffer(head(kind), np.uint8)
    numbers = decode_ik(raw[None], kind)[0].astype(int)
    assert (numbers.sum(), (numbers * np.arange(256)).sum()) == SUMS[kind]
    block = raw[len(head(kind)) :].tobytes()
    assert numbers.tolist() == [ik_reading.one_number(kind, block, j) for j in range(256)]


@pytest.mark.parametrize("kind", some(IK_TYPES, ("IQ2_K", "IQ4_KS")))  # the first use of a KT type takes seconds
def test_random_bytes_are_decoded_as_by_the_program(kind: str) -> None:
    pytest.importorskip("ik_llama_cpp")
    raw = random_rows(kind)
    assert np.array_equal(decode_ik(raw, kind), ik_reading.decoded_by_the_program(kind, raw, 512))


def hard_weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 512, generator=generator) * 10 ** torch.randn(9, 1, generator=generator)
    weight[3, 256:], weight[4, 32:64], weight[7] = 0.0, 0.0, 0.0
    weight[6] *= 1e-6
    weight[8, :256] *= 30
    return weight


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_the_bytes_stand_for_our_numbers(grid: IqkGrid | KtGrid) -> None:
    weight, kind = rounded(grid, hard_weights()), IK_TYPES[grid.type_name]
    raw, exact = encode_ik(weight), weight.dequantize().numpy()
    assert raw.nbytes == weight.bits // 8
    read = decode_ik(raw, grid.type_name, kind.factor)
    if kind.factor == 1:
        assert np.array_equal(read, exact)
        assert ik_deviation(weight) == 0
    else:
        np.testing.assert_allclose(read, exact, rtol=2.0**-22)
        assert ik_deviation(weight) < 2.0**-22


_saved: dict[str, Path] = {}


def saved(grid: IqkGrid | KtGrid, factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose weights are rounded to a grid; made once."""
    if grid.type_name not in _saved:
        folder = factory.mktemp("ik") / "ours"
        recipe = {"weights": grid.model_dump(exclude={"group_size"}), "proof": {"seqlen": 32}}
        gq.quantize(tiny_models.build("llama", **SMALL), recipe, out=folder, tokenizer=tiny_models.tokenizer())
        _saved[grid.type_name] = folder
    return _saved[grid.type_name]


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[5], GRIDS[6]], ids=lambda grid: grid.type_name)
def test_a_file_is_for_ik_llama_cpp_and_our_reader_checks_it(
    grid: IqkGrid | KtGrid, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours, name = saved(grid, tmp_path_factory), grid.type_name
    manifest = gq.export(ours, "gguf", tmp_path / "gguf")
    path = tmp_path / "gguf" / "model.gguf"
    assert Counter(tensor.kind for tensor in stored_tensors(path).values())[name] == 7
    assert IK_TYPES[name].id == ik_reading.IDS[name]
    assert GgufFile(path).metadata["general.file_type"] == IK_TYPES[name].file_type
    assert {entry.type for entry in GgufFile(path).tensors.values()} == {0, 1, ik_reading.IDS[name]}
    (note,) = [note for note in manifest["facts"]["notes"] if name in note]
    assert note.startswith(f"llama.cpp does not read {name}: run the file with ik_llama.cpp.")
    assert manifest["check"]["runtime"] == "gyroquant's reader of GGUF"
    assert manifest["check"]["prompt_error"] < 2e-6
    assert open_runtime("gguf", tmp_path / "gguf", exact=True).title == "gyroquant's reader of GGUF"
    for refused in (lambda: LlamaModel(path), lambda: LlamaCppRuntime(tmp_path / "gguf", exact=False)):
        with pytest.raises(InputError, match=f"llama.cpp does not read {name}: run the file with ik_llama.cpp"):
            refused()


def test_an_embedding_that_is_looked_up_otherwise_becomes_plain_numbers(tmp_path: Path) -> None:
    """Kernels multiply the numbers of IQ2_KT by 1.05, but not those of rows that are looked up."""
    recipe = {"weights": {"grid": "iqk"}, "embeddings": {"grid": "iq_kt"}, "proof": {"seqlen": 32}}
    model = tiny_models.build("llama", **SMALL)
    gq.quantize(model, recipe, out=tmp_path / "ours", tokenizer=tiny_models.tokenizer())
    manifest = gq.export(tmp_path / "ours", "gguf", tmp_path / "gguf", check=False)
    kinds = {name: tensor.kind for name, tensor in stored_tensors(tmp_path / "gguf" / "model.gguf").items()}
    assert kinds["token_embd.weight"] == "F16"
    assert "looks up other numbers" in manifest["facts"]["decoded"]["model.embed_tokens.weight"]


def test_rows_that_256_does_not_divide_get_iq4_nl(tmp_path: Path) -> None:
    model = tiny_models.build("llama", **SMALL | {"intermediate_size": 96})
    recipe = {"weights": {"grid": "iqk", "bits": 2}, "proof": {"seqlen": 32}}
    gq.quantize(model, recipe, out=tmp_path / "ours", tokenizer=tiny_models.tokenizer())
    store = open_model(tmp_path / "ours")
    saved_models.written("gguf", store, tmp_path / "gguf")
    kinds = {name: tensor.kind for name, tensor in stored_tensors(tmp_path / "gguf" / "model.gguf").items()}
    assert kinds["blk.0.ffn_down.weight"] == "IQ4_NL"
    assert kinds["blk.0.ffn_up.weight"] == "IQ2_K"
    with pytest.raises(
        RecipeError, match="a super-block of 256 does not divide the 100 inputs of w; take another grid"
    ):
        IqkGrid(bits=2).for_columns(100).check_shape(4, 100, "w")


@pytest.mark.parametrize("kind", ["IQ2_K", "IQ2_KT"])
def test_the_program_runs_our_numbers(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its kernels round inputs to 8 bits. Without the factor of IQ2_KT, the difference is 11 %."""
    pytest.importorskip("ik_llama_cpp")
    (grid,) = [grid for grid in GRIDS if grid.type_name == kind]
    gq.export(saved(grid, tmp_path_factory), "gguf", tmp_path / "gguf", check=False)
    ids = [5, 17, 40, 8, 33, 21, 60, 2]
    theirs = ik_reading.logits_of_the_program(tmp_path / "gguf" / "model.gguf", ids)
    exact = saved_models.our_logits(saved(grid, tmp_path_factory), ids).detach().numpy().reshape(theirs.shape)
    assert np.linalg.norm(theirs - exact) < 0.04 * np.linalg.norm(exact)
