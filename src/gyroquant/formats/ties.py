"""Models whose head stays tied to the embedding under a fused R1 (`keep_ties`), for formats that run no online maps.

Such a model turns the residual stream back before its last norm and turns it again after the norm. Both maps B and A
and the gain g of the norm can be multiplied into a head of its own instead. With the normalized stream n and the shared
matrix E, the logits are

    (n B * g) A E^T = n H^T,  H = ((E A^T) * g) B^T

This holds because a norm commutes with the orthogonal map B. The head H lies on no grid, so it is stored in 16 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.execution.online import OnlineMap, OnlineOp
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.graph.spec import Architecture, Linear, Norm
from gyroquant.models.stores.base import untie
from gyroquant.models.stores.packed import PackedStore

_ROWS = 4096  # rows of a head that are computed at once


def tie_points(online: Iterable[OnlineOp], architecture: Architecture | None) -> tuple[HookPoint, ...]:
    """Where maps run that keep a head tied: before the last norm and before the head. Empty if there are none.

    Nothing else makes a map run before the last norm.
    """
    maps = [op for op in online if isinstance(op, OnlineMap) and op.hook_point.point == "input"]
    norms = {op.module for op in maps} & set(modules_around(architecture, (Norm,)))
    names = norms and {*norms, *modules_around(architecture, (Linear,))}
    return tuple(op.hook_point for op in maps if op.module in names)


def modules_around(architecture: Architecture | None, kinds: tuple[type, ...]) -> list[str]:
    """The modules around the blocks of an architecture that are of certain kinds."""
    outer = () if architecture is None else architecture.outer
    groups = [group for part in outer for group in (part if isinstance(part, tuple) else ((part,),))]
    return [entry.name for group in groups for entry in group if isinstance(entry, kinds)]


def runs_at(op: OnlineOp, points: Collection[HookPoint]) -> bool:
    """Whether an online operation is a map at one of these hook points."""
    return isinstance(op, OnlineMap) and op.hook_point in points


def without_ties(store: PackedStore, points: tuple[HookPoint, ...]) -> PackedStore:
    """The same model with a head of its own if there are `tie_points`, else the store itself."""
    return UntiedStore(store, points) if points else store


class UntiedStore(PackedStore):
    """A saved model with a tied head, as one with a head of its own and without the maps that keep the tie."""

    def __init__(self, tied: PackedStore, points: tuple[HookPoint, ...]):
        """`points` are the `tie_points` of `tied`. Raises InputError if their maps cannot be multiplied into a head."""
        maps = [op for op in tied.online if isinstance(op, OnlineMap) and op.hook_point in points]
        self._tied, self._maps = tied, {op.module: op.map for op in maps}
        self.norm = next(norm for norm in tied.graph.outer.norms if norm.module in self._maps)
        self.head = next(op for op in tied.graph.outer.linears if op.module in self._maps)
        if not self._maps[self.norm.module].orthogonal:
            raise InputError(
                f"the map before {self.norm.module} is not orthogonal, so the head cannot be untied; quantize the "
                "model again with keep_ties=false"
            )
        super().__init__(tied.folder)
        self.read_one = tied.read_one

    def _index(self) -> dict[str, Any]:
        untie(self.config)
        norm, head, shapes = self.norm, self.head, self._tied.shapes
        computed = {alias: self._copy(alias) for alias in self._tied.tied}
        computed |= {head.weight: lambda: self._matrix[0], norm.gain: self._gain}
        if norm.bias is not None:
            computed[norm.bias] = self._bias
        stored = {name: self._tied.tied.get(name, name) for name in computed}
        return {**super()._index(), **{name: _Computed(shapes[stored[name]], make) for name, make in computed.items()}}

    @cached_property
    def online(self) -> tuple[OnlineOp, ...]:  # type: ignore[override]
        return tuple(op for op in super().online if op.module not in self._maps)

    def facts(self) -> dict[str, Any]:
        """What untying did, for the manifest: the head, its bytes, and its largest deviation."""
        head, deviation = self._matrix
        size = head.numel() * head.itemsize
        return {"untied": f"{self.head.weight} in {8 * head.itemsize} bits, {size} bytes", "deviation": deviation}

    @cached_property
    def _matrix(self) -> tuple[Tensor, float]:
        """The head in fp16, or in fp32 if fp16 cannot hold it, and its largest error relative to its largest weight."""
        table, gain = self._read(self.head.weight), self._original_gain()
        back, again = (self._maps[module].inverse().contragredient() for module in (self.norm.module, self.head.module))
        for dtype in (torch.float16, torch.float32):
            head, largest, error = torch.empty(table.shape, dtype=dtype), 0.0, 0.0
            for part, written in zip(table.split(_ROWS), head.split(_ROWS), strict=True):
                exact = back.apply(again.apply(part.double()) * gain)
                written.copy_(exact)
                largest = max(largest, float(exact.abs().max()))
                error = max(error, float((written.double() - exact).abs().max()))
            if bool(head.isfinite().all()):
                break
        return head, error / max(largest, 1e-30)

    def _original_gain(self) -> Tensor:
        return self._read(self.norm.gain).double() + self.norm.entry.offset

    def _gain(self) -> Tensor:
        return torch.full_like(self._read(self.norm.gain), 1.0 - self.norm.entry.offset)

    def _bias(self) -> Tensor:
        assert self.norm.bias is not None
        bias, gain = self._read(self.norm.bias), self._original_gain()
        if bool(((gain == 0) & (bias != 0)).any()):
            raise InputError(
                f"{self.norm.module} has a channel with gain 0 and a bias, so the head cannot be untied; quantize the "
                "model again with keep_ties=false"
            )
        divided = torch.where(gain == 0, bias.double(), bias.double() / gain)
        return self._maps[self.norm.module].inverse().apply(divided).float()

    def _copy(self, alias: str) -> Any:
        return lambda: self._read(alias)

    def _read(self, name: str) -> Tensor:
        stored = self._tied.tied.get(name, name)
        return self._tied.read([stored])[stored]


class _Computed:
    """A parameter among the tensors of a folder that is computed when it is read."""

    def __init__(self, shape: tuple[int, ...], compute: Any):
        self.shape, self._compute = shape, compute

    def __getitem__(self, _: Any) -> Tensor:
        value: Tensor = self._compute()
        return value
