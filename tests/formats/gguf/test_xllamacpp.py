"""The prebuilt packages: what does not fit is refused by name, and what llama.cpp decodes is what the file holds."""

from __future__ import annotations

import ctypes
import re
import signal
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_models import build, split, write_model, written_types
from missing_packages import LLAMA_CPP, hide

from gyroquant.errors import InputError
from gyroquant.formats.gguf import decode, llama_cpp, quantizer, xllamacpp
from gyroquant.formats.gguf.decode import write_decoded
from gyroquant.formats.gguf.header import stored_settings, stored_tensors
from gyroquant.formats.gguf.llama_cpp_runtime import LlamaModel
from gyroquant.models.stores.gguf.file import GgufFile

HERE = re.escape(f"xllamacpp {version('xllamacpp')} does not fit gyroquant")


def test_settings_reach_llama_cpp(tmp_path: Path) -> None:
    """Fields at other offsets would leave the defaults in place, or change others."""
    library = xllamacpp.load()
    library.handle.llama_n_ctx.argtypes = library.handle.llama_n_batch.argtypes = [ctypes.c_void_p]
    write_model(tmp_path / "m.gguf", build("llama"))
    model = LlamaModel(tmp_path / "m.gguf", exact=True)
    model.feed([3] * 700)
    assert library.handle.llama_n_ctx(model._contexts[0]) == 768  # a multiple of 256 that holds 700
    assert library.handle.llama_n_batch(model._contexts[0]) == 512


