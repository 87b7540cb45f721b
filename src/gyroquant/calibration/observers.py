"""What is measured while a block runs: small statistics of the inputs of its linear layers, never the inputs
themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gyroquant.maps import hadamard, next_power_of_two
from gyroquant.models.graph import Group, LinearOp
from gyroquant.models.online import Attachment, InputQuantizer, OnlineMap, fake, route_experts, unrounded
from gyroquant.models.runner import BlockDoneError
from gyroquant.models.sites import insertion

Key = tuple[str, int | None]
"""An input that is observed: its name, and the expert for stacked experts."""

_STRIPES = 4
_STRIP = 1024
_SAMPLE = 512


class Observer(ABC):
    """What looks at vectors: made for vectors of n numbers, called with batches of them, shape (tokens, n)."""

    @abstractmethod
    def __call__(self, x: Tensor) -> None:
        """Takes note of some vectors."""

    @staticmethod
    @abstractmethod
    def size_in_bytes(n: int) -> int:
        """The memory that it takes for vectors of n numbers, by which runs are checked to fit before they start."""


class Gram(Observer):
    """Sum of ``x^T x`` over tokens, shape (n, n), fp32."""

    drift: Tensor | None = None
    spread: Tensor | None = None

    def __init__(self, n: int):
        self.lower = torch.zeros(n, n)
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        x = x.float()
        self.lower = self.lower.to(x.device)
        self.count += x.shape[0]
        n = x.shape[1]
        for stripe in range(_STRIPES):  # only what lies on and below the diagonal stripes: five eighths of the work
            start, stop = n * stripe // _STRIPES, n * (stripe + 1) // _STRIPES
            self.lower[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 4 * n * n

    @property
    def gram(self) -> Tensor:
        """The sum as it is so far, made whole where it is kept: what lies above the diagonal is never read again."""
        for start in range(0, len(self.lower), _STRIP):
            rows = self.lower[start : start + _STRIP, : start + _STRIP]
            square = rows[:, start:]
            square.copy_(square.tril() + square.tril(-1).T)
            self.lower[:start, start : start + _STRIP] = rows[:, :start].T
        return self.lower


class MeanAbs(Observer):
    """Mean magnitude of every channel, shape (n,): the mean l1 mass that MassDiff spreads (arXiv 2601.22347)."""

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


class Pairing:
    """Brings together what two models give for the same tokens, the original first, batch by batch.

    `drift` and `spread` say which of these sums `CrossGram` takes. `tokens` is the size of the batch, `original` says
    whose turn it is, `waiting` holds inputs of the original until their partners come.
    """

    def __init__(self, drift: bool = True, spread: bool = False) -> None:
        self.drift, self.spread = drift or spread, spread
        self.tokens, self.original = 0, False
        self.waiting: dict[CrossGram, Tensor] = {}

    def turns(self, original: Tensor, other: Tensor, tokens: int) -> Iterator[Tensor]:
        """The hidden states to run, one after the other, for a batch of this many tokens."""
        self.tokens, self.original = tokens, True
        with unrounded():
            yield original
        self.original = False
        yield other
        self.waiting.clear()


class CrossGram(Gram):
    """`Gram` of the inputs x of one model; with x0 those of the original, `drift`, the sum of ``(x0 - x)^T x``, and
    `spread`, that of ``(x0 - x)^T (x0 - x)``.

    Tokens are paired by their place in the batch, so only batches that reach the layer whole in both models count; the
    others leave the drift as it is. Those of experts are like that: the two routers send different tokens, and an x0
    of the same token need not exist. None when nothing could be paired, or when the pairing does not ask for them.
    """

    def __init__(self, n: int, pairing: Pairing):
        super().__init__(n)
        self.pairing = pairing

    def __call__(self, x: Tensor) -> None:
        whole = self.pairing.drift and x.shape[0] == self.pairing.tokens
        if self.pairing.original:
            if whole:
                self.pairing.waiting[self] = x.clone()  # x may be a view of hidden states that are about to move on
            return
        super().__call__(x)
        partner = self.pairing.waiting.pop(self, None)
        if partner is not None and whole:
            x = x.float()
            away = partner.float() - x
            self.drift = _plus(self.drift, away, x)
            if self.pairing.spread:
                self.spread = _plus(self.spread, away, away)


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """A sum of products ``a^T b``, begun where there is none."""
    return a.T @ b if total is None else total.addmm_(a.T, b)


class PaddedSpectrum(Observer):
    """Mean square of every Walsh-Hadamard coefficient, shape (D,): D is n or the next power of two, with zeros behind.

    Coefficients are in natural (Sylvester's) order, of the orthonormal transform: section 3 of arXiv 2605.25203.
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
    """At most 512 of the vectors: half are those with the largest entries, half come at even intervals.

    Kept in bfloat16, at most 1024 n bytes.
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
    """Figures of the outliers of an input: its largest magnitude against its rms, and its kurtosis.

    `channel_max` is the largest magnitude of every channel.
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
    """The name under which an operation's input is observed: shared by all that read one basis, unless a map of its own
    stands in front of it (`own`: the modules with such a map)."""
    return op.weight if op.module in own or op.entry.stacked else op.entry.reads


def modules_with_own_map(online: Sequence[Attachment]) -> frozenset[str]:
    """The modules that have an online map in front of them."""
    maps = [one for one in online if isinstance(one, OnlineMap)]
    return frozenset(one.module for one in maps if one.insertion.point == "input")


@contextmanager
def observing(
    model: Any,
    group: Group,
    online: Sequence[Attachment],
    make: Callable[[int], Any],
    only: Collection[str] | None = None,
    stop: bool = False,
) -> Iterator[dict[Key, Any]]:
    """Observes the inputs of a group's quantizable linear layers for the duration of a with block; all of them, or
    those whose `input_key` is among `only`.

    What runs online must be attached before. `make` builds an observer, a function of (tokens, features), for an
    input of n features. With `stop`, where a single input is observed, each run of the block ends as soon as it has
    been seen, by BlockDoneError. Yields the observers by key; those of stacked experts appear with an expert's first
    token.
    """
    observers: dict[Key, Any] = {}
    undo: list[Callable[[], Any]] = []
    own = modules_with_own_map(online)

    rounding = {one.insertion: one.grid for one in online if isinstance(one, InputQuantizer)}

    def see(op: LinearOp, key: str, first: LinearOp) -> See:
        # a router's input is not rounded, so what is seen there is rounded here as the layer itself will round it
        missing = None if first is op else rounding.get(insertion(op))

        def note(expert: int | None, x: Tensor) -> None:
            if (key, expert) not in observers:
                observers[key, expert] = make(op.in_features)
            observers[key, expert](x if missing is None else fake(missing, x))
            if alone:
                raise BlockDoneError

        return note

    wanted = [op for op in group.linears if op.entry.quantize and (only is None or input_key(op, own) in only)]
    alone = stop and len({input_key(op, own) for op in wanted}) == 1 and not wanted[0].entry.stacked
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
"""What is told about an input: the expert, for stacked experts, and vectors of shape (tokens, features)."""


def watch(model: Any, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    """Shows `see` what enters a linear layer; returns what ends it."""
    module = model.get_submodule(op.module)
    if op.entry.stacked:
        return _watch_experts(module, op, see)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        see(None, args[0].reshape(-1, args[0].shape[-1]))

    return [module.register_forward_pre_hook(note).remove]


def watch_output(model: Any, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    """Shows `see` what leaves a linear layer that is not stacked; returns what ends it."""

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        see(None, output.reshape(-1, output.shape[-1]))

    return [model.get_submodule(op.module).register_forward_hook(note).remove]


def _watch_experts(module: nn.Module, op: LinearOp, see: See) -> list[Callable[[], Any]]:
    watched: dict[str, list[See]] = module.__dict__.setdefault("_gyroquant_watched", {})
    name = op.weight.rpartition(".")[2]
    watched.setdefault(name, []).append(see)

    def observe(name: str, expert: int, x: Tensor) -> None:
        for one in watched.get(name, ()):
            one(expert, x)

    module.__dict__["_gyroquant_observe"] = observe

    def forget() -> None:
        watched[name].remove(see)
        if not any(watched.values()):
            module.__dict__.pop("_gyroquant_observe", None)
            module.__dict__.pop("_gyroquant_watched", None)

    return [route_experts(module), forget]
