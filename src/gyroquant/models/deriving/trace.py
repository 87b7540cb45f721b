"""One pass through a tiny model, forward and backward, that records what each parameter meets.

Recorded are every product with a parameter (its inputs and outputs), every table of vectors, every norm, every call of
attention, and every sum of the width of the residual stream. The backward pass adds the gradients of all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gyroquant.models.execution.products import ParameterProducts, View

_TRACE = "gyroquant_trace"


@dataclass(eq=False)
class Product:
    """One multiplication by a matrix: `y = x @ weight.T`, or `x @ weight` if `transposed`."""

    view: View
    x: Tensor
    y: Tensor
    transposed: bool

    @property
    def grad(self) -> Tensor | None:
        """The gradient of y, as rows."""
        return None if self.y.grad is None else self.y.grad.reshape(-1, self.y.shape[-1])

    @property
    def rows(self) -> Tensor:
        return self.x.detach().reshape(-1, self.x.shape[-1])


@dataclass(eq=False)
class NormCall:
    """One call of a norm module."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass(eq=False)
class AttentionCall:
    """One call of the attention function: the module's name; queries, keys and values (batch, heads, length, size)."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass
class Trace:
    """What one pass recorded, in order.

    - tables: the outputs of embeddings, by the name of the parameter.
    - called: the names of the modules that ran.
    - sums: each sum with its two terms.
    - inputs, outputs: of each block, in order.
    - returns: the length of the tuple that a block returns, or 0.
    - passed: the arguments that a block takes from what the one before returned, by the number of the result.
    - results: what the last block returned besides its hidden states.
    - vectors: the gradients of parameters that are vectors, by name.
    """

    products: list[Product] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    tables: list[tuple[str, Tensor]] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    sums: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    returns: int = 0
    passed: dict[int, str | int] = field(default_factory=dict)
    results: tuple[Any, ...] = ()


_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_}


class _Recorder(ParameterProducts):
    """Records products with parameters, look-ups in tables, and sums of the width of the residual stream."""

    def __init__(self, trace: Trace, params: dict[int, str], width: int):
        super().__init__(params)
        self.trace, self.width = trace, width

    def _retain(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.retain_grad()
        self.alive.append(tensor)
        return tensor

    def after(self, x: Tensor, view: View, out: Tensor, transposed: bool) -> None:
        self._retain(x)
        self.trace.products.append(Product(view, x, self._retain(out), transposed))

    def other(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        if func is nn.functional.embedding:
            view = self.view(args[1] if len(args) > 1 else kwargs["weight"])
            if view is not None:
                self.trace.tables.append((view.param, self._retain(out)))
        elif func in _ADDS and out.dim() > 1 and out.shape[-1] == self.width and out.is_floating_point():
            terms = [self._retain(a) if isinstance(a, Tensor) else out for a in args[:2]]
            self.trace.sums.append((self._retain(out), terms[0], terms[-1]))


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and not list(module.children()) and all(p.dim() == 1 for p in own)


@contextmanager
def _hooked(model: nn.Module, blocks: nn.ModuleList, trace: Trace) -> Iterator[None]:
    hooks = []

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                for tensor in (args[0], out):
                    if tensor.requires_grad and not tensor.is_leaf:
                        tensor.retain_grad()
                trace.norms.append(NormCall(name, module, args[0], out))

        return hook

    def block_hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = out[0] if isinstance(out, (tuple, list)) else out
        trace.returns = len(out) if isinstance(out, (tuple, list)) else 0
        rest = args[1:] if args else ()
        named = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        for number, result in enumerate(trace.results):
            for place, value in (*enumerate(rest), *named.items()):
                if isinstance(result, Tensor) and value is result:
                    trace.passed[number] = place
        trace.results = tuple(out[1:]) if isinstance(out, (tuple, list)) else ()
        for kept, tensor in ((trace.inputs, given), (trace.outputs, made)):
            tensor.retain_grad()
            kept.append(tensor)

    hooks += [block.register_forward_hook(block_hook, with_kwargs=True) for block in blocks]
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: trace.called.add(name)))
        if _is_norm(module):
            hooks.append(module.register_forward_hook(norm_hook(name)))
    names = {id(module): name for name, module in model.named_modules()}

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        inner = inner or ALL_ATTENTION_FUNCTIONS["sdpa"]
        result = inner(module, query, key, value, *args, **kwargs)
        for tensor in (query, key, value, result[0]):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.retain_grad()
        trace.attention.append(AttentionCall(names.get(id(module), ""), query, key, value, result[0]))
        return result

    ALL_ATTENTION_FUNCTIONS.register(_TRACE, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_TRACE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    routed: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [(c, getattr(c, "_attn_implementation_internal", None)) for c in routed]
    experts = [(c, getattr(c, "_experts_implementation_internal", None)) for c in routed]
    try:
        for config in routed:
            config._attn_implementation_internal = _TRACE
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, value in before:
            config._attn_implementation_internal = value
        for config, value in experts:
            config._experts_implementation_internal = value
        for hook in hooks:
            hook.remove()


def trace_model(model: Any, blocks: nn.ModuleList, ids: Tensor, width: int) -> Trace:
    """Runs a model forward and backward on token ids and returns the trace. `width` is that of the residual stream."""
    trace = Trace()
    params = {id(parameter): name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    with torch.enable_grad(), _hooked(model, blocks, trace):
        with _Recorder(trace, params, width) as recorder:
            logits = model(input_ids=ids, use_cache=False).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
        (logits.float() * weights).sum().backward(retain_graph=True)
        recorder.views.clear()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and parameter.grad is not None:
            trace.vectors[name] = parameter.grad
        parameter.grad = None
    return trace
