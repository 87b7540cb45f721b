"""A decoder as an OpenVINO graph, traced from transformers' own code, for architectures that `Decoder` cannot build.

The inside of rounded layers is not traced. Each is one operation of ours in the trace, and OpenVINO's frontend replaces
it by the same piece of graph as in built graphs. So the dense matrices are never made: memory holds the codes, and in
fp32 the parameters that are not rounded. Online maps are traced as they run. The graph keeps keys and values as its
state, and has the same inputs and outputs as built graphs.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import PartialShape, Type, opset13
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension, ModuleExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gyroquant.formats.openvino.operations import OpenVinoOperations, named, remembered
from gyroquant.models.execution.online import AttentionState, attach, mark_ready
from gyroquant.models.execution.runner import build_skeleton
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed import PackedStore

_OPERATION = "GyroquantLinear"
_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Sizes of the example. They differ, and none is 1, because transformers treats 1 differently.
_BATCH, _PAST, _NEW = 2, 3, 4


def traced(store: PackedStore) -> Any:
    """The graph of a model. Its rounded parameters must all be weights of separate linear layers, not experts."""
    config = deepcopy(store.config)
    del config.quantization_config  # otherwise OpenVINO searches for quantized layers of other programs
    model = build_skeleton(config)
    linears = _Linears(store)
    kept = linears.fill(model)
    attach(model, store.online)
    with_cache = _FlatCache(model, len(store.graph.blocks))
    sizes = (store.graph.kv_heads, store.graph.head_dim)
    # The steps of `ov.convert_model`, without its second trace, its preprocessing and its telemetry.
    with torch.no_grad(), warnings.catch_warnings():
        for kind in (TracerWarning, FutureWarning):  # tests cover the traced graph; OpenVINO reads every attribute
            warnings.simplefilter("ignore", kind)
        decoder = TorchScriptPythonDecoder(
            with_cache,
            example_input=_example(len(store.graph.blocks), *sizes),
            module_extensions=kept,
            trace_kwargs={"check_trace": False},
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        frontend.add_extension(ConversionExtension(_OPERATION, linears.convert))
        graph = _stateful(frontend.convert(frontend.load(decoder)), *sizes)
    apply_moc_transformations(graph, cf=False)
    _restore_dtype(graph, store.dtype)
    return graph


def _example(layers: int, kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """The inputs on which a model is traced: two texts, with some tokens already in the cache."""
    length = _PAST + _NEW
    return (
        torch.zeros(_BATCH, _NEW, dtype=torch.long),
        torch.ones(_BATCH, length, dtype=torch.long),
        torch.arange(_PAST, length).repeat(_BATCH, 1),
        *(torch.zeros(_BATCH, kv_heads, _PAST, head_dim) for _ in range(2 * layers)),
    )


@dataclass
class _Linears:
    """The rounded layers of a model, numbered in the order of its parameters."""

    store: PackedStore

    def __post_init__(self) -> None:
        packed = self.store.description["tensors"]
        self.ops = [op for op in self.store.graph.linears if op.weight in packed]

    def fill(self, model: nn.Module) -> dict[nn.Module, Any]:
        """Sets the parameters of a model on the meta device. A rounded parameter becomes a zero, expanded to its shape.
        Returns the extensions that make the frontend keep each rounded layer as one operation.
        """
        rounded_names = {op.weight for op in self.ops}
        for name, sizes in self.store.shapes.items():
            parent, _, last = name.rpartition(".")
            value = torch.zeros(1).expand(sizes) if name in rounded_names else self.store.read([name])[name].float()
            setattr(model.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))
        model.tie_weights()  # type: ignore[operator]
        kept = {}
        for number, op in enumerate(self.ops):
            module = model.get_submodule(op.module)
            evaluate, convert = partial(_zeros, op.out_features), partial(_called, number)
            kept[module] = ModuleExtension(module, _OPERATION, evaluate, convert)
        return kept

    def convert(self, context: Any) -> Any:
        """The graph of the layer that one of our operations represents."""
        return self._layer(self.ops[int(context.get_values_from_const_input(1))], context.get_input(0)).outputs()

    def _layer(self, op: LinearOp, x: Any) -> Any:
        ops = OpenVinoOperations()
        y = ops.rounded(x, self.store.quantized(op.weight))
        return y if op.bias is None else ops.add(y, ops.numbers(self.store.read([op.bias])[op.bias]))


def _zeros(features: int, module: nn.Module, x: Tensor, number: Tensor) -> Tensor:
    """The output of a layer during the trace, where only its shape matters."""
    return x.new_zeros((*x.shape[:-1], features))


def _called(number: int, module: nn.Module, operation: Any, x: Tensor) -> Any:
    return operation(x, torch.tensor(number))


class _CachedLayer(DynamicLayer):
    """Keys and values of one layer, (batch, kv heads, length, head_dim). They are set at the start: if they were joined
    to the empty ones with which transformers starts, they would lose their rank. Keys are stored rotated (R3).
    """

    def __init__(self, keys: Tensor, values: Tensor, state: AttentionState | None):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self._state = state

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._state is None:
            return super().update(key_states, value_states)
        keys, values = super().update(self._state.keys(key_states), value_states)
        return mark_ready(keys), values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]  # without a check for an empty cache, whose result would become part of the trace


class _FlatCache(nn.Module):
    """A model whose cache is a flat list of arguments and results: keys and values of each layer in turn."""

    def __init__(self, model: nn.Module, layers: int):
        super().__init__()
        self.decoder = model
        self._states: list[AttentionState | None] = [None] * layers
        for module in model.modules():
            state = module.__dict__.get("_gyroquant_attention")
            if state is not None:
                self._states[module.layer_idx] = state  # type: ignore[index]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *before: Tensor
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        pairs = zip(before[::2], before[1::2], self._states, strict=True)
        cache.layers = [_CachedLayer(keys, values, state) for keys, values, state in pairs]
        out = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


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


def _stateful(model: Any, kv_heads: int, head_dim: int) -> Any:
    """The graph with keys and values as its state, as in built graphs, instead of as inputs and results."""
    inputs, results = model.get_parameters(), model.get_results()
    for parameter, name in zip(inputs, _INPUTS, strict=False):
        parameter.set_partial_shape(PartialShape([-1, -1]))
        parameter.set_element_type(Type.i64)
        named(parameter, name)
    beams = named(opset13.parameter(PartialShape([-1]), np.int32), "beam_idx")
    sinks, variables = [], []
    for i, (parameter, result) in enumerate(zip(inputs[len(_INPUTS) :], results[1:], strict=True)):
        name = f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}"
        past, variable = remembered(name, inputs[0], beams, kv_heads, head_dim)
        variables.append(variable)
        for reader in list(parameter.output(0).get_target_inputs()):
            reader.replace_source_output(past.output(0))
        sinks.append(opset13.assign(result.input(0).get_source_output().get_node(), variable))
    results[0].output(0).get_tensor().set_names({"logits"})
    stateful = ov.Model([results[0]], sinks, [*inputs[: len(_INPUTS)], beams], variables, "gyroquant")
    stateful.validate_nodes_and_infer_types()
    return stateful
