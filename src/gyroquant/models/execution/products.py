"""Products with parameters that no module of their own multiplies, such as experts that a module keeps in one tensor.

`ParameterProducts` follows parameters through casts, transposes and selections, and sees each product before and after
it is computed. `intercept` uses it to run maps, rounding and observers at the inputs of such parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class View:
    """A parameter as an operation sees it: perhaps one expert of it, perhaps transposed, perhaps only a part."""

    param: str
    expert: int | None = None
    transposed: bool = False
    whole: bool = True


_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_TRANSPOSES = {torch.t, Tensor.t, torch.transpose, Tensor.transpose, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
_CASTS = {Tensor.to, Tensor.float, Tensor.type_as, Tensor.contiguous, Tensor.type, Tensor.double, Tensor.detach}
_SELECTS = {Tensor.__getitem__, Tensor.select, torch.select}


class ParameterProducts(TorchFunctionMode):
    """Calls `before` and `after` for each product ``x @ weight`` or ``x @ weight.T`` with a followed parameter.

    `params` are the names of parameters by the `id` of their tensors.
    """

    def __init__(self, params: Mapping[int, str]):
        super().__init__()
        self.views: dict[int, View] = {key: View(name) for key, name in params.items()}
        self.alive: list[Any] = []

    def before(self, x: Tensor, view: View) -> Tensor:
        """The input to use in place of x."""
        return x

    def after(self, x: Tensor, view: View, out: Tensor, transposed: bool) -> None:
        """Sees a product. `transposed`: ``x @ weight``, in terms of the stored parameter."""

    def other(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Sees every other function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place, weight, transposed = _operands(func, args, kwargs)
        view = self.view(weight)
        if view is None or not isinstance(args[place], Tensor):
            out = func(*args, **kwargs)
            self._follow(func, args, kwargs, out)
            return out
        x = self.before(args[place], view)
        out = func(*args[:place], x, *args[place + 1 :], **kwargs)
        self.after(x, view, out, transposed ^ view.transposed)
        return out

    def view(self, value: Any) -> View | None:
        return self.views.get(id(value)) if isinstance(value, Tensor) else None

    def _keep(self, tensor: Any, view: View) -> None:
        if isinstance(tensor, Tensor):
            self.alive.append(tensor)  # an id names a tensor only while the tensor lives
            self.views[id(tensor)] = view

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        view = self.view(args[0]) if args else None
        if view is None:
            self.other(func, args, kwargs, out)
        elif isinstance(out, (tuple, list)):
            for part in out:
                self._keep(part, View(view.param, whole=False))
        elif isinstance(out, Tensor):
            self._derived(func, args, view, out)

    def _derived(self, func: Any, args: Any, view: View, out: Tensor) -> None:
        if func in _CASTS:
            self._keep(out, view)
        elif func in _TRANSPOSES:
            swapped = func not in (torch.transpose, Tensor.transpose) or out.shape[-2:] != args[0].shape[-2:]
            self._keep(out, View(view.param, view.expert, view.transposed ^ swapped, view.whole))
        elif func in _SELECTS and len(args) > 1 and args[0].dim() == 3 and out.dim() == 2:
            index = args[1] if func is Tensor.__getitem__ else args[2]
            number = int(index) if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0) else None
            self._keep(out, View(view.param, number, view.transposed, view.whole and number is not None))
        elif out.dim() > 1:
            self._keep(out, View(view.param, view.expert, view.transposed, whole=False))


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[int, Any, bool]:
    """For a product: the place of its input among the arguments, its weight, and whether it is ``x @ weight``."""
    if func is nn.functional.linear and args:
        return 0, args[1] if len(args) > 1 else kwargs.get("weight"), False
    if func in (torch.addmm, Tensor.addmm) and len(args) > 2:
        return 1, args[2], True
    if func in _MATMULS and len(args) > 1:
        return 0, args[1], True
    return 0, None, False


@dataclass
class ParameterState:
    """What runs at the input of one parameter: the map, then the rounding, then the observers.

    An observer is a function of the expert and of its input, shape (tokens, features).
    """

    map: Callable[[Tensor], Tensor] | None = None
    quantizer: Callable[[Tensor], Tensor] | None = None
    observers: list[Callable[[int, Tensor], None]] | None = None


class _Intercepted(ParameterProducts):
    def __init__(self, params: Mapping[int, str], states: Mapping[str, ParameterState]):
        super().__init__(params)
        self.states = states

    def before(self, x: Tensor, view: View) -> Tensor:
        state = self.states[view.param]
        if state.map is not None:
            x = state.map(x)
        if state.quantizer is not None:
            x = state.quantizer(x)
        experts = enumerate(x) if view.expert is None and x.dim() == 3 else [(view.expert or 0, x)]
        for expert, rows in experts:
            for observe in state.observers or ():
                observe(expert, rows.reshape(-1, rows.shape[-1]))
        return x


class _Running:
    """Hooks that follow a module's parameters while the module runs. A class, so that models can be copied."""

    def __init__(self, states: dict[str, ParameterState]):
        self.states = states
        self.modes: list[_Intercepted] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        params = {id(tensor): name for name in self.states if (tensor := module._parameters[name]) is not None}
        self.modes.append(_Intercepted(params, self.states))
        self.modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


def intercept(module: nn.Module, name: str) -> tuple[ParameterState, Callable[[], None]]:
    """The state of a parameter of a module, by the parameter's name there, and a function that removes it if unused."""
    if "_gyroquant_running" not in module.__dict__:
        running = _Running({})
        hooks = [
            module.register_forward_pre_hook(running.enter),
            module.register_forward_hook(running.leave, always_call=True),
        ]
        module.__dict__["_gyroquant_running"] = (running, hooks)
    running, hooks = module.__dict__["_gyroquant_running"]
    state = running.states.setdefault(name, ParameterState())

    def release() -> None:
        if state.map is None and state.quantizer is None and not state.observers:
            running.states.pop(name, None)
        if not running.states and module.__dict__.pop("_gyroquant_running", None) is not None:
            for hook in hooks:
                hook.remove()

    return state, release
