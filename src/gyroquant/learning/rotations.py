"""Rotations as files: learned in one run, applied in another, composed and inverted.

A file is safetensors with one matrix a site, under the names that SpinQuant's code uses for Llama: `R1`,
`model.layers.0.self_attn.R2`, ...; a vector x is rotated to ``x @ R``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.files import put_tensors
from gyroquant.maps import Dense
from gyroquant.methods.stored import read_rotations
from gyroquant.models.fold import FoldPlan
from gyroquant.models.sites import site_key

FILE_NAME = "rotations.safetensors"


def rotations_of(plan: FoldPlan, sites: Iterable[str]) -> dict[str, Tensor]:
    """All that a plan does at R1 and R2, those of them that are among `sites`, as one matrix each, fp64.

    Where scales are part of it, it is no rotation and left out.
    """
    wanted = {"R1", "R2"}.intersection(sites)
    found: dict[str, Tensor] = {}
    for site, m, online in plan.folded:
        if site.name in wanted and not online:
            key = site_key(site)
            found[key] = m.dense() if key not in found else m.apply(found[key])
    return {key: m for key, m in found.items() if Dense(m).orthogonal}


def write_rotations(path: Path, rotations: Mapping[str, Tensor]) -> None:
    """Writes a file of rotations, fp64, whole or not at all. Raises OSError where the disk does not take it."""
    put_tensors(path, {key: m.double() for key, m in rotations.items()})


def load_rotations(place: str | Path) -> dict[str, Tensor]:
    """The rotations of a file, or of a folder that a run with learned rotations wrote."""
    path = Path(place)
    if path.is_dir():
        path = path / FILE_NAME
        if not path.exists():
            raise InputError(f"{place} holds no learned rotations: its recipe has no section `learn`")
    return read_rotations(path)


def compose(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``x @ A @ B`` at every site. Raises InputError when a site is in one of them only, or of another size."""
    for key in {*first, *second}:
        if key not in first or key not in second or first[key].shape != second[key].shape:
            raise InputError(f"{key} is not in both files with the same size, so they cannot be composed")
    return {key: first[key] @ second[key] for key in first}


def invert(rotations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rotations that undo these."""
    return {key: m.T.contiguous() for key, m in rotations.items()}


def describe(rotations: Mapping[str, Tensor]) -> list[dict[str, object]]:
    """A row for every site: its size, how far from orthogonal, and how far from doing nothing."""
    rows: list[dict[str, object]] = []
    for key, m in rotations.items():
        eye = torch.eye(len(m), dtype=m.dtype)
        off = float((m @ m.T - eye).abs().max())
        rows.append({"site": key, "n": len(m), "drift": off, "from_identity": float((m - eye).norm() / eye.norm())})
    return rows
