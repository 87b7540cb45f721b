"""The arguments that blocks take besides hidden states, for many sequences.

Most are the same for all sequences: masks and positions. Others are not, and are kept for every sequence:

- arguments that depend on the tokens, such as an embedding for each block (Gemma 3n, Gemma 4);
- what blocks put into a mapping that later blocks read: keys and values that blocks share (Gemma 3n, Gemma 4);
- what a block returns besides its hidden states and the next block takes: the choices of an indexer (GLM-5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.execution.runner import Call, Place, Places, with_arguments

Key = tuple[str, Place, Any, int]
"""A kept tensor: the stream, the place of the argument, the key in the mapping, the number in the tuple there."""


class BlockArguments:
    """The arguments of the blocks of a model for some sequences.

    `count` is the number of sequences; `passed` are the places of arguments that the block before returns.
    """

    def __init__(self, count: int, passed: Mapping[int, Place]):
        self.count, self.passed = count, passed
        self.calls: dict[int, list[Call]] = {}
        self._varying: list[dict[Place, Tensor]] = []
        self._kept: dict[Key, Tensor] = {}

    def add(self, start: int, sequences: int, calls: list[Call]) -> None:
        """Adds the arguments for `sequences` sequences from number `start` on."""
        self.calls.setdefault(sequences, calls)
        for kept, call in zip(self._varying, calls, strict=True):
            given = dict(_places(call))
            for place in kept:
                value = given[place]
                if kept[place].numel() == 0:
                    kept[place] = torch.empty((self.count, *value.shape[1:]), dtype=value.dtype)
                kept[place][start : start + sequences] = value

    def compare(self, calls: list[Call], others: list[Call]) -> None:
        """Finds the arguments that depend on the tokens, from calls with different tokens."""
        self._varying = [varying(call, other) for call, other in zip(calls, others, strict=True)]
        for kept in self._varying[1:]:
            for place in self.passed.values():
                kept.pop(place, None)

    def call(self, index: int, sequences: Sequence[int], stream: str = "") -> Call:
        """The arguments of a block for some sequences. Each stream of hidden states has its own."""
        rest, named = self.calls[len(sequences)][index]
        device = next((v.device for v in (*rest, *named.values()) if isinstance(v, Tensor)), None)
        chosen: Places = {place: value[list(sequences)].to(device) for place, value in self._varying[index].items()}
        for place, value in _places((rest, named)):
            if _is_container(value):
                chosen[place] = type(value)(self._contents(stream, place, sequences, device))
            elif index > 0 and (stream, place, None, 0) in self._kept:
                chosen[place] = self._kept[stream, place, None, 0][list(sequences)].to(device)
        return with_arguments((rest, named), chosen)

    def separate(self, index: int) -> bool:
        """Whether a block takes nothing from other blocks but hidden states, and gives them nothing else."""
        call = next(iter(self.calls.values()))[index]
        return not self.passed and not any(isinstance(value, MutableMapping) for _, value in _places(call))

    def _contents(self, stream: str, place: Place, sequences: Sequence[int], device: Any) -> dict[Any, Any]:
        parts: dict[Any, list[Tensor]] = {}
        for (owner, where, key, _), value in sorted(self._kept.items(), key=lambda item: item[0][3]):
            if (owner, where) == (stream, place):
                parts.setdefault(key, []).append(value[list(sequences)].to(device))
        return {key: tuple(values) for key, values in parts.items()}

    def after(self, index: int, sequences: Sequence[int], call: Call, more: Sequence[Any], stream: str = "") -> None:
        """Keeps what block `index` put into the mappings of its call, and what it returned besides hidden states."""
        given = dict(_places(self.calls[len(sequences)][index]))
        for place, value in _places(call):
            if _is_container(given[place]):
                for key, tensors in value.items():
                    for number, tensor in enumerate(tensors if isinstance(tensors, tuple) else (tensors,)):
                        self._put((stream, place, key, number), sequences, tensor)
        for number, place in self.passed.items():
            if number < len(more) and isinstance(more[number], Tensor):
                self._put((stream, place, None, 0), sequences, more[number])

    def _put(self, key: Key, sequences: Sequence[int], value: Tensor) -> None:
        if key not in self._kept:
            self._kept[key] = torch.empty((self.count, *value.shape[1:]), dtype=value.dtype)
        self._kept[key][list(sequences)] = value.detach().to(self._kept[key].device)

    @property
    def states(self) -> list[Tensor]:
        """What a run must keep to continue later."""
        return [self._kept[key] for key in sorted(self._kept, key=repr)]

    @property
    def layout(self) -> list[Any]:
        """The keys, shapes and dtypes of `states`, as data."""
        keys = sorted(self._kept, key=repr)
        return [[list(k), list(self._kept[k].shape), str(self._kept[k].dtype).removeprefix("torch.")] for k in keys]

    def allocate(self, layout: Sequence[Any]) -> None:
        """Makes room for the tensors of a `layout`, which are then filled through `states`."""
        for key, shape, dtype in layout:
            self._kept[tuple(key)] = torch.empty(shape, dtype=getattr(torch, dtype))


def _places(call: Call) -> Iterator[tuple[Place, Any]]:
    yield from enumerate(call[0])
    yield from call[1].items()


def _is_container(value: object) -> bool:
    """Whether an argument is a mapping that blocks fill: it is empty before the first block."""
    return isinstance(value, MutableMapping) and not value


def varying(call: Call, other: Call) -> dict[Place, Tensor]:
    """The arguments of a block that depend on the tokens: those that differ in two calls with different tokens.

    Values are empty tensors. Raises UnsupportedModelError if such an argument is not a tensor with one entry for each
    sequence.
    """
    found: dict[Place, Tensor] = {}
    others = dict(_places(other))
    for place, first in _places(call):
        if _equal(first, others[place]):
            continue
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                f"the argument {place} of a block depends on the tokens and is a {type(first).__name__}, which is not "
                "supported"
            )
        found[place] = torch.empty(0)
    return found


def _equal(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return isinstance(first, Tensor) == isinstance(second, Tensor)  # other objects are settings
