"""Observers: they collect small statistics of the inputs of linear layers while a block runs, never the inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gyroquant.maps import hadamard, next_power_of_two
from gyroquant.models.execution.online import InputQuantizer, OnlineMap, OnlineOp, fake, route_experts
from gyroquant.models.execution.products import intercept
from gyroquant.models.execution.runner import BlockDoneError
from gyroquant.models.execution.switches import no_fake_quant
from gyroquant.models.graph.model_graph import Group, LinearOp
from gyroquant.models.graph.sites import hook_point
from gyroquant.registry import Registry

Key = tuple[str, int | None]
"""An observed input: its name, and the number of the expert for stacked experts."""

_STRIPES = 4
_STRIP = 1024
_SAMPLE = 512


class Observer(ABC):
    """Collects one statistic of vectors of n numbers. It is called with batches of them, shape (tokens, n).

    Methods refer to observers by class (`Method.statistics`). Subclasses register themselves under their class name, so
    that `gyroquant.testing` finds them.
    """

    registry: ClassVar[Registry[type[Observer]]] = Registry("observer", "gyroquant.calibration")

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if not abstract:  # base classes of observers are not for use
            Observer.registry.add(cls.__name__, cls)

    @classmethod
    def examples(cls, n: int = 256) -> list[Self]:
        """Observers of vectors of n numbers, for tests."""
        return [cls(n)]  # type: ignore[call-arg]

    @abstractmethod
    def __call__(self, x: Tensor) -> None:
        """Adds vectors, shape (tokens, n), to the statistic."""

    @staticmethod
    @abstractmethod
    def size_in_bytes(n: int) -> int:
        """The memory of an observer of vectors of n numbers, in bytes. It is checked before a run starts."""


class SecondMoments(Observer):
    """Sum of ``x^T x`` over tokens, shape (n, n), fp32."""

    input_error_cross: Tensor | None = None

    def __init__(self, n: int):
        self.lower = torch.zeros(n, n)
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        x = x.float()
        self.lower = self.lower.to(x.device)
        self.count += x.shape[0]
        _add_square(self.lower, x)

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 4 * n * n

    @property
    def second_moments(self) -> Tensor:
        """The sum so far."""
        return _symmetric(self.lower)

    @property
    def input_error_second_moments(self) -> Tensor | None:
        """None. `PairedSecondMoments` has them."""
        return None


def _add_square(lower: Tensor, x: Tensor) -> None:
    """Adds ``x^T x`` to a matrix, only on and below the diagonal stripes: five eighths of the work."""
    n = len(lower)
    for stripe in range(_STRIPES):
        start, stop = n * stripe // _STRIPES, n * (stripe + 1) // _STRIPES
        lower[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def _symmetric(lower: Tensor) -> Tensor:
    """Fills the upper triangle of a matrix in place from the lower one. `_add_square` does not read it."""
    for start in range(0, len(lower), _STRIP):
        rows = lower[start : start + _STRIP, : start + _STRIP]
        square = rows[:, start:]
        square.copy_(square.tril() + square.tril(-1).T)
        lower[:start, start : start + _STRIP] = rows[:, :start].T
    return lower


class MeanAbs(Observer):
    """Mean magnitude of every channel, shape (n,): the mean l1 mass of MassDiff (arXiv 2601.22347)."""

    def __init__(self, n: int):
        self._sum = torch.zeros(n, dtype=torch.float64)
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        self._sum += self._of(x.float()).sum(0, dtype=torch.float64).cpu()
        self.count += x.shape[0]

    def _of(self, x: Tensor) -> Tensor:
        return x.abs()

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 8 * n

    @property
    def value(self) -> Tensor:
        return self._sum / max(1, self.count)


class MeanSquare(MeanAbs):
    """Mean square of every channel, shape (n,): the diagonal of the second moments."""

    def _of(self, x: Tensor) -> Tensor:
        return x.square()


class AbsMax(Observer):
    """Largest magnitude of every channel, shape (n,)."""

    def __init__(self, n: int):
        self.value = torch.zeros(n)

    def __call__(self, x: Tensor) -> None:
        self.value = torch.maximum(self.value, x.abs().amax(0).float().cpu())

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 4 * n


class PairedForward:
    """Pairs the inputs of two models on the same tokens. In every batch, the original model runs first.

    - input_error_cross, input_error_second_moments: the sums that `PairedSecondMoments` collects. The second needs the
      first.
    - tokens: the number of tokens of the current batch.
    - original: whether the original model is running.
    - waiting: inputs of the original model, until the other model has run on the batch.
    """

    def __init__(self, input_error_cross: bool = True, input_error_second_moments: bool = False) -> None:
        self.input_error_cross, self.input_error_second_moments = (
            input_error_cross or input_error_second_moments,
            input_error_second_moments,
        )
        self.tokens, self.original = 0, False
        self.waiting: dict[PairedSecondMoments, Tensor] = {}

    def turns(self, original: Tensor, other: Tensor, tokens: int) -> Iterator[Tensor]:
        """Yields the hidden states of the original, then those of the other model, for a batch of `tokens` tokens."""
        self.tokens, self.original = tokens, True
        with no_fake_quant():
            yield original
        self.original = False
        yield other
        self.waiting.clear()


class PairedSecondMoments(SecondMoments):
    """`SecondMoments` of the inputs x of one model.

    With x0 the inputs of the original, `input_error_cross` is the sum of ``(x0 - x)^T x`` and
    `input_error_second_moments` that of ``(x0 - x)^T (x0 - x)``.

    Both are None if no batch could be paired, or if the pairing does not collect them. Tokens are paired by their
    position in the batch, so a batch counts only if all its tokens reach the layer in both models. Batches of experts
    usually do not count: the two routers send different tokens, so there may be no x0 of the same token.
    """

    def __init__(self, n: int, pairing: PairedForward):
        super().__init__(n)
        self.pairing = pairing
        self._error: Tensor | None = None

    @classmethod
    def examples(cls, n: int = 256) -> list[Self]:
        return [cls(n, PairedForward())]

    def __call__(self, x: Tensor) -> None:
        whole = self.pairing.input_error_cross and x.shape[0] == self.pairing.tokens
        if self.pairing.original:
            if whole:
                self.pairing.waiting[self] = x.clone()  # x may be a view of hidden states that will be overwritten
            return
        super().__call__(x)
        partner = self.pairing.waiting.pop(self, None)
        if partner is not None and whole:
            x = x.float()
            error = partner.float() - x
            cross = self.input_error_cross
            self.input_error_cross = error.T @ x if cross is None else cross.addmm_(error.T, x)
            if self.pairing.input_error_second_moments:
                self._error = torch.zeros_like(self.lower) if self._error is None else self._error
                _add_square(self._error, error)

    @property
    def input_error_second_moments(self) -> Tensor | None:
        return None if self._error is None else _symmetric(self._error)


class GuidedSecondMoments(SecondMoments):
    """`SecondMoments` of an input, and beside them one of each group of outputs of the layers that read it, in which
    tokens count by their weights.

    - `parts`: those of the groups, by the name of a layer's weight: a list, one for each group.

    `weights` has the weights of all tokens, shape (groups, tokens), by the name of a layer's weight. `make` makes an
    observer of vectors of n numbers for each group; a `pairing` is the one of these observers. The observer sees all
    tokens, in their order, once or more often.
    """

    def __init__(
        self,
        n: int,
        weights: Mapping[str, Tensor],
        make: Callable[[int], SecondMoments] = SecondMoments,
        pairing: PairedForward | None = None,
    ):
        super().__init__(n)
        self.parts = {name: [make(n) for _ in groups] for name, groups in weights.items()}
        self._roots = {name: groups.float().sqrt() for name, groups in weights.items()}
        self._tokens = max((groups.shape[1] for groups in weights.values()), default=1)
        self._pairing, self._next = pairing, {True: 0, False: 0}

    @classmethod
    def examples(cls, n: int = 256) -> list[Self]:
        return [cls(n, {})]  # with layers, it is larger than `size_in_bytes` by one `SecondMoments` for each group

    def __call__(self, x: Tensor) -> None:
        original = self._pairing is not None and self._pairing.original
        start, stop = self._next[original], self._next[original] + len(x)
        self._next[original] = stop % self._tokens
        if not original:
            super().__call__(x)
        for name, observers in self.parts.items():
            for root, observer in zip(self._roots[name], observers, strict=True):
                observer(x * root[start:stop, None].to(device=x.device, dtype=x.dtype))


class PaddedSpectrum(Observer):
    """Mean square of every Walsh-Hadamard coefficient, shape (D,). D is the smallest power of two that is at least n.

    Vectors are padded with zeros at the end. The transform is orthonormal, in natural (Sylvester's) order: section 3 of
    arXiv 2605.25203.
    """

    def __init__(self, n: int):
        self.pad = next_power_of_two(n) - n
        self._transform = hadamard(n + self.pad)
        self._energy = MeanSquare(n + self.pad)

    def __call__(self, x: Tensor) -> None:
        self._energy(self._transform.apply(nn.functional.pad(x, (0, self.pad))))

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return MeanSquare.size_in_bytes(next_power_of_two(n))

    @property
    def value(self) -> Tensor:
        return self._energy.value


class TokenSample(Observer):
    """A sample of at most 512 vectors: half have the largest entries, half come at even intervals.

    The sample is stored in bfloat16 and takes at most 1024 n bytes.
    """

    def __init__(self, n: int):
        self._peaks = self._even = torch.zeros(0, n, dtype=torch.bfloat16)
        self._stride, self._count = 1, 0

    def __call__(self, x: Tensor) -> None:
        top = torch.cat([self._peaks, self._strongest(x).bfloat16().cpu()])
        self._peaks = self._strongest(top)
        self._even = torch.cat([self._even, x[-self._count % self._stride :: self._stride].bfloat16().cpu()])
        self._count += x.shape[0]
        while len(self._even) > _SAMPLE // 2:
            self._even, self._stride = self._even[::2].clone(), 2 * self._stride

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 2 * _SAMPLE * n

    @staticmethod
    def _strongest(x: Tensor) -> Tensor:
        return x[x.abs().amax(1).topk(min(len(x), _SAMPLE // 2)).indices]

    @property
    def value(self) -> Tensor:
        """Shape (tokens, n), fp32."""
        return torch.cat([self._peaks, self._even]).float()


class Moments(Observer):
    """Statistics of the outliers of an input: its largest magnitude over its rms, and its kurtosis.

    `channel_max` is the largest magnitude of every channel, shape (n,).
    """

    def __init__(self, n: int):
        self.channel_max = torch.zeros(n)
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.count = 0
        self.peaks: list[float] = []

    def __call__(self, x: Tensor) -> None:
        x = x.float()
        self.channel_max = torch.maximum(self.channel_max.to(x.device), x.abs().amax(0))
        squares = x.square()
        self.sums += torch.stack([squares.sum(), squares.square().sum(), x.sum()]).double().cpu()
        self.count += x.numel()
        self.peaks.append(float((x.abs().amax(1) / squares.mean(1).sqrt().clamp_min(1e-12)).mean()))

    @property
    def rms(self) -> float:
        return float((self.sums[0] / self.count).sqrt())

    @property
    def max_over_rms(self) -> float:
        """Mean over tokens of each token's largest magnitude over its own rms: 1 is flat, sqrt(n) a single spike."""
        return sum(self.peaks) / len(self.peaks)

    @property
    def kurtosis(self) -> float:
        """Fourth moment over squared second moment, over all entries: 3 for a Gaussian."""
        return float(self.sums[1] * self.count / self.sums[0].square())

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 4 * n


def input_key(op: LinearOp, own: frozenset[str]) -> str:
    """The name of a layer's input in observations.

    All layers that read one basis share it. Layers with their own online map before them (the modules `own`) and
    stacked experts have their own name.
    """
    return op.weight if op.module in own or op.entry.stacked else op.entry.reads


def modules_with_own_map(online: Sequence[OnlineOp]) -> frozenset[str]:
    """The modules with an online map at their input."""
    maps = [op for op in online if isinstance(op, OnlineMap)]
    return frozenset(op.module for op in maps if op.hook_point.point == "input")


@contextmanager
def observing(
    model: Any,
    group: Group,
    online: Sequence[OnlineOp],
    make: Callable[[int], Any],
    only: Collection[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[Key, Any]]:
    """Observes the inputs of a group's quantizable linear layers for the duration of a with block.

    - online: the online operations. They must be attached before.
    - make: makes an observer for an input of n features: a function of vectors, shape (tokens, n).
    - only: the input keys to observe. None: all.
    - stop: if only one input is observed, a run of the block ends with BlockDoneError after this input where this is
      true.

    Yields the observers by key. Those of stacked experts are added with the first token of an expert.
    """
    observers: dict[Key, Any] = {}
    undo: list[Callable[[], Any]] = []
    own = modules_with_own_map(online)

    rounding = {quantizer.hook_point: quantizer.grid for quantizer in online if isinstance(quantizer, InputQuantizer)}

    def see(op: LinearOp, key: str, first: LinearOp) -> See:
        # a router's input is not rounded, so it is rounded here as the observed layer rounds its own input
        missing = None if first is op else rounding.get(hook_point(op))

        def note(expert: int | None, x: Tensor) -> None:
            if (key, expert) not in observers:
                observers[key, expert] = make(op.in_features)
            observers[key, expert](x if missing is None else fake(missing, x))
            if alone and stop():
                raise BlockDoneError

        return note

    wanted = [op for op in group.linears if op.entry.quantize and (only is None or input_key(op, own) in only)]
    alone = len({input_key(op, own) for op in wanted}) == 1 and not wanted[0].entry.stacked
    watched = set()
    for op in wanted:
        key = input_key(op, own)
        if key not in watched:
            watched.add(key)
            first = op if op.entry.stacked else next(other for other in group.linears if input_key(other, own) == key)
            undo += watch(model, first, see(op, key, first))  # of experts and their router, the router sees every token
            if not op.entry.stacked:
                observers[key, None] = make(op.in_features)
    try:
        yield observers
    finally:
        for step in reversed(undo):
            step()


See = Callable[[int | None, Tensor], None]
"""A function of the expert (None unless experts are stacked) and of vectors, shape (tokens, features)."""


def watch(model: Any, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    """Calls `see` with the inputs of a linear layer. Returns functions that end it."""
    module = model.get_submodule(op.module)
    if op.entry.intercepted:
        return _watch_parameter(module, op, see)
    if op.entry.stacked:
        return _watch_experts(module, op, see)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        see(None, args[0].reshape(-1, args[0].shape[-1]))

    return [module.register_forward_pre_hook(note).remove]


def watch_output(model: Any, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    """Calls `see` with the outputs of a linear layer that is not stacked. Returns functions that end it."""

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        see(None, output.reshape(-1, output.shape[-1]))

    return [model.get_submodule(op.module).register_forward_hook(note).remove]


def _watch_parameter(module: nn.Module, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    state, release = intercept(module, op.weight.rpartition(".")[2])
    state.observers = [*(state.observers or ()), see]

    def stop() -> None:
        state.observers = [other for other in state.observers or () if other is not see]

    return [release, stop]


def _watch_experts(module: nn.Module, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    watched: dict[str, list[See]] = module.__dict__.setdefault("_gyroquant_watched", {})
    name = op.weight.rpartition(".")[2]
    watched.setdefault(name, []).append(see)

    def observe(name: str, expert: int, x: Tensor) -> None:
        for watcher in watched.get(name, ()):
            watcher(expert, x)

    module.__dict__["_gyroquant_observe"] = observe

    def stop() -> None:
        watched[name].remove(see)
        if not any(watched.values()):
            module.__dict__.pop("_gyroquant_observe", None)
            module.__dict__.pop("_gyroquant_watched", None)

    return [route_experts(module), stop]
