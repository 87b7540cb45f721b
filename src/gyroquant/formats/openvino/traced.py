"""A decoder as an OpenVINO graph, traced from transformers' own code, for architectures that `Decoder` cannot build.

The inside of replaced modules (`Replaced`) is not traced: each is one operation of ours in the trace, and OpenVINO's
frontend replaces it by a piece of graph. Online maps are traced as they run. The graph keeps keys and values as its
state, and has the same inputs and outputs as built graphs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from gyroquant.formats.openvino.operations import named, remembered
from gyroquant.formats.openvino.traceable import CachedSizes, cached_sizes
from gyroquant.models.execution.online import AttentionState, mark_ready

_OPERATION = "GyroquantPiece"
_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Sizes of the example. They differ, and none is 1, because transformers treats 1 differently.
_BATCH, _PAST, _NEW = 2, 3, 4
_MASKS = ("sdpa", "gyroquant_sdpa")
_MASKED = -65504.0  # added to masked scores: the lowest number of fp16


class Replaced:
    """The modules that the trace replaces by one operation each, and what each operation becomes in the graph."""

    def __init__(self) -> None:
        self.extensions: dict[nn.Module, ModuleExtension] = {}
        self._stand_ins: dict[nn.Module, Callable[..., Tensor]] = {}
        self._pieces: list[Callable[[Any], Any]] = []

    def add(self, module: nn.Module, stand_in: Callable[[Tensor], Tensor], piece: Callable[[Any], Any]) -> None:
        """Replaces a module. `stand_in` gives an output of the right shape, whatever its values, for the trace. `piece`
        takes the module's input as a node, and returns its output as a node.
        """
        number = len(self._pieces)

        def evaluate(_: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
            return stand_in(x)

        def convert(_: nn.Module, operation: Any, x: Tensor) -> Any:
            return operation(x, torch.tensor(number))

        self.extensions[module] = ModuleExtension(module, _OPERATION, evaluate, convert)
        self._stand_ins[module] = stand_in
        self._pieces.append(piece)

    def converted(self, context: Any) -> Any:
        """The outputs of the piece of graph for one of our operations."""
        return self._pieces[int(context.get_values_from_const_input(1))](context.get_input(0)).outputs()

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within a with block, replaced modules compute nothing: they return outputs of the right shape."""
        for module, stand_in in self._stand_ins.items():
            module.forward = partial(stand_in)
        try:
            yield
        finally:
            for module in self._stand_ins:
                del module.forward


def traced(model: Any, replaced: Replaced) -> Any:
    """The graph of a model in which all parameters have values, except those of replaced modules.

    Raises UnsupportedModelError if its cache has more than keys and values.
    """
    with replaced.standing_in():
        layers = cached_sizes(model)
    with_cache = _FlatCache(model, layers)
    # The steps of `ov.convert_model`, without its second trace, its preprocessing and its telemetry.
    with torch.no_grad(), warnings.catch_warnings(), _finite_masks():
        for kind in (TracerWarning, FutureWarning):  # tests cover the traced graph; OpenVINO reads every attribute
            warnings.simplefilter("ignore", kind)
        decoder = TorchScriptPythonDecoder(
            with_cache,
            example_input=_example(layers),
            module_extensions=replaced.extensions,
            trace_kwargs={"check_trace": False},
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        frontend.add_extension(ConversionExtension(_OPERATION, replaced.converted))
        graph = _stateful(frontend.convert(frontend.load(decoder)), layers)
    apply_moc_transformations(graph, cf=False)
    return graph


def _example(layers: Sequence[CachedSizes]) -> tuple[Tensor, ...]:
    """The inputs on which a model is traced: two texts, with some tokens already in the cache."""
    length = _PAST + _NEW
    return (
        torch.zeros(_BATCH, _NEW, dtype=torch.long),
        torch.ones(_BATCH, length, dtype=torch.long),
        torch.arange(_PAST, length).repeat(_BATCH, 1),
        *(torch.zeros(_BATCH, heads, _PAST, width) for sizes in layers for heads, width in sizes),
    )


@contextmanager
def _finite_masks() -> Iterator[None]:
    """Within a with block, masks of attention are numbers that are added to scores. A row of padding then attends to
    all tokens alike. With masks of true and false, OpenVINO computes NaN for it in some architectures.
    """

    def added(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
        return mask if mask is None else torch.where(mask, torch.tensor(0.0), torch.tensor(_MASKED))

    before = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in _MASKS}
    for name in _MASKS:
        ALL_MASK_ATTENTION_FUNCTIONS[name] = added
    try:
        yield
    finally:
        for name, function in before.items():
            ALL_MASK_ATTENTION_FUNCTIONS[name] = function


class _CachedLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, length, width). They are set at the start: if they were joined to
    the empty ones with which transformers starts, they would lose their rank. Keys are stored rotated (R3).
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

    def __init__(self, model: nn.Module, layers: Sequence[CachedSizes]):
        super().__init__()
        self.decoder, self._layers = model, layers
        self._has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._states: list[AttentionState | None] = [None] * len(layers)
        for module in model.modules():
            state = module.__dict__.get("_gyroquant_attention")
            if state is not None:
                self._states[module.layer_idx] = state  # type: ignore[index]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *before: Tensor
    ) -> tuple[Tensor, ...]:
        cache, pairs = DynamicCache(), zip(before[::2], before[1::2], strict=True)
        cache.layers = [
            _CachedLayer(*next(pairs), state) if sizes else DummyLayer()
            for sizes, state in zip(self._layers, self._states, strict=True)
        ]
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache}
        if self._has_positions:
            arguments["position_ids"] = position_ids
        out = self.decoder(**arguments, use_cache=True)
        kept = [layer for layer in cache.layers if isinstance(layer, _CachedLayer)]
        return (out.logits, *(tensor for layer in kept for tensor in (layer.keys, layer.values)))


def _stateful(model: Any, layers: Sequence[CachedSizes]) -> Any:
    """The graph with keys and values as its state, as in built graphs, instead of as inputs and results."""
    inputs, results = model.get_parameters(), model.get_results()
    for parameter, name in zip(inputs, _INPUTS, strict=False):
        parameter.set_partial_shape(PartialShape([-1, -1]))
        parameter.set_element_type(Type.i64)
        named(parameter, name)
    beams = named(opset13.parameter(PartialShape([-1]), np.int32), "beam_idx")
    states = [
        (f"past_key_values.{i}.{kind}", *size)
        for i, sizes in enumerate(layers)
        for kind, size in zip(("key", "value"), sizes, strict=False)
    ]
    sinks, variables = [], []
    for state, parameter, result in zip(states, inputs[len(_INPUTS) :], results[1:], strict=True):
        name, heads, width = state
        past, variable = remembered(name, inputs[0], beams, heads, width)
        variables.append(variable)
        for reader in list(parameter.output(0).get_target_inputs()):
            reader.replace_source_output(past.output(0))
        sinks.append(opset13.assign(result.input(0).get_source_output().get_node(), variable))
    results[0].output(0).get_tensor().set_names({"logits"})
    stateful = ov.Model([results[0]], sinks, [*inputs[: len(_INPUTS)], beams], variables, "gyroquant")
    stateful.validate_nodes_and_infer_types()
    return stateful
