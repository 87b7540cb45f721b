"""What learned maps are to make small. Each gives the gradient of its loss by every learned tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from gyroquant.calibration.measure import Want, measure
from gyroquant.grids import Grid
from gyroquant.learning.live import LiveFold, with_values
from gyroquant.learning.parameters import Place
from gyroquant.models.fold import FoldPlan
from gyroquant.models.graph import LinearOp
from gyroquant.models.online import Attachment, attached, fake
from gyroquant.models.packed import as_matrix, from_matrix
from gyroquant.models.prove import residual_map
from gyroquant.models.runner import BlockRunner, Call, pass_back
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages

Values = Mapping[str, Tensor]
Places = Mapping[str, Place]
_TINY = 1e-24  # in place of mean squares that are 0, of which the gradient would be NaN
_UNIFORM = 1.8  # kurtosis of a uniform distribution


class Loss(ABC):
    """A loss of the learned tensors, by label."""

    def __init__(self, store: WeightStore, plan: FoldPlan, places: Places):
        self.store, self.plan, self.places = store, plan, places

    @abstractmethod
    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The loss on token ids of shape (sequences, length), and its gradients."""

    def _live(self, values: Values) -> tuple[dict[str, Tensor], FoldPlan]:
        leaves = {label: value.detach().requires_grad_() for label, value in values.items()}
        return leaves, with_values(self.plan, self.places, leaves)


