import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from external_tool_tasks import LARGEST, error, task

from gyroquant.benchmark.external_tools import ExternalToolError, Size, ToolResult
from gyroquant.benchmark.external_tools.ik_llama_cpp import IkLlamaCpp
from gyroquant.benchmark.external_tools.llama_cpp import LlamaCpp, opened, stored_bits, tensor_parts, wide_tensors
from gyroquant.errors import InputError
from gyroquant.formats.gguf.writer import tensor_names
from gyroquant.models.stores.source import open_model


def test_types_have_their_own_bits_and_groups() -> None:
    for variant, settings in LlamaCpp.variants.items():
        for bits in (2, 3, 4):
            assert (LlamaCpp().problem(variant, Size(bits, 64)) == "") is (bits == settings["bits"])
    assert not LlamaCpp().problem("Q4_0", Size(4, -1))


def test_rows_that_the_blocks_of_a_type_do_not_divide_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = task(folders["llama"], tmp_path / "out", Size(2, 64))
    with pytest.raises(ExternalToolError, match=r"100% of the weights .* blocks of 256 do not divide rows of 64"):
        LlamaCpp().run("Q2_K", asked, tmp_path / "python")


def test_models_that_it_does_not_run_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExternalToolError, match="does not support opt"):
        LlamaCpp().run("Q4_0", task(folders["opt"], tmp_path / "out", Size(4, 64)), tmp_path / "python")


def test_bits_are_what_a_file_stores_for_the_blocks(folders: dict[str, Path], tmp_path: Path) -> None:
    store = opened(folders["llama"])
    names = tensor_names(store)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, shape in store.shapes.items():
        data = np.zeros(shape, np.float32)
        if name.endswith("v_proj.weight"):  # 32 rows of 64 in each of two blocks
            writer.add_tensor(
                names[name],
                gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        elif "layers" in name and len(shape) == 2:
            writer.add_tensor(
                names[name],
                gguf.quantize(data, gguf.GGMLQuantizationType.Q4_0),
                raw_dtype=gguf.GGMLQuantizationType.Q4_0,
            )
        else:
            writer.add_tensor(names[name], data)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    wide, every = 2 * 32 * 64, 61440
    assert stored_bits(store, path) == pytest.approx((8.5 * wide + 4.5 * (every - wide)) / every)
    assert wide_tensors(path) == 2 * (2 * 96 * 64 + 5 * 64)  # embedding, head and five norms in fp32
    parts = tensor_parts(store, path)
    assert parts["embeddings"] == parts["head"] == 2 * 96 * 64
    assert parts["rest"] == 2 * 5 * 64
    assert parts["layers"] == pytest.approx(stored_bits(store, path) * every / 8)


def test_a_file_without_a_layer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(InputError, match=r"lacks blk\.0\.attn_q"):
        stored_bits(opened(folders["llama"]), path)


def runnable(tool: str) -> LlamaCpp:
    """A tool that can run in this environment. Skips the test without llama-cpp-python, which has no wheels."""
    if tool == "llama.cpp" and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    return {"llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp}[tool]()


def deployed(found: ToolResult, model: Path, limit: float) -> None:
    """What runs is what the file holds, and every matrix is rounded, embedding and head too."""
    assert 0 < error(found, model) < LARGEST
    original, dense = open_model(model), open_model(found.dense)
    for name in original.shapes:
        (before,), (after,) = original.read([name]).values(), dense.read([name]).values()
        assert torch.equal(before, after) is (before.dim() == 1), name
        assert float((after - before).norm() / before.norm()) < limit, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "variant", "bits"),
    [
        ("llama.cpp", "Q4_0", 4.5),
        ("llama.cpp", "IQ4_NL imatrix", 4.5),
        ("ik_llama.cpp", "Q4_0", 4.5),
        ("ik_llama.cpp", "Q4_0 imatrix", 4.5),
    ],
)
def test_it_deploys_the_numbers_that_its_file_holds(
    tool: str, variant: str, bits: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = runnable(tool).run(variant, task(folders["llama"], tmp_path / "out", Size(4, 64)), Path(sys.executable))
    assert found.true_bits == pytest.approx(bits, abs=1e-3)
    assert found.weight_bytes["embeddings"] <= 96 * 64 * 8.5 / 8
    deployed(found, folders["llama"], 0.15)
    dense, file = open_model(found.dense), open_model(tmp_path / "out" / "files" / "model.gguf")
    for name in dense.shapes:
        values = [store.read([name])[name] for store in (dense, file)]
        assert torch.allclose(*values, rtol=1e-6, atol=1e-9), name
    assert not (tmp_path / "out" / "plain.gguf").exists()


@pytest.mark.slow
def test_types_that_only_the_fork_has(tmp_path: Path) -> None:
    """Its trellis of 2.125 bits: llama.cpp does not read the file, so the fork decodes it."""
    changes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_key_value_heads": 4}
    tiny_models.build("llama", **changes).save_pretrained(tmp_path / "model")
    asked = task(tmp_path / "model", tmp_path / "out", Size(2, 64))
    found = IkLlamaCpp().run("IQ2_KT imatrix", asked, Path(sys.executable))
    assert 2.1 < found.true_bits < 3
    assert set(found.versions) >= {"ik-llama-cpp-python", "gguf", "torch"}
    original, dense = open_model(tmp_path / "model"), open_model(found.dense)
    name = "model.layers.0.mlp.gate_proj.weight"
    (before,), (after,) = original.read([name]).values(), dense.read([name]).values()
    assert 0.1 < float((after - before).norm() / before.norm()) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["llama.cpp", "ik_llama.cpp"])
def test_an_importance_matrix_changes_what_is_rounded(tool: str, folders: dict[str, Path], tmp_path: Path) -> None:
    files = []
    for variant in ("Q4_0", "Q4_0 imatrix"):
        out = tmp_path / variant
        runnable(tool).run(variant, task(folders["llama"], out, Size(4, 64)), Path(sys.executable))
        files.append((out / "files" / "model.gguf").read_bytes())
    assert len(files[0]) == pytest.approx(len(files[1]), rel=0.05)
    assert files[0] != files[1]
