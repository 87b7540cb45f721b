"""Files of rotations, which are learned in one run and applied in another. They can be composed and inverted.

A file is in the safetensors format, with one matrix for each site. The names are those of SpinQuant's code for Llama:
`R1`, `model.layers.0.self_attn.R2`, ... A vector x is rotated to ``x @ R``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.maps import Dense
from gyroquant.methods.stored import read_rotations
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.sites import site_key
from gyroquant.system.files import put_tensors

FILE_NAME = "rotations.safetensors"


def rotations_of(plan: FoldPlan, sites: Iterable[str]) -> dict[str, Tensor]:
    """The product of all maps that a plan fuses at R1 and R2, one matrix for each site, fp64.

    Only the sites named in `sites` are included. A matrix that contains scales is not a rotation and is left out.
    """
    names = set(sites)
    matrices: dict[str, Tensor] = {}
    for site, m, online in plan.folded:
        if site.kind.stored_rotation and site.name in names and not online:
            key = site_key(site)
            matrices[key] = m.dense() if key not in matrices else m.apply(matrices[key])
    return {key: m for key, m in matrices.items() if Dense(m).orthogonal}


def write_rotations(path: Path, rotations: Mapping[str, Tensor]) -> None:
    """Writes a file of rotations, fp64. A failed write leaves no partial file. Raises OSError if writing fails."""
    put_tensors(path, {key: m.double() for key, m in rotations.items()})


def load_rotations(place: str | Path) -> dict[str, Tensor]:
    """The rotations of a file, or of the output folder of a run that learned rotations.

    Raises InputError if a folder has no rotations.
    """
    path = Path(place)
    if path.is_dir():
        path = path / FILE_NAME
        if not path.exists():
            raise InputError(
                f"{place} does not contain learned rotations ({FILE_NAME}): give the output of a recipe with "
                "the section `learn`"
            )
    return read_rotations(path)


def compose(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rotations ``A @ B`` at every site, with A from `first` and B from `second`.

    Raises InputError if a site is missing in one of them, or has another size.
    """
    for key in {*first, *second}:
        if key not in first or key not in second or first[key].shape != second[key].shape:
            raise InputError(
                f"{key} is not in both files with the same size, so they cannot be composed: give rotations of the "
                "same model and sites"
            )
    return {key: first[key] @ second[key] for key in first}


def invert(rotations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse rotations."""
    return {key: m.T.contiguous() for key, m in rotations.items()}


def describe(rotations: Mapping[str, Tensor]) -> list[dict[str, object]]:
    """A row for every site.

    - site: its key.
    - n: its size.
    - drift: the largest entry of ``|R R^T - I|``.
    - from_identity: the relative distance from the identity, in the Frobenius norm.
    """
    rows: list[dict[str, object]] = []
    for key, m in rotations.items():
        eye = torch.eye(len(m), dtype=m.dtype)
        drift = float((m @ m.T - eye).abs().max())
        rows.append({"site": key, "n": len(m), "drift": drift, "from_identity": float((m - eye).norm() / eye.norm())})
    return rows