@pytest.mark.parametrize("table", ["_MODEL", "_CONTEXT"])
def test_another_layout_is_refused(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the installed version had one field fewer than the one that the layout was written for."""
    layout = list(getattr(xllamacpp, table))
    del layout[3 if table == "_MODEL" else 6]

    class Shifted(ctypes.Structure):
        _fields_ = [*((name, kind) for name, kind, _ in layout), ("appended", ctypes.c_ubyte * 256)]

    function = f"llama_{table[1:].lower()}_default_params"
    monkeypatch.setattr(xllamacpp, table, tuple(layout))
    monkeypatch.setitem(xllamacpp._FUNCTIONS, function, (Shifted,))
    struct = f"llama_{table[1:].lower()}_params"
    with pytest.raises(InputError, match=rf"{HERE}: its {struct} has another layout .*pip install xllamacpp==\d"):
        xllamacpp.load()


def test_another_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batch(ctypes.Structure):
        _fields_ = [("n_tokens", ctypes.c_int32), *((name, ctypes.c_void_p) for name in ("embd", "token", "pos"))]
        _fields_ += [(name, ctypes.c_void_p) for name in ("n_seq_id", "seq_id", "logits")]

    monkeypatch.setitem(
        xllamacpp._FUNCTIONS, "llama_batch_init", (Batch, *xllamacpp._FUNCTIONS["llama_batch_init"][1:])
    )
    with pytest.raises(InputError, match=rf"{HERE}: its llama_batch has another layout .*embd"):
        xllamacpp.load()


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(xllamacpp._FUNCTIONS, "llama_of_tomorrow", (None,))
    with pytest.raises(InputError, match=rf"{HERE}: it does not export .*llama_of_tomorrow"):
        xllamacpp.load()


def test_a_package_for_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("xllamacpp", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(InputError, match=rf"{HERE}: it has no shared library for this system"):
        xllamacpp.load()
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"not a library")
    with pytest.raises(InputError, match=r"cannot be loaded: .*xllamacpp\.abi3\.so"):
        xllamacpp.load()


def test_llama_cpp_python_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its names, over the library of xllamacpp."""
    theirs = xllamacpp.load()
    package = SimpleNamespace(llama_cpp=SimpleNamespace(_lib=theirs.handle), **vars(theirs))
    del package.handle
    monkeypatch.setitem(sys.modules, "llama_cpp", package)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    llama_cpp.binding.cache_clear()
    try:
        assert llama_cpp.binding() is package
        assert llama_cpp.shared_library() is theirs.handle
    finally:
        llama_cpp.binding.cache_clear()


@pytest.mark.parametrize("kind", [*written_types(), Type.Q8_0], ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_our_reader_does(kind: Type, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("llama"), kind)
    write_decoded(tmp_path / "m.gguf", tmp_path / "plain.gguf")
    ours, theirs = GgufFile(tmp_path / "m.gguf"), GgufFile(tmp_path / "plain.gguf")
    assert list(ours.tensors) == list(theirs.tensors)
    assert {entry.type for entry in theirs.tensors.values()} == {int(Type.F32)}
    for name in ours.tensors:
        expected = ours.values(name)
        assert np.abs(theirs.values(name) - expected).max() <= 1e-6 * np.abs(expected).max(), name
    assert stored_settings(tmp_path / "plain.gguf") == stored_settings(tmp_path / "m.gguf")


def test_parts_become_one_file_and_integers_stay(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("llama"), Type.Q4_K)
    parts = split(tmp_path / "m.gguf", tmp_path / "p", [0, 9])
    write_decoded(parts[0], tmp_path / "plain.gguf")
    whole, settings = stored_tensors(tmp_path / "m.gguf"), stored_settings(tmp_path / "plain.gguf")
    assert stored_tensors(tmp_path / "plain.gguf").keys() == whole.keys()
    assert not any(key.startswith("split.") for key in settings)
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.arange(5, dtype=np.int32))
    writer.add_tensor("b", np.arange(6, dtype=np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    write_decoded(tmp_path / "i.gguf", tmp_path / "o.gguf")
    a, b = gguf.GGUFReader(tmp_path / "o.gguf").tensors
    assert (a.tensor_type, a.data.tolist()) == (Type.I32, [0, 1, 2, 3, 4])
    assert (b.tensor_type, b.data.tolist()) == (Type.F32, [0, 1, 2, 3, 4, 5])
    assert b.data_offset % 64 == 0


def test_types_that_ggml_does_not_have_are_refused() -> None:
    with pytest.raises(InputError, match=r"blk.0.x is of a type that the installed llama.cpp does not have \(number 4"):
        decode._traits("blk.0.x", 4)  # removed from ggml
    with pytest.raises(InputError, match="does not have"):
        decode._traits("x", 9999)


def test_another_layout_of_the_types_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(**{name: getattr(decode._ggml(), name) for name in decode._FUNCTIONS})
    library.ggml_type_size = lambda kind: 17
    monkeypatch.setattr(decode, "_ggml", lambda: library)
    with pytest.raises(InputError, match=r"another layout .* pip install \"gyroquant\[llama-cpp\]\""):
        decode._traits("x", int(Type.Q4_0))


@pytest.mark.parametrize(
    ("kind", "width", "tensor", "replacement"),
    [
        ("Q5_K_M", 160, "attn_q", "Q5_1"),  # for Q6_0
        ("IQ4_NL", 256, "attn_v", "Q5_K"),  # for IQ5_K
        ("IQ3_M", 256, "attn_output", "Q4_K"),  # for IQ4_K
    ],
)
def test_types_of_the_fork_are_replaced(
    kind: str, width: int, tensor: str, replacement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixtures of ik_llama.cpp have types that llama.cpp does not read."""
    hide(monkeypatch, "llama_cpp")
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": 1, "head_dim": 32}
    model = build("llama", hidden_size=width, intermediate_size=512, **heads)
    write_model(tmp_path / "m.gguf", model, Type.F32)
    quantizer.rewrite(tmp_path / "m.gguf", tmp_path / "q.gguf", kind)
    assert stored_tensors(tmp_path / "q.gguf")[f"blk.0.{tensor}.weight"].kind == replacement
    assert LlamaModel(tmp_path / "q.gguf").feed([3, 4]).isfinite().all()


def test_other_types_of_the_fork_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "llama_cpp")
    write_model(tmp_path / "m.gguf", build("llama", hidden_size=256, intermediate_size=512), Type.F32)
    with pytest.raises(InputError, match=r"writes IQ2_K with tensors of IQ2_K, which llama\.cpp does not read"):
        quantizer.rewrite(tmp_path / "m.gguf", tmp_path / "q.gguf", "IQ2_K")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"kill -{signal.SIGILL.value} $$", "SIGILL ended it .it needs a processor with AVX2"),
        ("echo all well; echo 'main: failed to quantize' >&2; exit 1", "cannot write Q8_0: main: failed to quantize$"),
        ("exit 3", "cannot write Q8_0: status 3"),
    ],
)
def test_a_program_that_fails_says_why(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    hide(monkeypatch, "llama_cpp")
    monkeypatch.setattr(quantizer, "_program", lambda: program)
    with pytest.raises(InputError, match=reason):
        quantizer.rewrite(tmp_path / "a", tmp_path / "b", "Q8_0")


def test_without_any_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *LLAMA_CPP)
    llama_cpp.binding.cache_clear()
    assert not llama_cpp.installed()
    for call in (llama_cpp.binding, quantizer.file_types, quantizer.quantizer_version):
        with pytest.raises(InputError, match=r'not installed: pip install "gyroquant\[llama-cpp\]"'):
            call()


def test_types_of_the_quantizer_are_those_of_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    hide(monkeypatch, "llama_cpp")
    listed = subprocess.run([quantizer._program(), "--help"], capture_output=True, text=True, check=False)
    offered: Any = re.findall(r"^ +\d+ +or +(\S+)", listed.stdout + listed.stderr, re.MULTILINE)
    assert set(quantizer.file_types()) <= set(offered)
