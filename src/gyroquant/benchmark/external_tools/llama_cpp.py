"""llama.cpp's own quantizer: its types of 2 to 4 bits, with and without an importance matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from gyroquant.benchmark.external_tools.base import ExternalTool, ExternalToolError, Size, Task, ToolResult, run_script
from gyroquant.benchmark.external_tools.stored import WIDE
from gyroquant.errors import InputError
from gyroquant.formats.base import ModelRequirements
from gyroquant.formats.gguf.header import stored_tensors
from gyroquant.formats.gguf.tensors import tensor_pieces
from gyroquant.formats.gguf.writer import Gguf, tensor_names, write_file
from gyroquant.models.stores.base import CheckpointStore
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.weight_bytes import add_up

SUPERBLOCK = 256  # weights
_LIMIT = 0.5  # the largest share of weights that may be rounded to another type than the requested one


def type_settings(kind: str, bits: int, block: int, imatrix: bool = False) -> dict[str, Any]:
    """The settings of a variant: ggml's type, its bits, the weights of a block, and whether it gets statistics."""
    return {"type": kind, "bits": bits, "block": block, "imatrix": imatrix, "outside": "default"}


class LlamaCpp(ExternalTool):
    """llama.cpp through its Python binding.

    The groups are those of its types: blocks of 32, 64 or 256 with scales in two levels. The requested group size is
    ignored. Embedding and head have the types that llama.cpp gives them by default. `dense` is the GGUF file, decoded
    to fp32 by llama.cpp itself. "imatrix" variants get the mean square of every input column over the calibration
    text. Its tool `llama-imatrix` measures the same.
    """

    name = "llama.cpp"
    script: ClassVar[str] = "llama_cpp.py"
    """The file in `runners` that runs it."""
    home = "ggml-org/llama.cpp"
    requirements = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "transformers==5.23.0", "accelerate==1.15.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Q2_0": type_settings("Q2_0", 2, 64),
        "Q2_K": type_settings("Q2_K", 2, SUPERBLOCK),
        "Q2_K imatrix": type_settings("Q2_K", 2, SUPERBLOCK, imatrix=True),
        "IQ2_XS imatrix": type_settings("IQ2_XS", 2, SUPERBLOCK, imatrix=True),
        "IQ2_M imatrix": type_settings("IQ2_M", 2, SUPERBLOCK, imatrix=True),
        "Q3_K_M": type_settings("Q3_K_M", 3, SUPERBLOCK),
        "Q3_K_M imatrix": type_settings("Q3_K_M", 3, SUPERBLOCK, imatrix=True),
        "IQ3_S imatrix": type_settings("IQ3_S", 3, SUPERBLOCK, imatrix=True),
        "Q4_0": type_settings("Q4_0", 4, 32),
        "Q4_0 imatrix": type_settings("Q4_0", 4, 32, imatrix=True),
        "Q4_1": type_settings("Q4_1", 4, 32),
        "IQ4_NL imatrix": type_settings("IQ4_NL", 4, 32, imatrix=True),
        "Q4_K_M": type_settings("Q4_K_M", 4, SUPERBLOCK),
        "Q4_K_M imatrix": type_settings("Q4_K_M", 4, SUPERBLOCK, imatrix=True),
        "IQ4_XS imatrix": type_settings("IQ4_XS", 4, SUPERBLOCK, imatrix=True),
    }
    outside_bits = 2
    fixed = frozenset(name for name, settings in variants.items() if not settings["imatrix"])

    def problem(self, variant: str, size: Size) -> str:
        bits = self.variants[variant]["bits"]
        return "" if bits == size.bits else f"{variant} is a type of {bits} bits, not {size.bits}"

    def run(self, variant: str, task: Task, python: Path) -> ToolResult:
        settings = self.variants[variant]
        store = opened(task.model)
        _check_columns(store, f"{self.name} would round", variant, settings["block"])
        files, dense = task.out / "files", task.out / "dense"
        files.mkdir()
        dense.mkdir()
        plain, path = task.out / "plain.gguf", files / "model.gguf"
        try:
            write_file(store, plain, dict.fromkeys(store.shapes, "F32"))
            arguments = ["--model", task.model, "--tokens", task.tokens, "--plain", plain, "--kind", settings["type"]]
            arguments += ["--imatrix"] if settings["imatrix"] else []
            arguments += ["--out", path, "--dense", dense / path.name]
            report = run_script(python, self.script, [str(word) for word in arguments], task.out / "report.json")
        finally:
            plain.unlink(missing_ok=True)
        bits, wide = stored_bits(store, path), wide_tensors(path)
        place, parts = dense / path.name, tensor_parts(store, path)
        return ToolResult.reported(self.name, report, place, files, true_bits=bits, wide=wide, weight_bytes=parts)


