"""The loop: gradient of the objective, a step of every learned tensor, a checkpoint now and then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids import Grid
from gyroquant.journal import get_state, put_state
from gyroquant.learning.live import learnable, with_values
from gyroquant.learning.objectives import BlockOutputs, EndToEnd, FourthPowers, Kurtosis, Loss, RoundedModel
from gyroquant.learning.parameters import Place, Steps, largest_drift
from gyroquant.learning.settings import Learn
from gyroquant.maps import dump
from gyroquant.models.fold import FoldPlan
from gyroquant.models.graph import LinearOp
from gyroquant.models.online import Attachment, growing_noise
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages


@dataclass(frozen=True)
class Setting:
    """What rotations are learned for: the text, shape (samples, length), and everything that is rounded.

    `grids` round the weights of those `targets` that they name. `attachments` run with the model.
    """

    tokens: Tensor | None
    targets: Mapping[str, LinearOp]
    grids: Mapping[str, Grid]
    attachments: Sequence[Attachment]
    dtype: torch.dtype
    seed: int


@dataclass
class Learned:
    """A plan with learned maps, and the loss at every step."""

    plan: FoldPlan
    losses: list[float]
    drift: float


def learn(
    store: WeightStore,
    plan: FoldPlan,
    settings: Learn,
    setting: Setting,
    progress: Stages,
    checkpoint: Path | None = None,
) -> Learned:
    """Learns the maps of ``settings.sites`` from those in `plan`.

    With `checkpoint`, a file, the state is kept there, and a run that was stopped goes on from it when everything that
    it depends on is the same. Raises RecipeError or UnsupportedModelError for sites that cannot be learned, InputError
    without a text that the objective needs.
    """
    plan, places, values, loss = begin(store, plan, settings, setting, progress)
    state = _State(places, values, Steps(settings), [])
    mark = _mark(store, plan, settings, setting)
    if checkpoint is not None:
        state.resume(checkpoint, mark)
    with progress.stage("learn maps", settings.steps) as advance:
        for _ in range(len(state.losses)):
            advance()
        while len(state.losses) < settings.steps:
            state.step(loss, _batch(setting, settings, len(state.losses)))
            advance()
            done = len(state.losses)
            if checkpoint is not None and (done % settings.checkpoint_every == 0 or done == settings.steps):
                state.save(checkpoint, mark)
    return Learned(with_values(plan, places, state.values), state.losses, largest_drift(places, state.values))


def begin(
    store: WeightStore, plan: FoldPlan, settings: Learn, setting: Setting, progress: Stages
) -> tuple[FoldPlan, dict[str, Place], dict[str, Tensor], Loss]:
    """The plan with the maps to start from, their places and tensors, and the loss. Raises as `learn` does."""
    places = learnable(plan, settings.sites)
    if setting.tokens is None and settings.objective != "weights":
        raise InputError(f"learning rotations by {settings.objective} needs text: give --text FILE")
    values = {label: at.parameter.start(plan.folded[at.index][1]) for label, at in places.items()}
    plan = with_values(plan, places, values)
    return plan, places, values, _loss(store, plan, places, settings, setting, progress)


def _loss(
    store: WeightStore,
    plan: FoldPlan,
    places: Mapping[str, Place],
    settings: Learn,
    setting: Setting,
    progress: Stages,
) -> Loss:
    if settings.objective == "weights":
        return FourthPowers(store, plan, places, list(setting.targets))
    assert setting.tokens is not None
    if settings.objective == "kurtosis":
        return Kurtosis(store, plan, places, setting.tokens, setting.dtype, progress)
    weights = {name: (setting.targets[name], grid) for name, grid in setting.grids.items()}
    rounding = RoundedModel(weights, [*plan.online, *setting.attachments], setting.dtype)
    if settings.objective == "blocks":
        return BlockOutputs(store, plan, places, rounding)
    return EndToEnd(store, plan, places, rounding, settings.objective == "kl", settings.top)


def _batch(setting: Setting, settings: Learn, step: int) -> Tensor:
    """The sequences of a step: the text again and again, in an order that differs from round to round."""
    if setting.tokens is None:
        return torch.zeros(0, 0, dtype=torch.long)
    count = len(setting.tokens)
    picks = []
    for number in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        generator = torch.Generator().manual_seed(setting.seed * 1_000_003 + number // count)
        picks.append(int(torch.randperm(count, generator=generator)[number % count]))
    return setting.tokens[picks]


@dataclass
class _State:
    places: dict[str, Place]
    values: dict[str, Tensor]
    steps: Steps
    losses: list[float]

    def step(self, loss: Loss, batch: Tensor) -> None:
        with growing_noise(self.steps.settings.gradient == "spans"):
            value, gradients = loss.gradients(self.values, batch)
        if not all(bool(g.isfinite().all()) for g in gradients.values()):
            raise InputError(
                f"the gradient of what is learned is not finite at step {len(self.losses)}; lower learn.lr"
            )
        for label, place in self.places.items():
            old = self.values[label]
            self.values[label] = self.steps.take(place, label, old, gradients[label], len(self.losses))
        self.losses.append(value)

    def save(self, path: Path, mark: str) -> None:
        tensors = {f"value.{label}": value for label, value in self.values.items()}
        for kind, kept in self.steps.kept():
            tensors |= {f"{kind}.{label}": one.contiguous() for label, one in kept.items()}
        put_state(path, tensors, mark, self.losses)

    def resume(self, path: Path, mark: str) -> None:
        """Takes up the state of a checkpoint with the same mark; any other file is started over."""
        found = get_state(path, mark)
        if found is None:
            return
        tensors, self.losses = found
        for label in self.values:
            self.values[label] = tensors[f"value.{label}"]
            for kind, kept in self.steps.kept():
                if f"{kind}.{label}" in tensors:
                    kept[label] = tensors[f"{kind}.{label}"]


def _mark(store: WeightStore, plan: FoldPlan, settings: Learn, setting: Setting) -> str:
    """A digest of everything that the learned tensors depend on: what they start from is in the plan."""
    digest = hashlib.sha256()
    described: list[Any] = [store.label, settings.model_dump(), str(setting.dtype), setting.seed]
    described += [{name: grid.model_dump() for name, grid in setting.grids.items()}, sorted(setting.targets)]
    described.append([repr(one) for one in setting.attachments])
    arrays: dict[str, Tensor] = {}
    described += [[site.label, online, dump(m, arrays, str(i))] for i, (site, m, online) in enumerate(plan.folded)]
    digest.update(json.dumps(described).encode())
    if setting.tokens is not None:
        digest.update(setting.tokens.cpu().numpy().tobytes())
    for array in arrays.values():
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()
