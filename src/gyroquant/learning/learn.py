"""The loop: gradient of the objective, a step on the manifold of rotations, a checkpoint now and then."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids import Grid
from gyroquant.learning.live import as_map, learnable, start_matrix, with_maps
from gyroquant.learning.objectives import EndToEnd, FourthPowers, Kurtosis, Loss
from gyroquant.learning.settings import Learn
from gyroquant.learning.stiefel import CayleySGD, drift, mended, scheduled
from gyroquant.models.fold import FoldPlan
from gyroquant.models.graph import LinearOp
from gyroquant.models.online import Attachment
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages


@dataclass(frozen=True)
class Setting:
    """What rotations are learned for: the text, shape (samples, length), and everything that is rounded.

    `grid` rounds the weights of `targets`; None leaves them as they are. `attachments` run with the model.
    """

    tokens: Tensor | None
    targets: Mapping[str, LinearOp]
    grid: Grid | None
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
    places = learnable(plan, settings.sites)
    if setting.tokens is None and settings.objective != "weights":
        raise InputError(f"learning rotations by {settings.objective} needs text: give --text FILE")
    matrices = {label: mended(start_matrix(plan.folded[i][1])) for label, i in places.items()}
    plan = with_maps(plan, places, {label: as_map(matrix) for label, matrix in matrices.items()})
    loss = _loss(store, plan, places, settings, setting, progress)
    state = _State(matrices, CayleySGD(settings.momentum), [])
    mark = _mark(store, settings, setting, matrices)
    if checkpoint is not None:
        state.resume(checkpoint, mark)
    with progress.stage("learn rotations", settings.steps) as advance:
        for _ in range(len(state.losses)):
            advance()
        while len(state.losses) < settings.steps:
            state.step(loss, _batch(setting, settings, len(state.losses)), settings)
            advance()
            if checkpoint is not None and len(state.losses) % settings.checkpoint_every == 0:
                state.save(checkpoint, mark)
    maps = {label: as_map(matrix) for label, matrix in state.matrices.items()}
    return Learned(with_maps(plan, places, maps), state.losses, max(drift(m) for m in state.matrices.values()))


def _loss(
    store: WeightStore,
    plan: FoldPlan,
    places: Mapping[str, int],
    settings: Learn,
    setting: Setting,
    progress: Stages,
) -> Loss:
    if settings.objective == "weights":
        return FourthPowers(store, plan, places, list(setting.targets))
    assert setting.tokens is not None
    if settings.objective == "kurtosis":
        return Kurtosis(store, plan, places, setting.tokens, setting.dtype, progress)
    rounding = {} if setting.grid is None else {name: (op, setting.grid) for name, op in setting.targets.items()}
    kl = settings.objective == "kl"
    attachments = [*plan.online, *setting.attachments]
    return EndToEnd(store, plan, places, attachments, rounding, setting.dtype, kl)


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
    matrices: dict[str, Tensor]
    optimizer: CayleySGD
    losses: list[float]

    def step(self, loss: Loss, batch: Tensor, settings: Learn) -> None:
        value, gradients = loss.gradients(self.matrices, batch)
        if not all(bool(g.isfinite().all()) for g in gradients.values()):
            raise InputError(f"the gradient of the rotations is not finite at step {len(self.losses)}; lower learn.lr")
        lr = scheduled(settings.lr, len(self.losses), settings.steps, settings.schedule)
        for label, matrix in self.matrices.items():
            self.matrices[label] = self.optimizer.step(label, matrix, gradients[label], lr)
        self.losses.append(value)

    def save(self, path: Path, mark: str) -> None:
        tensors = {f"matrix.{label}": m for label, m in self.matrices.items()}
        tensors |= {f"velocity.{label}": v.contiguous() for label, v in self.optimizer.velocity.items()}
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"mark": mark, "losses": json.dumps(self.losses)})
        temporary.replace(path)

    def resume(self, path: Path, mark: str) -> None:
        """Takes up the state of a checkpoint with the same mark; any other file is started over."""
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("mark") != mark:
                return
            for label in self.matrices:
                self.matrices[label] = file.get_tensor(f"matrix.{label}").clone()
                if f"velocity.{label}" in file.keys():
                    self.optimizer.velocity[label] = file.get_tensor(f"velocity.{label}").clone()
            self.losses = json.loads(metadata["losses"])


def _mark(store: WeightStore, settings: Learn, setting: Setting, matrices: Mapping[str, Tensor]) -> str:
    """A digest of everything that the learned matrices depend on."""
    digest = hashlib.sha256()
    described: list[Any] = [store.label, settings.model_dump(), str(setting.dtype), setting.seed]
    described += [None if setting.grid is None else setting.grid.model_dump(), sorted(setting.targets)]
    described.append([repr(one) for one in setting.attachments])
    digest.update(json.dumps(described).encode())
    if setting.tokens is not None:
        digest.update(setting.tokens.cpu().numpy().tobytes())
    for matrix in matrices.values():
        digest.update(matrix.numpy().tobytes())
    return digest.hexdigest()