class _Plain(PackedStore):
    """A folder of plain weights as our GGUF writer reads it: no weight is rounded."""

    _index = CheckpointStore._index

    @cached_property
    def description(self) -> dict[str, Any]:
        return {"tensors": dict.fromkeys(self.shapes)}


def opened(folder: Path) -> PackedStore:
    """The folder as a store. Raises ExternalToolError for a model that llama.cpp does not run correctly."""
    store = _Plain(folder)
    problems = Gguf().incompatibilities(ModelRequirements(store.config.model_type, (), (), store.config))
    if problems:
        raise ExternalToolError("; ".join(problems))
    return store


def _check_columns(store: PackedStore, would: str, variant: str, block: int) -> None:
    """Raises ExternalToolError if the blocks of a type do not divide the rows of most of the rounded weights.

    The program rounds such weights to a larger type, so the result would not have the bits of the variant.
    """
    shapes = {op.module: op.shape for group in store.graph.blocks for op in group.linears}
    odd = {name: shape for name, shape in shapes.items() if shape[-1] % block}
    share = sum(a * b for a, b in odd.values()) / sum(a * b for a, b in shapes.values())
    if share > _LIMIT:
        name, shape = next(iter(odd.items()))
        raise ExternalToolError(
            f"{would} {share:.0%} of the weights to a larger type than {variant}: its blocks of {block} "
            f"do not divide rows of {shape[-1]} ({name})"
        )


def stored_bits(store: PackedStore, path: Path) -> float:
    """The bits per weight that a GGUF file stores for the linear layers of the blocks.

    Raises InputError if the file lacks one of them.
    """
    stored, names = stored_tensors(path), tensor_names(store)
    expected = [names[op.weight] for group in store.graph.blocks for op in group.linears]
    missing = [name for name in expected if name not in stored]
    if missing:
        raise InputError(f"{path} lacks {missing[0]}")
    rounded = [stored[name] for name in expected]
    return 8 * sum(tensor.bytes for tensor in rounded) / sum(tensor.numbers for tensor in rounded)


def tensor_parts(store: PackedStore, path: Path) -> dict[str, int]:
    """The bytes of the tensors of a GGUF file by part of the model, and their `total`.

    Plain numbers count at most 16 bits each.
    """
    owners = {piece.tensor: name for name, pieces in tensor_pieces(store).items() for piece in pieces}
    stored = stored_tensors(path)
    sizes = {name: tensor.bytes - tensor.numbers * WIDE.get(tensor.kind, 0) for name, tensor in stored.items()}
    return add_up(store.graph, [(owners.get(name, name), size) for name, size in sizes.items()])


def wide_tensors(path: Path) -> int:
    """Bytes that the plain tensors of a GGUF file take beyond 16 bits per entry: embedding, head, norms and biases.

    None of them is part of a rounded layer, because the types with few bits include their scales.
    """
    return sum(tensor.numbers * WIDE[tensor.kind] for tensor in stored_tensors(path).values() if tensor.kind in WIDE)
