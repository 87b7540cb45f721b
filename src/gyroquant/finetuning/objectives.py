"""The losses that learned maps minimize. Each gives the gradient of its loss for every learned tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.finetuning.differentiable_fold import DifferentiableFold, with_values
from gyroquant.finetuning.parameters import Place
from gyroquant.finetuning.settings import OBJECTIVES, ROTATIONS, Learn
from gyroquant.grids import Grid
from gyroquant.models.execution.online import OnlineOp, attached, fake
from gyroquant.models.execution.runner import BlockRunner, Call, own_mappings, pass_back
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import residual_map
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.base import WeightStore
from gyroquant.registry import Registry
from gyroquant.system.progress import Progress

Values = Mapping[str, Tensor]
Places = Mapping[str, Place]
_TINY = 1e-24  # replaces mean squares of 0, whose gradient would be NaN
_UNIFORM = 1.8  # kurtosis of a uniform distribution


@dataclass(frozen=True)
class Setting:
    """The data for learning: the text and everything that is rounded.

    - tokens: the text, shape (samples, length). None without a text.
    - targets: the layers that will be rounded, by weight.
    - grids: the grids of the weights that are rounded while maps are learned.
    - attachments: the online operations besides the plan's maps.
    - dtype: the dtype that the model computes in.
    """

    tokens: Tensor | None
    targets: Mapping[str, LinearOp]
    grids: Mapping[str, Grid]
    attachments: Sequence[OnlineOp]
    dtype: torch.dtype
    seed: int

    def rounded_model(self, plan: FoldPlan) -> RoundedModel:
        """The rounding that is applied while the maps of a plan are learned."""
        weights = {name: (self.targets[name], grid) for name, grid in self.grids.items()}
        return RoundedModel(weights, [*plan.online, *self.attachments], self.dtype)

    @property
    def text(self) -> Tensor:
        """The text, for objectives that need one."""
        assert self.tokens is not None
        return self.tokens


class Loss(ABC):
    """A loss as a function of the learned tensors, by label.

    Subclasses register themselves under their `name`, if they have one.
    """

    registry: ClassVar[Registry[Any]] = OBJECTIVES
    name: ClassVar[str] = ""
    """The name in recipes (`learn.objective`)."""
    needs_text: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    """Whether the loss depends on rounding."""
    sites: ClassVar[tuple[str, ...]] = ()
    """The sites at which the loss can be measured. Empty: all."""
    takes_top: ClassVar[bool] = False
    """Whether it accepts `top`, which restricts the loss to the most likely tokens."""

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("name"):
            OBJECTIVES.add(cls.name, cls)

    @classmethod
    @abstractmethod
    def begin(
        cls, store: WeightStore, plan: FoldPlan, places: Places, settings: Learn, setting: Setting, progress: Progress
    ) -> Loss:
        """The loss of the maps at `places` of a plan, for a recipe's `settings`."""

    def __init__(self, store: WeightStore, plan: FoldPlan, places: Places):
        self.store, self.plan, self.places = store, plan, places

    @abstractmethod
    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The loss on token ids of shape (sequences, length), and its gradients by label."""

    def _leaves(self, values: Values) -> tuple[dict[str, Tensor], FoldPlan]:
        """The tensors as leaves that collect gradients, and the plan with the maps made from them."""
        leaves = {label: value.detach().requires_grad_() for label, value in values.items()}
        return leaves, with_values(self.plan, self.places, leaves)


def _gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of leaves. A leaf without a gradient has zeros."""
    return {label: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for label, leaf in leaves.items()}


