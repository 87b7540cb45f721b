"""Finds feed-forward networks: the layer after the nonlinearity, and the layers that write its inputs.

A coordinate of the input of down_proj depends on one coordinate of the gate and one of up, at the same token. The
gradient shows which. It depends on up linearly: then the gradient times up is the coordinate itself.
"""

from __future__ import annotations

import torch

from gyroquant.models.deriving.block import Block, Layer
from gyroquant.models.deriving.trace import Product


def read_feed_forward(reader: Block) -> None:
    """Sets the roles of the layers of every feed-forward network in a block."""
    order = {id(product): place for place, product in enumerate(reader.trace.products)}
    for down in reader.layers:
        if down.reads or not (down.writes == "residual" or str(down.writes).startswith("post.")):
            continue
        product = max(down.products, key=lambda p: p.rows.shape[0])
        if not product.x.requires_grad:
            continue
        start = _last_writer(reader, product, order)
        candidates = [
            (layer, other)
            for layer in reader.layers
            for other in layer.products
            if start < order[id(other)] < order[id(product)]
            and other.view.expert == product.view.expert
            and other.y.requires_grad
        ]
        if candidates:
            _read(down, product, candidates)


def _last_writer(reader: Block, product: Product, order: dict[int, int]) -> int:
    """The place of the last product before this one that wrote to the stream. An expert's own products come after."""
    places = [
        order[id(other)]
        for layer in reader.layers
        if layer.writes == "residual" or str(layer.writes).startswith("post.")
        for other in layer.products
        if order[id(other)] < order[id(product)]
    ]
    return max(places, default=-1)


def _read(down: Layer, product: Product, candidates: list[tuple[Layer, Product]]) -> None:
    x = product.x.reshape(-1, product.x.shape[-1])
    width = x.shape[1]
    probed = (0, 1, width - 1)
    row = int(x.detach()[:, probed].abs().amin(1).argmax())  # a row without zeros there, if there is one
    outputs = [other.y for _, other in candidates]
    columns: dict[int, list[list[int]]] = {}
    linear: dict[tuple[int, int], bool] = {}
    for coordinate in probed:
        if float(x[row, coordinate].detach()) == 0:
            return
        grads = torch.autograd.grad(x[row, coordinate], outputs, retain_graph=True, allow_unused=True)
        for place, grad in enumerate(grads):
            met = [] if grad is None else grad.reshape(-1, grad.shape[-1]).nonzero().tolist()
            if not met:
                continue
            if len({token for token, _ in met}) != 1 or candidates[place][0].writes:
                return  # it mixes tokens, or passes attention
            columns.setdefault(place, []).append([column for _, column in met])
            assert grad is not None
            products = (grad * outputs[place]).detach().reshape(-1, grad.shape[-1])
            for part, (token, column) in enumerate(met):
                share = float(products[token, column]) / float(x[row, coordinate].detach())
                linear[place, part] = linear.get((place, part), True) and abs(share - 1) < 1e-3
    if any(len(found) != 3 for found in columns.values()):
        return
    prefix = down.name.removesuffix(".weight").rpartition(".")[0]
    _name(
        down, [candidates[place][0] for place in columns], list(columns.values()), width, linear, list(columns), prefix
    )


def _name(
    down: Layer,
    writers: list[Layer],
    columns: list[list[list[int]]],
    width: int,
    linear: dict[tuple[int, int], bool],
    places: list[int],
    prefix: str,
) -> None:
    """Names the bases of one network, if its layout is one that the description can express."""
    basis = f"{prefix}." if prefix else ""
    parts = [len(found[0]) for found in columns]
    met = f"coordinate i of the input of {down.module} depends"
    names = " and ".join(dict.fromkeys(writer.module for writer in writers))
    if parts == [1] and columns[0] == [[0], [1], [width - 1]]:
        writers[0].writes, writers[0].writes_why = f"{basis}up", f"{met} on row i"
    elif parts == [1, 1] and all(found == [[0], [1], [width - 1]] for found in columns):
        ups = [linear[place, 0] for place in places]
        if not any(ups):
            return
        up = 1 if ups[1] else 0
        writers[up].writes, writers[1 - up].writes = f"{basis}up", f"{basis}gate"
        writers[up].writes_why, writers[1 - up].writes_why = f"{met} linearly on row i", f"{met} on row i"
    elif parts == [2]:
        together = columns[0] == [[0, width], [1, width + 1], [width - 1, 2 * width - 1]]
        alternating = columns[0] == [[0, 1], [2, 3], [2 * width - 2, 2 * width - 1]]
        ups = [linear[places[0], part] for part in (0, 1)]
        if (together or alternating) and any(ups):
            bases = (f"{basis}gate", f"{basis}up")
            writers[0].writes = bases if ups[1] else bases[::-1]
            writers[0].alternating = alternating
            rows = ("2 i", "2 i + 1") if alternating else ("i", "i + n")
            writers[0].writes_why = f"{met} on rows {rows[0]} and {rows[1]}, linearly on row {rows[1 if ups[1] else 0]}"
    down.reads, down.reads_why = f"{basis}act", f"its inputs depend on the outputs of {names} at the same token alone"
    for writer in writers:
        writer.writes_why = writer.writes_why or f"how {down.module} depends on its outputs cannot be described"