def _collected(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {label: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for label, leaf in leaves.items()}


@dataclass(frozen=True)
class RoundedModel:
    """What is rounded while maps are learned: the parameters in `weights`, each with its layer and its grid, and what
    the `attachments` round; the model computes in `dtype`.
    """

    weights: Mapping[str, tuple[LinearOp, Grid]]
    attachments: Sequence[Attachment]
    dtype: torch.dtype

    def typed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters in the dtype of the model."""
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def rounded(self, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Folded parameters, those that will be rounded rounded."""
        out = dict(folded)
        for name in out.keys() & self.weights.keys():
            op, grid = self.weights[name]
            out[name] = from_matrix(fake(grid, as_matrix(out[name], op)), op.shape, op.entry.transposed)
        return out

    def leaves(self, rounded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for the model to run on; gradients gather in them until `pass_back` takes them on."""
        return {name: value.detach().requires_grad_() for name, value in self.typed(rounded).items()}


class EndToEnd(Loss):
    """Cross-entropy on the text, or KL from the original, of the whole model with everything rounded that is asked for.

    The parameters are folded once a step and the sequences run one by one, so that memory holds one of them. With `kl`
    the loss is the divergence, among the `top` likeliest tokens if that is given.
    """

    def __init__(
        self, store: WeightStore, plan: FoldPlan, places: Places, rounding: RoundedModel, kl: bool, top: int | None
    ):
        super().__init__(store, plan, places)
        graph = store.graph
        names = (*graph.outer_params(), *(n for i in range(len(graph.blocks)) for n in graph.block_params(i)))
        tensors = store.read(names)
        self._fold = LiveFold(plan, places, tensors, (*names, *plan.unties(tensors)))
        self._original, self._top, self._rounding = rounding.typed(tensors) if kl else None, top, rounding

    def _logits(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        tied = {alias: weights[name] for alias, name in self.store.graph.tied.items()}
        arguments = {"input_ids": ids, "use_cache": False}
        return functional_call(self.store.skeleton(), tied | dict(weights), (), arguments, tie_weights=False).logits

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, plan = self._live(values)
        rounded = self._rounding.rounded(self._fold(plan))
        weights = self._rounding.leaves(rounded)
        total = 0.0
        for ids in batch.split(1):
            wanted = None
            if self._original is not None:
                with torch.no_grad():
                    wanted = self._logits(self._original, ids).float().log_softmax(-1)
            with attached(self.store.skeleton(), self._rounding.attachments):
                logs = self._logits(weights, ids).float().log_softmax(-1)
            if wanted is None:
                loss = -logs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
            else:
                loss = divergence(wanted, logs, self._top)
            (loss / len(batch)).backward()
            total += float(loss.detach()) / len(batch)
        pass_back(rounded, weights)
        return total, _collected(leaves)


class BlockOutputs(Loss):
    """The error of every block's output when what it rounds is rounded, on the inputs of the original model.

    Relative to what the block adds to the residual stream. Memory holds one block, read anew in every step.
    """

    def __init__(self, store: WeightStore, plan: FoldPlan, places: Places, rounding: RoundedModel):
        super().__init__(store, plan, places)
        self._runner, self._rounding = BlockRunner(store.skeleton(), store.graph), rounding

    def _block(self, index: int, plan: FoldPlan, streams: list[tuple[Tensor, Call]]) -> float:
        """The mean loss of a block over sequences, whose gradients are left in the leaves; moves the sequences on."""
        tensors, total = self.store.read(self.store.graph.block_params(index)), 0.0
        original, change = self._rounding.typed(tensors), residual_map(plan)
        there = change.apply if change else lambda x: x
        rounded = self._rounding.rounded(LiveFold(self.plan, self.places, tensors, tensors)(plan))
        weights = self._rounding.leaves(rounded)
        inside = self.store.graph.in_block(index, self._rounding.attachments)
        for number, (hidden, call) in enumerate(streams):
            wanted = self._runner.run(index, original, hidden, call)
            with attached(self._runner.model, inside):
                found = self._runner.differentiable(
                    index, weights, there(hidden.float()).to(self._rounding.dtype), call
                )
            error = (found.float() - there(wanted.float())).square().sum()
            loss = error / (wanted - hidden).float().square().sum().clamp_min(1e-30) / len(streams)
            loss.backward()
            total += float(loss.detach())
            streams[number] = (wanted, call)
        pass_back(rounded, weights)
        return total

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, plan = self._live(values)
        graph = self.store.graph
        outer = self._rounding.typed(self.store.read(graph.outer_params()))
        begun = [self._runner.begin(ids, outer) for ids in batch.split(1)]
        del outer
        hidden, calls = [one for one, _ in begun], [calls for _, calls in begun]
        total, blocks = 0.0, len(graph.blocks)
        for index in range(blocks):
            streams = [(one, call[index]) for one, call in zip(hidden, calls, strict=True)]
            total += self._block(index, plan, streams) / blocks
            hidden = [one for one, _ in streams]
        return total, {label: gradient / blocks for label, gradient in _collected(leaves).items()}


def divergence(wanted: Tensor, found: Tensor, top: int | None) -> Tensor:
    """The mean KL divergence of log-probabilities `found` from `wanted`, shape (..., vocabulary).

    With `top`, of the distributions among as many of the likeliest tokens of `wanted` (OSTQuant's KL-Top).
    """
    if top is not None and top < wanted.shape[-1]:
        best = wanted.topk(top, dim=-1).indices
        wanted, found = (x.gather(-1, best).log_softmax(-1) for x in (wanted, found))
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


class FourthPowers(Loss):
    """OptRot (arXiv 2512.24124): the mean fourth power of the rotated weights, each matrix scaled to unit variance.

    Weights without outliers round better; no text is needed. One block at a time is in memory.
    """

    def __init__(self, store: WeightStore, plan: FoldPlan, places: Places, targets: Sequence[str]):
        super().__init__(store, plan, places)
        self._targets = frozenset(targets)

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, plan = self._live(values)
        graph, total = self.store.graph, 0.0
        for i in range(len(graph.blocks)):
            tensors = self.store.read(graph.block_params(i))
            names = [name for name in tensors if name in self._targets]
            folded = LiveFold(self.plan, self.places, tensors, names)(plan)
            moved = [w for w in folded.values() if w.requires_grad]
            losses = [w.pow(4).mean() / w.square().mean().square().clamp_min(_TINY) for w in moved]
            if losses:
                loss = torch.stack(losses).sum() / (len(losses) * len(graph.blocks))
                loss.backward()
                total += float(loss.detach())
        return total, _collected(leaves)


class Sample:
    """A random sample of at most `rows` of the vectors that it is shown, each as likely as any other."""

    rows = 4096

    def __init__(self, n: int):
        self.value = torch.empty(0, n)
        self._order = torch.empty(0)
        self._generator = torch.Generator().manual_seed(n)

    def __call__(self, x: Tensor) -> None:
        order = torch.cat([self._order, torch.rand(len(x), generator=self._generator)])
        kept = order.topk(min(self.rows, len(order))).indices
        self.value = torch.cat([self.value, x.float().cpu()])[kept]
        self._order = order[kept]


class Kurtosis(Loss):
    """KurTail (arXiv 2503.01483): the kurtosis of what enters the layers, towards that of a uniform distribution.

    A sample of the vectors at each site is taken once, from the original model.
    """

    def __init__(
        self,
        store: WeightStore,
        plan: FoldPlan,
        places: Places,
        tokens: Tensor,
        dtype: torch.dtype,
        progress: Stages,
    ):
        super().__init__(store, plan, places)
        before = FoldPlan(plan.graph)  # what lies in front of the learned maps, and changes what they act on
        for site, m, online in plan.folded[: max(place.index for place in places.values())]:
            if site.label in places and plan.folded[places[site.label].index][1] is not m:
                before.add(site, m, online)
        wants = [Want(plan.folded[place.index][0], (Sample,)) for place in places.values()]
        measure(store, before, wants, tokens, progress, dtype)
        self._samples = {label: want.seen[Sample].value for label, want in zip(places, wants, strict=True)}

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, total = {label: value.detach().requires_grad_() for label, value in values.items()}, 0.0
        for label, leaf in leaves.items():
            z = self.places[label].parameter.map(leaf).apply(self._samples[label])
            loss = (kurtosis(z) - _UNIFORM).abs() / len(leaves)
            loss.backward()
            total += float(loss.detach())
        return total, _collected(leaves)


def kurtosis(x: Tensor) -> Tensor:
    """Mean over vectors of the kurtosis of their entries, each divided by its own rms; x has shape (vectors, n)."""
    scaled = x / x.square().mean(-1, keepdim=True).clamp_min(_TINY).sqrt()
    return scaled.pow(4).mean()