@dataclass(frozen=True)
class RoundedModel:
    """The rounding of a model while maps are learned.

    - weights: the parameters that are rounded, each with its layer and its grid.
    - attachments: the online operations, which may round too.
    - dtype: the dtype that the model computes in.
    """

    weights: Mapping[str, tuple[LinearOp, Grid]]
    attachments: Sequence[OnlineOp]
    dtype: torch.dtype

    def typed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters in the dtype of the model."""
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def rounded(self, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Folded parameters. Those in `weights` are rounded."""
        out = dict(folded)
        for name in out.keys() & self.weights.keys():
            op, grid = self.weights[name]
            out[name] = op.to_param(fake(grid, op.to_matrix(out[name])))
        return out

    def leaves(self, rounded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Detached copies for the model to run on. They collect gradients, which `pass_back` propagates."""
        return {name: value.detach().requires_grad_() for name, value in self.typed(rounded).items()}


class EndToEnd(Loss):
    """A loss of the predictions of the whole rounded model: cross-entropy on the text, or KL from the original.

    Parameters are folded once in each step. Sequences run one by one, so memory holds one sequence. With `kl`, the loss
    is the divergence, among the `top` most likely tokens if `top` is given.
    """

    def __init__(
        self, store: WeightStore, plan: FoldPlan, places: Places, rounding: RoundedModel, kl: bool, top: int | None
    ):
        super().__init__(store, plan, places)
        graph = store.graph
        *blocks, outer = graph.params
        names = (*outer, *(name for block in blocks for name in block))
        tensors = store.read(names)
        self._fold = DifferentiableFold(plan, places, tensors, (*names, *plan.unties(tensors)))
        self._original, self._top, self._rounding = rounding.typed(tensors) if kl else None, top, rounding

    def _logits(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        tied = {alias: weights[name] for alias, name in self.store.graph.tied.items()}
        arguments = {"input_ids": ids, "use_cache": False}
        return functional_call(self.store.skeleton(), tied | dict(weights), (), arguments, tie_weights=False).logits

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, plan = self._leaves(values)
        rounded = self._rounding.rounded(self._fold(plan))
        weights = self._rounding.leaves(rounded)
        total = 0.0
        for ids in batch.split(1):
            expected = None
            if self._original is not None:
                with torch.no_grad():
                    expected = self._logits(self._original, ids).float().log_softmax(-1)
            with attached(self.store.skeleton(), self._rounding.attachments):
                logs = self._logits(weights, ids).float().log_softmax(-1)
            if expected is None:
                loss = -logs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
            else:
                loss = mean_divergence(expected, logs, self._top)
            (loss / len(batch)).backward()
            total += float(loss.detach()) / len(batch)
        pass_back(rounded, weights)
        return total, _gradients(leaves)


class CrossEntropy(EndToEnd):
    """Cross-entropy of the rounded model on the text (SpinQuant, arXiv 2405.16406)."""

    name = "cross_entropy"
    rounds = True

    @classmethod
    def begin(
        cls, store: WeightStore, plan: FoldPlan, places: Places, settings: Learn, setting: Setting, progress: Progress
    ) -> Loss:
        return cls(store, plan, places, setting.rounded_model(plan), kl=False, top=None)


class Divergence(EndToEnd):
    """KL divergence of the rounded model from the original. With `top`, only the most likely tokens count."""

    name = "kl"
    rounds = True
    takes_top = True

    @classmethod
    def begin(
        cls, store: WeightStore, plan: FoldPlan, places: Places, settings: Learn, setting: Setting, progress: Progress
    ) -> Loss:
        return cls(store, plan, places, setting.rounded_model(plan), kl=True, top=settings.top)


class BlockOutputs(Loss):
    """The squared error of the output of every rounded block, on the inputs of the original model.

    It is divided by the square of the block's contribution to the residual stream. Memory holds one block, which is
    read again in every step.
    """

    name = "blocks"
    rounds = True

    @classmethod
    def begin(
        cls, store: WeightStore, plan: FoldPlan, places: Places, settings: Learn, setting: Setting, progress: Progress
    ) -> Loss:
        return cls(store, plan, places, setting.rounded_model(plan))

    def __init__(self, store: WeightStore, plan: FoldPlan, places: Places, rounding: RoundedModel):
        super().__init__(store, plan, places)
        self._runner, self._rounding = BlockRunner.of(store), rounding
        self._runner.check_separate("learning maps from the errors of blocks")

    def _block(self, index: int, plan: FoldPlan, streams: list[tuple[Tensor, Call]]) -> float:
        """The mean loss of a block over sequences. Its gradients are added to the leaves.

        `streams` are the hidden states of each sequence and the arguments of its block. The hidden states are replaced
        by the output of the original block.
        """
        tensors, total = self.store.read(self.store.graph.block_params(index)), 0.0
        original, change = self._rounding.typed(tensors), residual_map(plan)
        transform = change.apply if change else lambda x: x
        rounded = self._rounding.rounded(DifferentiableFold(self.plan, self.places, tensors, tensors)(plan))
        weights = self._rounding.leaves(rounded)
        inside = self.store.graph.in_block(index, self._rounding.attachments)
        for number, (hidden, call) in enumerate(streams):
            given = transform(hidden.float()).to(self._rounding.dtype)
            with attached(self._runner.model, inside):
                output = self._runner.differentiable(index, weights, given, own_mappings(call))
            expected = self._runner.run(index, original, hidden, call)
            error = (output.float() - transform(expected.float())).square().sum()
            loss = error / (expected - hidden).float().square().sum().clamp_min(1e-30) / len(streams)
            loss.backward()
            total += float(loss.detach())
            streams[number] = (expected, call)
        pass_back(rounded, weights)
        return total

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, plan = self._leaves(values)
        graph = self.store.graph
        outer = self._rounding.typed(self.store.read(graph.outer_params()))
        starts = [self._runner.begin(ids, outer) for ids in batch.split(1)]
        del outer
        hidden, calls = [states for states, _ in starts], [calls for _, calls in starts]
        total, blocks = 0.0, len(graph.blocks)
        for index in range(blocks):
            streams = [(states, call[index]) for states, call in zip(hidden, calls, strict=True)]
            total += self._block(index, plan, streams) / blocks
            hidden = [states for states, _ in streams]
        return total, {label: gradient / blocks for label, gradient in _gradients(leaves).items()}


class OptRotLoss(Loss):
    """OptRot (arXiv 2512.24124): the mean fourth power of the rotated weights, each matrix scaled to unit variance.

    Weights without outliers round better. The objective needs no text. Memory holds one block.
    """

    name = "weights"
    needs_text = False

    @classmethod
    def begin(
        cls, store: WeightStore, plan: FoldPlan, places: Places, settings: Learn, setting: Setting, progress: Progress
    ) -> Loss:
        return cls(store, plan, places, list(setting.targets))

    def __init__(self, store: WeightStore, plan: FoldPlan, places: Places, targets: Sequence[str]):
        super().__init__(store, plan, places)
        self._targets = frozenset(targets)

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, plan = self._leaves(values)
        graph, total = self.store.graph, 0.0
        for i in range(len(graph.blocks)):
            tensors = self.store.read(graph.block_params(i))
            names = [name for name in tensors if name in self._targets]
            folded = DifferentiableFold(self.plan, self.places, tensors, names)(plan)
            rotated = [w for w in folded.values() if w.requires_grad]
            losses = [w.pow(4).mean() / w.square().mean().square().clamp_min(_TINY) for w in rotated]
            if losses:
                loss = torch.stack(losses).sum() / (len(losses) * len(graph.blocks))
                loss.backward()
                total += float(loss.detach())
        return total, _gradients(leaves)


class Sample:
    """A random sample of at most `rows` vectors. Every vector has the same probability to be in it."""

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
    """KurTail (arXiv 2503.01483): the distance of the kurtosis of layer inputs from that of a uniform distribution.

    The vectors at each site are sampled once, from the original model.
    """

    name = "kurtosis"
    sites = ROTATIONS

    @classmethod
    def begin(
        cls, store: WeightStore, plan: FoldPlan, places: Places, settings: Learn, setting: Setting, progress: Progress
    ) -> Loss:
        return cls(store, plan, places, setting.text, setting.dtype, progress)

    def __init__(
        self,
        store: WeightStore,
        plan: FoldPlan,
        places: Places,
        tokens: Tensor,
        dtype: torch.dtype,
        progress: Progress,
    ):
        super().__init__(store, plan, places)
        before = FoldPlan(
            plan.graph, keeps_ties=plan.keeps_ties
        )  # the maps before the learned ones, which change the vectors that these act on
        for site, m, online in plan.folded[: max(place.index for place in places.values())]:
            if site.label in places and plan.folded[places[site.label].index][1] is not m:
                before.add(site, m, online)
        measured = [SiteMeasurement(plan.folded[place.index][0], (Sample,)) for place in places.values()]
        measure(store, before, measured, tokens, progress, dtype)
        self._samples = {label: site.seen[Sample].value for label, site in zip(places, measured, strict=True)}

    def gradients(self, values: Values, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves, total = {label: value.detach().requires_grad_() for label, value in values.items()}, 0.0
        for label, leaf in leaves.items():
            z = self.places[label].parameter.map(leaf).apply(self._samples[label])
            loss = (kurtosis(z) - _UNIFORM).abs() / len(leaves)
            loss.backward()
            total += float(loss.detach())
        return total, _gradients(leaves)


def kurtosis(x: Tensor) -> Tensor:
    """The mean over vectors of the kurtosis of their entries, not centered; x has shape (vectors, n)."""
    scaled = x / x.square().mean(-1, keepdim=True).clamp_min(_TINY).sqrt()
    return scaled.pow(4).mean()
