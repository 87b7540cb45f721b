"""The model of a saved folder, prepared for a trace.

Rounded layers, and the products of stacked experts, are replaced by their codes and scales in the graph. A rounded
parameter that other code reads is an operation that returns the parameter. So the dense matrices are never made: memory
holds the codes, and in fp32 the parameters that are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from openvino import Type
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from gyroquant.formats.openvino.experts import Product, run_all_experts
from gyroquant.formats.openvino.operations import OpenVinoOperations
from gyroquant.formats.openvino.traced import Replaced, traced
from gyroquant.grids import QuantizedWeight
from gyroquant.models.execution.online import attach
from gyroquant.models.execution.runner import build_skeleton
from gyroquant.models.graph.model_graph import TOKENS, LinearOp
from gyroquant.models.stores.packed import PackedStore

_ROWS = "gyroquant_rows"


def traced_store(store: PackedStore) -> Any:
    """The graph of the model in a folder that gyroquant wrote."""
    config = deepcopy(store.config)
    del config.quantization_config  # otherwise OpenVINO searches for quantized layers of other programs
    model: Any = build_skeleton(config)
    rounded = {name: store.graph.op(name) for name in store.description["tensors"]}
    _fill(model, store, rounded)
    attach(model, store.online)
    replaced = Replaced()
    products = run_all_experts(model)
    for op in rounded.values():
        _replace(model, store, op, products.get(op.weight, []), replaced)
    with _rows_in_embeddings():
        graph = traced(model, replaced)
    _restore_dtype(graph, store.dtype)
    return graph


def _fill(model: Any, store: PackedStore, rounded: dict[str, LinearOp]) -> None:
    """Sets the parameters of a model on the meta device. A rounded parameter becomes a zero, expanded to its shape."""
    for name, sizes in store.shapes.items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        value = torch.zeros(1).expand(sizes) if name in rounded else store.read([name])[name]
        value = value.float() if value.is_floating_point() else value
        buffer = last in module._buffers
        setattr(module, last, value if buffer else nn.Parameter(value, requires_grad=False))
    model.tie_weights()


def _replace(model: Any, store: PackedStore, op: LinearOp, products: list[Product], replaced: Replaced) -> None:
    """Replaces whatever reads a rounded parameter: the layers or the products whose weight it is, and other code."""
    ops, table = OpenVinoOperations(), op.entry.reads == TOKENS
    read = partial(store.quantized, op.weight)
    weight = cache(lambda: ops.stored_form(read())) if table else read
    for product in products:

        def piece(x: Any, product: Product = product) -> Any:
            return ops.rounded_experts(x, weight(), product.experts, product.part)

        replaced.add(product, partial(_zeros, product.outputs), piece)
    for name in (op.weight, *(alias for alias, stored in store.tied.items() if stored == op.weight)):
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        if not op.entry.stacked and type(module).forward in (nn.Linear.forward, Conv1D.forward):
            replaced.add(module, partial(_zeros, op.matrix_shape[0]), lambda x: _layer(ops, store, op, weight(), x))
        elif table and isinstance(module, nn.Embedding):
            module.add_module(_ROWS, rows := _Rows(op.matrix_shape[1]))
            replaced.add(rows, rows.forward, lambda ids: ops.looked_up(ids, weight()))
        setattr(module, last, nn.Parameter(torch.zeros(()), requires_grad=False))
        stored = _Stored(op.shape)
        parametrize.register_parametrization(module, last, stored, unsafe=True)
        replaced.add(stored, stored.forward, lambda x: ops.parameter(weight(), op))


class _Stored(nn.Module):
    """A parameter of this shape, all zeros, made from one zero."""

    def __init__(self, sizes: tuple[int, ...]):
        super().__init__()
        self._sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self._sizes)


class _Rows(nn.Module):
    """The rows of a rounded table at token ids, in place of `nn.Embedding.forward`. Some classes scale these rows. They
    are zeros in the trace, where only their shape matters.
    """

    def __init__(self, columns: int):
        super().__init__()
        self._columns = columns

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self._columns)


@contextmanager
def _rows_in_embeddings() -> Iterator[None]:
    """Within a with block, embeddings that have a `_Rows` take their rows from it."""
    plain = nn.Embedding.forward

    def forward(self: nn.Embedding, ids: Tensor) -> Tensor:
        rows = self._modules.get(_ROWS)
        return plain(self, ids) if rows is None else rows(ids)

    nn.Embedding.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Embedding.forward = plain  # type: ignore[method-assign]


def _zeros(features: int, x: Tensor) -> Tensor:
    """The output of a layer during the trace, where only its shape matters."""
    return x.new_zeros((*x.shape[:-1], features))


def _layer(ops: OpenVinoOperations, store: PackedStore, op: LinearOp, weight: QuantizedWeight, x: Any) -> Any:
    y = ops.rounded(x, weight)
    return y if op.bias is None else ops.add(y, ops.numbers(store.read([op.bias])[op.bias]))


def _restore_dtype(model: Any, dtype: torch.dtype) -> None:
    """Stores matrices in the dtype of the stored model, if that holds them exactly."""
    if dtype == torch.float32:
        return
    for op in model.get_ops():
        if op.get_type_name() != "Constant" or op.get_element_type() != Type.f32:
            continue
        if sum(size > 1 for size in op.get_output_shape(0)) < 2:
            continue
        values = torch.from_numpy(op.get_data().copy())
        short = values.to(dtype)
        if torch.equal(short.float(), values):
            readers, constant = list(op.output(0).get_target_inputs()), OpenVinoOperations().numbers(short)
            for reader in readers:
                reader.replace_source_output(constant.output(0))
