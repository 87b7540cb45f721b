"""Finds latents: bases between two linear layers with nothing, or only a norm, between them.

Examples are the query and key-value latents of multi-head latent attention, and pairs of low-rank factors.
"""

from __future__ import annotations

from typing import Any

import torch

from gyroquant.models.deriving.block import Block, Layer
from gyroquant.models.deriving.directions import among, columns_of, directions, norm_form
from gyroquant.models.deriving.trace import NormCall
from gyroquant.models.graph.spec import Norm

PREFIX = "latent."
REST = "rest"
"""The basis of the rows that follow those of a latent, such as the key that all heads share."""


def read_latents(reader: Block) -> None:
    """Sets the roles of layers that write and read a latent in a block. Layers with a role are left alone."""
    norms = [norm for norm in reader.norms if norm.name.removeprefix(reader.prefix) not in reader.norm_entries]
    for layer in reader.layers:
        if not layer.reads and layer.whole and reader.prefix:
            _ = any(_through_norm(reader, layer, norm) for norm in norms) or _directly(reader, layer)


def _through_norm(reader: Block, layer: Layer, norm: NormCall) -> bool:
    """Whether a layer reads a norm whose input is what other layers write; sets the roles if so."""
    width = norm.y.shape[-1]
    name = norm.name.removeprefix(reader.prefix)
    if layer.rows.shape[1] != width or not among(directions(layer.rows, width), directions(norm.y, width)):
        return False
    entry = reader.norm_entries.get(name)
    if entry is not None:  # another layer reads it too
        layer.reads = entry.writes
        return entry.reads.startswith(PREFIX)
    form = norm_form(norm.x, norm.y, getattr(norm.module, "weight", None), getattr(norm.module, "bias", None))
    basis = f"{PREFIX}{name}"
    if form is None or not _written(reader, layer, norm.x.detach().reshape(-1, width), basis):
        return False
    reader.norm_entries[name] = Norm(name, basis, f"{basis}.out", *form)
    layer.reads = f"{basis}.out"
    return True


def _written(reader: Block, layer: Layer, rows: torch.Tensor, basis: str) -> bool:
    """Whether the first outputs of one layer are these rows; sets what it writes if so."""
    for writer in reader.layers:
        if writer is layer or writer.writes or len(writer.products) != 1 or not writer.whole:
            continue
        y = writer.products[0].y.detach()
        index = columns_of(rows, y.reshape(-1, y.shape[-1]))
        if index is None or not bool((index == torch.arange(len(index))).all()):
            continue
        if len(index) == y.shape[-1]:
            writer.writes = basis
            return True
        size = size_setting(reader.model.config.get_text_config(decoder=True), len(index))
        if size is not None:
            writer.writes, writer.sizes = (basis, REST), (size,)
            return True
    return False


def _directly(reader: Block, layer: Layer) -> bool:
    """Whether a layer reads what other layers write, as it is or summed with weights; sets the roles if so."""
    rows = layer.rows
    basis, found = f"{PREFIX}{layer.name.removesuffix('.weight')}", False
    slopes = [product.x.grad for product in layer.products if product.x.grad is not None]
    for writer in reader.layers:
        grads = writer.grads
        if writer is layer or writer.writes or grads is None or grads.shape[1] != rows.shape[1] or not writer.whole:
            continue
        outputs = torch.cat([product.y.detach().reshape(-1, grads.shape[1]) for product in writer.products])
        read = among(directions(rows, rows.shape[1]), directions(outputs, rows.shape[1]))
        if not read and slopes and bool(grads.any()):
            given = torch.cat([directions(slope, rows.shape[1]) for slope in slopes])
            read = among(directions(grads, rows.shape[1]), given)
        if read:
            writer.writes, layer.reads, found = basis, basis, True
    return found


def size_setting(config: Any, size: int) -> str | None:
    """The setting that states a size, those of ranks first. None if there is none."""
    names = [key for key, value in config.to_dict().items() if value == size and isinstance(value, int)]
    return min(names, key=lambda name: ("rank" not in name and "latent" not in name, name), default=None)
