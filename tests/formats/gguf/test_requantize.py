"""What is refused of rounding again, with llama.cpp or without; what stands in the header of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import saved_models
import tiny_models
from gguf_reading import read_back, written
from missing_packages import LLAMA_CPP, hide

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats.base import check_fit, format_named, requirements_of
from gyroquant.formats.gguf import llama_cpp
from gyroquant.formats.gguf.header import stored_tensors
from gyroquant.formats.gguf.runtime import GgufRuntime
from gyroquant.formats.runtime import Runtime, open_runtime
from gyroquant.models.stores.packed import PackedStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    return saved_models.rounded(tiny_models.build("llama"), tmp_path_factory.mktemp("saved") / "ours")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not have llama.cpp."""
    hide(monkeypatch, *LLAMA_CPP)
    llama_cpp.binding.cache_clear()


@pytest.mark.parametrize("name", ["dense", "openvino", "gptq"])
def test_other_formats_are_not_requantized(name: str, store: PackedStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--requantize is for the format gguf; {name} holds our codes"):
        gq.export(store.folder, name, tmp_path / "x", requantize="Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_the_remedy_is_named(store: PackedStore, tmp_path: Path, without: None) -> None:
    with pytest.raises(
        InputError, match=r'quantizer of llama.cpp is not installed: pip install "gyroquant\[llama-cpp\]"'
    ):
        gq.export(store.folder, "gguf", tmp_path / "x", requantize="Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_our_own_reader_reads_the_file(store: PackedStore, tmp_path: Path, without: None) -> None:
    assert gq.export(store.folder, "gguf", tmp_path / "x")["check"]["runtime"] == GgufRuntime.title
    assert isinstance(open_runtime("gguf", tmp_path / "x", exact=True), GgufRuntime)
    with pytest.raises(InputError, match="is not installed"):
        Runtime.registry["gguf"](tmp_path / "x", True)


def test_a_refusal_for_the_bits_names_the_way_out(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    needs = requirements_of(saved_models.rounded(model, tmp_path / "ours", group_size=16))
    with pytest.raises(InputError, match=r"groups of 16 .*--requantize TYPE has llama.cpp round it again"):
        check_fit(format_named("gguf"), needs)


def test_the_header_of_a_file(store: PackedStore, tmp_path: Path) -> None:
    written(store, tmp_path / "gguf")
    path = tmp_path / "gguf" / "model.gguf"
    found, (_, tensors) = stored_tensors(path), read_back(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].numbers == values.size for name, (_, values) in tensors.items())
    assert found["blk.0.attn_q.weight"] == ("Q4_0", 64 * 64, 64 * 64 // 32 * 18)
    assert found["output_norm.weight"] == ("F32", 64, 256)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="not a GGUF file of version 3"):
        stored_tensors(path)
