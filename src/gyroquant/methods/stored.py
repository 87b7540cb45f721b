"""Rotations from a file, such as those that another run learned."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError, RecipeError
from gyroquant.maps import Dense, Map, random_orthogonal
from gyroquant.maps.elementary import ORTHOGONALITY
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site, site_key

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Stored(Method):
    """The matrix that `file` holds for a site; see `gyroquant rotations`."""

    method: Literal["stored"] = "stored"
    file: str

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(file=str(_example_file()))]

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites that the file has rotations for."""
        return tuple(dict.fromkeys(key.rpartition(".")[2] for key in read_rotations(Path(self.file))))

    def choose(self, site: Site, context: Context) -> Map:
        rotations, key = read_rotations(Path(self.file)), site_key(site)
        if key not in rotations:
            raise RecipeError(f"{self.file} has no rotation for {key}; it has {', '.join(list(rotations)[:4])} ...")
        matrix = rotations[key]
        if tuple(matrix.shape) != (site.n, site.n):
            raise RecipeError(
                f"{self.file}: {key} has shape {tuple(matrix.shape)}, but {site.label} needs ({site.n}, {site.n})"
            )
        m = Dense(matrix)
        if not m.orthogonal:
            raise RecipeError(f"{self.file}: {key} is not orthogonal to {ORTHOGONALITY:g}, so it is not a rotation")
        return m


@cache
def _example_folder() -> TemporaryDirectory[str]:
    """A temporary folder that is deleted when the process ends."""
    return TemporaryDirectory(prefix="gyroquant-example-")


def _example_file() -> Path:
    """A file with a rotation of 64 coordinates for R1, as wide as the tiny models of `gyroquant.testing`."""
    path = Path(_example_folder().name) / "rotations.safetensors"
    if not path.exists():
        save_file({"R1": random_orthogonal(64, torch.Generator().manual_seed(5)).matrix.contiguous()}, path)
    return path


def read_rotations(path: Path) -> dict[str, Tensor]:
    """The matrices of a file of rotations, fp64. Raises InputError if the file is not such a file."""
    try:
        matrices = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as rotations in safetensors: {error}") from error
    for key, matrix in matrices.items():
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
            raise InputError(f"{path}: {key} is not a square matrix: its shape is {tuple(matrix.shape)}")
        if matrix.dtype not in _DTYPES or not bool(matrix.isfinite().all()):
            raise InputError(f"{path}: {key} is not a rotation: it holds {matrix.dtype}, or values that are not finite")
    return {key: matrix.to(torch.float64) for key, matrix in matrices.items()}
