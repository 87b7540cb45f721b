"""Learns the maps of a plan: gradients of the objective, steps of every learned tensor, and checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.finetuning.differentiable_fold import learnable, with_values
from gyroquant.finetuning.objectives import Loss, Setting
from gyroquant.finetuning.parameters import Place, Steps, largest_drift
from gyroquant.finetuning.settings import Learn
from gyroquant.maps import dump
from gyroquant.models.execution.switches import scaled_ste
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.journal import get_state, put_state
from gyroquant.system.progress import Progress


@dataclass
class Learned:
    """A plan with learned maps, the loss at every step, and `drift`, the deviation of the rotations from orthogonal."""

    plan: FoldPlan
    losses: list[float]
    drift: float


def learn(
    store: WeightStore,
    plan: FoldPlan,
    settings: Learn,
    setting: Setting,
    progress: Progress,
    checkpoint: Path | None = None,
) -> Learned:
    """Learns the maps at ``settings.sites``, starting from those in `plan`.

    With `checkpoint`, a file, the state is saved there. A run that was stopped continues from it if everything that the
    state depends on is the same. Raises RecipeError or UnsupportedModelError for sites that cannot be learned, and
    InputError if the objective needs a text and there is none, or if a gradient is not finite.
    """
    plan, places, values, loss = begin(store, plan, settings, setting, progress)
    state = _State(places, values, Steps(settings), [])
    mark = _mark(store, plan, settings, setting)
    if checkpoint is not None:
        state.resume(checkpoint, mark)
    with progress.stage("learn", settings.steps) as advance:
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
    store: WeightStore, plan: FoldPlan, settings: Learn, setting: Setting, progress: Progress
) -> tuple[FoldPlan, dict[str, Place], dict[str, Tensor], Loss]:
    """The plan with the initial maps, their places and tensors, and the loss. Raises the same errors as `learn`."""
    places = learnable(plan, settings.sites)
    kind = Loss.registry[settings.objective]
    if setting.tokens is None and kind.needs_text:
        raise InputError(f"learning rotations by {settings.objective} needs text: give --text FILE")
    values = {label: place.parameter.start(plan.folded[place.index][1]) for label, place in places.items()}
    plan = with_values(plan, places, values)
    return plan, places, values, kind.begin(store, plan, places, settings, setting, progress)


def _batch(setting: Setting, settings: Learn, step: int) -> Tensor:
    """The sequences of a step. Every pass over the text has another order."""
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
        with scaled_ste(self.steps.settings.gradient == "scaled_ste"):
            value, gradients = loss.gradients(self.values, batch)
        if not all(bool(g.isfinite().all()) for g in gradients.values()):
            raise InputError(f"a gradient of the learned maps is not finite at step {len(self.losses)}; lower learn.lr")
        for label, place in self.places.items():
            old = self.values[label]
            self.values[label] = self.steps.take(place, label, old, gradients[label], len(self.losses))
        self.losses.append(value)

    def save(self, path: Path, mark: str) -> None:
        tensors = {f"value.{label}": value for label, value in self.values.items()}
        for kind, kept in self.steps.kept():
            tensors |= {f"{kind}.{label}": tensor.contiguous() for label, tensor in kept.items()}
        put_state(path, tensors, mark, self.losses)

    def resume(self, path: Path, mark: str) -> None:
        """Loads the state of a checkpoint with the same mark. Any other file is ignored."""
        state = get_state(path, mark)
        if state is None:
            return
        tensors, self.losses = state
        for label in self.values:
            self.values[label] = tensors[f"value.{label}"]
            for kind, kept in self.steps.kept():
                if f"{kind}.{label}" in tensors:
                    kept[label] = tensors[f"{kind}.{label}"]


def _mark(store: WeightStore, plan: FoldPlan, settings: Learn, setting: Setting) -> str:
    """A digest of everything that the learned tensors depend on. The plan contains their initial values."""
    digest = hashlib.sha256()
    described: list[Any] = [store.label, settings.model_dump(), str(setting.dtype), setting.seed]
    described += [{name: grid.model_dump() for name, grid in setting.grids.items()}, sorted(setting.targets)]
    described.append([repr(op) for op in setting.attachments])
    arrays: dict[str, Tensor] = {}
    described += [[site.label, online, dump(m, arrays, str(i))] for i, (site, m, online) in enumerate(plan.folded)]
    digest.update(json.dumps(described).encode())
    if setting.tokens is not None:
        digest.update(setting.tokens.cpu().numpy().tobytes())
    for array in arrays.values():
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


__all__ = ["Learned", "Setting", "begin", "learn"]
