"""Outputs of layers, kept while a block runs again and again on the same text.

Where layers are observed in turn, a block runs once for each turn, and all runs compute the same up to the layers that
are rounded next. With outputs kept, every product is computed once, and a module such as an attention is left out as
soon as all its layers are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, equal

from gyroquant.models.graph.model_graph import LinearOp

_SAMPLED = 64  # one in so many inputs of a layer is kept, to see whether they are the same again
_INPUT = "hidden_states"


class KeptOutputs:
    """The outputs of modules of one block, for every batch of the original model and of the rounded one.

    A module is computed anew unless all its layers are in `final` for the model that runs: then neither their weights
    nor their inputs change any more. Should the inputs change nevertheless, it is computed anew too: some are compared.

    - final: modules of layers by the model, "original" or "".
    - changed: parameters with other numbers than when outputs were kept. Modules that hold one are computed anew.
    - storing: by the same, whether outputs that are not there yet are kept. Off for the last run: nothing follows it.
    """

    def __init__(self) -> None:
        self.final: dict[str, Collection[str]] = {}
        self.changed: Collection[str] = ()
        self.storing: dict[str, bool] = {}
        self._place: tuple[str, int] | None = None
        self._kept: dict[tuple[str, str, int], tuple[Tensor, Any]] = {}

    @contextmanager
    def running(self, stream: str, start: int) -> Iterator[None]:
        """Names what runs in a with block: the model, and its batch by the number of the first sequence."""
        self._place = stream, start
        try:
            yield
        finally:
            self._place = None

    @contextmanager
    def attached(self, model: Any, modules: Mapping[str, Collection[str]]) -> Iterator[None]:
        """Puts kept outputs in place of modules for the duration of a with block.

        `modules` has the layers in each module, those of `modules_to_keep`.
        """
        found = {name: model.get_submodule(name) for name in modules}
        for name, module in found.items():
            module.forward = partial(self._forward, name, modules[name], module.forward)
        try:
            yield
        finally:
            for module in found.values():
                del module.forward

    def _forward(self, name: str, inner: Collection[str], compute: Callable[..., Any], *args: Any, **named: Any) -> Any:
        x = args[0] if args else named.get(_INPUT)
        if self._place is None or not isinstance(x, Tensor) or not self._is_final(name, inner, self._place[0]):
            return compute(*args, **named)
        key = (name, *self._place)
        rows = x.reshape(-1, x.shape[-1])
        sample = rows[(len(rows) - 1) % _SAMPLED :: _SAMPLED]
        seen, out = self._kept.get(key, (None, None))
        if seen is None or not equal(seen, sample):
            out = compute(*args, **named)
            if not self.storing.get(self._place[0]):
                return out
            self._kept[key] = sample.clone(), out
        return _copy(out)  # blocks may add to it in place

    def _is_final(self, name: str, inner: Collection[str], stream: str) -> bool:
        same = not any(parameter.startswith(f"{name}.") for parameter in self.changed)
        return same and {*inner} <= {*self.final.get(stream, ())}


def _copy(out: Any) -> Any:
    return tuple(map(_copy, out)) if isinstance(out, tuple) else out.clone() if isinstance(out, Tensor) else out


def modules_to_keep(block: str, layers: Iterable[LinearOp], whole: bool) -> dict[str, set[str]]:
    """The modules of a block whose outputs can stand for them, with the layers in each.

    They are layers that are modules of their own and return one product. With `whole`, they are also the modules
    directly in the block that have no other layers; then a block must give nothing to others but its hidden states.
    """
    kept = {op.module: {op.module} for op in layers if can_be_kept(op)}
    found = dict(kept)
    for op in layers if whole else ():
        child = op.module.removeprefix(f"{block}.").partition(".")[0]
        found.setdefault(f"{block}.{child}", set()).add(op.module)
    return {name: inner for name, inner in found.items() if inner <= kept.keys()}


def can_be_kept(op: LinearOp) -> bool:
    """Whether a layer is a module of its own that returns its product. Routers return more."""
    return op.entry.quantize and not (op.entry.stacked or op.entry.intercepted)


def kept_features(parts: Sequence[Collection[LinearOp]], hidden: int) -> int:
    """How many numbers are kept for each token of a block whose layers are observed in these parts.

    The original keeps what two later turns need, the rounded model also what its last run needs. Modules around layers
    count as two more outputs of `hidden` numbers.
    """
    sizes = [sum(op.out_features for op in part if can_be_kept(op)) for part in parts]
    return sum(sizes[:-2]) + sum(sizes[:-1]) + 2 * hidden


__all__ = ["KeptOutputs", "can_be_kept", "kept_features", "modules_to_keep"]
