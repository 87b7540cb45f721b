"""llama.cpp's own quantizer: its types of 2 to 4 bits, with and without an importance matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from gyroquant.errors import InputError
from gyroquant.export.formats import Needs
from gyroquant.export.gguf import Gguf, tensor_names, write_file
from gyroquant.export.gguf_header import stored_tensors
from gyroquant.models.packed import PackedStore
from gyroquant.models.store import CheckpointStore
from gyroquant.opponents.base import Opponent, OpponentError, Outcome, Size, Task, run_side
from gyroquant.opponents.stored import WIDE

_SUPERBLOCK = 256
_LIMIT = 0.5  # the share of weights that may be rounded to another type than the one asked for


def _type(kind: str, bits: int, block: int, imatrix: bool = False) -> dict[str, Any]:
    return {"type": kind, "bits": bits, "block": block, "imatrix": imatrix}


class LlamaCpp(Opponent):
    """llama.cpp through its Python binding. Groups are those of its types (blocks of 32, 64 or 256 with scales in two
    levels), whatever group size is asked for; embedding and head stay fp32.

    Its file is what it deploys; `dense` is that file decoded to fp32 by llama.cpp itself. "imatrix" variants are given
    the mean square of every input column over the calibration text, which is what its tool `llama-imatrix` measures.
    """

    name = "llama.cpp"
    home = "ggml-org/llama.cpp"
    requirements = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "transformers==5.23.0", "accelerate==1.15.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Q2_0": _type("Q2_0", 2, 64),
        "Q2_K": _type("Q2_K", 2, _SUPERBLOCK),
        "Q2_K imatrix": _type("Q2_K", 2, _SUPERBLOCK, imatrix=True),
        "IQ2_XS imatrix": _type("IQ2_XS", 2, _SUPERBLOCK, imatrix=True),
        "IQ2_M imatrix": _type("IQ2_M", 2, _SUPERBLOCK, imatrix=True),
        "Q3_K_M": _type("Q3_K_M", 3, _SUPERBLOCK),
        "Q3_K_M imatrix": _type("Q3_K_M", 3, _SUPERBLOCK, imatrix=True),
        "IQ3_S imatrix": _type("IQ3_S", 3, _SUPERBLOCK, imatrix=True),
        "Q4_0": _type("Q4_0", 4, 32),
        "Q4_0 imatrix": _type("Q4_0", 4, 32, imatrix=True),
        "Q4_1": _type("Q4_1", 4, 32),
        "IQ4_NL imatrix": _type("IQ4_NL", 4, 32, imatrix=True),
        "Q4_K_M": _type("Q4_K_M", 4, _SUPERBLOCK),
        "Q4_K_M imatrix": _type("Q4_K_M", 4, _SUPERBLOCK, imatrix=True),
        "IQ4_XS imatrix": _type("IQ4_XS", 4, _SUPERBLOCK, imatrix=True),
    }
    fixed = frozenset(name for name, settings in variants.items() if not settings["imatrix"])

    def problem(self, variant: str, size: Size) -> str:
        bits = self.variants[variant]["bits"]
        return "" if bits == size.bits else f"{variant} is a type of {bits} bits, not of {size.bits}"

    def run(self, variant: str, task: Task, python: Path) -> Outcome:
        settings = self.variants[variant]
        store = opened(task.model)
        _check_columns(store, variant, settings["block"])
        files, dense = task.out / "files", task.out / "dense"
        files.mkdir()
        dense.mkdir()
        plain, path = task.out / "plain.gguf", files / "model.gguf"
        try:
            write_file(store, plain, dict.fromkeys(store.shapes, "F32"))
            arguments = ["--model", task.model, "--tokens", task.tokens, "--plain", plain, "--kind", settings["type"]]
            arguments += ["--imatrix"] if settings["imatrix"] else []
            arguments += ["--out", path, "--dense", dense / path.name]
            report = run_side(python, "llama_cpp.py", [str(one) for one in arguments], task.out / "report.json")
        finally:
            plain.unlink(missing_ok=True)
        bits, wide = stored_bits(store, path), wide_tensors(path)
        return Outcome.reported(self.name, report, dense / path.name, files, true_bits=bits, wide=wide)


class _Plain(PackedStore):
    """A folder of plain weights, as our writer of GGUF files takes one: with nothing rounded."""

    _index = CheckpointStore._index

    @cached_property
    def description(self) -> dict[str, Any]:
        return {"tensors": dict.fromkeys(self.shapes)}


def opened(folder: Path) -> PackedStore:
    """Raises OpponentError for a model that llama.cpp does not run as it is meant."""
    store = _Plain(folder)
    problems = Gguf().problems(Needs(store.config.model_type, (), (), store.config))
    if problems:
        raise OpponentError("; ".join(problems))
    return store


def _check_columns(store: PackedStore, variant: str, block: int) -> None:
    """Raises OpponentError where most of the rounded weights have rows that the blocks of a type do not divide: it
    rounds these to a larger type, and the result is no longer one of these bits.
    """
    sizes = {op.module: op.shape for group in store.graph.blocks for op in group.linears}
    odd = {name: shape for name, shape in sizes.items() if shape[-1] % block}
    share = sum(a * b for a, b in odd.values()) / sum(a * b for a, b in sizes.values())
    if share > _LIMIT:
        name, shape = next(iter(odd.items()))
        raise OpponentError(
            f"llama.cpp would round {share:.0%} of the weights to a larger type than {variant}: its blocks of {block} "
            f"do not divide rows of {shape[-1]} ({name})"
        )


def stored_bits(store: PackedStore, path: Path) -> float:
    """What a GGUF file stores for the linear layers of the blocks, in bits per weight of theirs.

    Raises InputError for a file that lacks one.
    """
    found, names = stored_tensors(path), tensor_names(store)
    wanted = [names[op.weight] for group in store.graph.blocks for op in group.linears]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{path} lacks {missing[0]}")
    rounded = [found[name] for name in wanted]
    return 8 * sum(one.bytes for one in rounded) / sum(one.numbers for one in rounded)


def wide_tensors(path: Path) -> int:
    """Bytes that the plain tensors of a GGUF file take beyond 16 bits an entry: embedding, head, norms and biases.

    None of them is part of a rounded layer: types of few bits hold their scales themselves.
    """
    return sum(one.numbers * WIDE[one.kind] for one in stored_tensors(path).values() if one.kind in WIDE)
