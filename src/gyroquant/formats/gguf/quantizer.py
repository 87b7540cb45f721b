"""The quantizer of llama.cpp: in llama-cpp-python, or the program llama-quantize of ik_llama.cpp, a fork of llama.cpp.

The fork is the one with a prebuilt program, in the package ik-llama-cpp-python. Only the types of llama.cpp are used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import signal
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from gyroquant.errors import InputError
from gyroquant.formats.gguf.header import stored_tensors
from gyroquant.formats.gguf.llama_cpp import binding, complained
from gyroquant.models.stores.gguf.ik_types import IK_TYPES
from gyroquant.system.subprocesses import bound

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
_FORK = "ik_llama_cpp"
_FORK_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q2_K", "Q2_K_S", "IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"),
    *("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
_OF_THE_FORK = {"type 133": "q5_1", "IQ4_K": "q4_K", "type 140": "q5_K"}  # Q6_0, IQ4_K and IQ5_K in its mixtures
_REASON = re.compile("fail|error|invalid|Please", re.IGNORECASE)  # in the lines that say why the program ends


def file_types() -> list[str]:
    """The types that the quantizer writes. Raises InputError if none is installed."""
    if _has_binding():
        names = [name.removeprefix(_PREFIX) for name in vars(binding()) if name.startswith(_PREFIX)]
        return ["F32", *names]
    _program()
    return list(_FORK_TYPES)


def quantizer_version() -> str:
    """The quantizer's package and version. Raises InputError if none is installed."""
    if _has_binding():
        return f"llama-cpp-python {version('llama-cpp-python')}"
    _program()
    return f"ik-llama-cpp-python {version('ik-llama-cpp-python')} (ik_llama.cpp)"


def rewrite(source: Path, target: Path, kind: str) -> None:
    """Rewrites a GGUF file with tensors of another type.

    Raises InputError with the quantizer's messages if it fails, and if no quantizer is installed.
    """
    if not _has_binding():
        _run(source, target, kind)
        return
    library = binding()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = 0 if kind == "F32" else getattr(library, f"{_PREFIX}{kind}")
    settings.nthread, settings.allow_requantize = torch.get_num_threads(), True
    complained()
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise InputError(f"llama.cpp cannot write {kind}: {complained()}")


def _has_binding() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _program() -> Path:
    """The program of the fork. Raises InputError if it is not installed."""
    spec = importlib.util.find_spec(_FORK)
    for folder in (spec and spec.submodule_search_locations) or ():
        program = Path(folder) / "bin" / "llama-quantize"
        if program.is_file():
            return program
    raise InputError('the quantizer of llama.cpp is not installed: pip install "gyroquant[llama-cpp]"')


def _run(source: Path, target: Path, kind: str) -> None:
    """Runs the fork's program. If its mixture has types of its own, it runs again with llama.cpp's in their place."""
    _run_program(source, target, kind, [])
    kinds = {name: tensor.kind for name, tensor in stored_tensors(target).items()}
    own = {name: stored for name, stored in kinds.items() if stored in IK_TYPES or stored.startswith("type ")}
    if not own:
        return
    other = next((stored for stored in own.values() if stored not in _OF_THE_FORK), None)
    if other is not None:
        raise InputError(f"llama-quantize writes {kind} with tensors of {other}, which llama.cpp does not read")
    rules = ",".join(f"^{re.escape(name)}$={_OF_THE_FORK[stored]}" for name, stored in own.items())
    _run_program(source, target, kind, ["--custom-q", rules])


def _run_program(source: Path, target: Path, kind: str, more: list[str]) -> None:
    arguments = ["--allow-requantize", *more, str(source), str(target), kind, str(torch.get_num_threads())]
    command = bound([str(_program()), *arguments])
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise InputError(f"llama-quantize cannot write {kind}: {name} ended it (it needs a processor with AVX2)")
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if _REASON.search(line)]
        raise InputError(f"llama.cpp cannot write {kind}: {' '.join(lines) or f'status {done.returncode}'}")
