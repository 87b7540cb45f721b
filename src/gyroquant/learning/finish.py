"""The last touch to a rounded model: scales and gains tuned end to end, codes as they are.

The loss is the divergence of the rounded model's prediction from the original's. Codes stay, so the folder stays as
large; what moves are the scales of groups and the gains and biases around them (as in EfficientQAT's second phase,
arXiv 2407.11062, and QuIP#, arXiv 2402.04396). Gradients go back block by block, each decoded and run again when its
turn comes: memory holds one block, the hidden states of a batch in front of every block, and one sequence's logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.files import save_tensors
from gyroquant.grids import QuantizedWeight, straight_through
from gyroquant.journal import get_state, put_state
from gyroquant.learning.objectives import divergence
from gyroquant.models.online import Attachment, attached
from gyroquant.models.packed import PackedStore, from_matrix
from gyroquant.models.runner import BlockRunner, Call, pass_back
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages

_CHECKPOINT = 5  # steps between states that are kept
_MARK = "finish"  # the journal knows what a state belongs to


class Finish(BaseModel):
    """How the last touch is given: `steps` of `batch_size` windows of the calibration text, by Adam.

    `lr` is the length of a step relative to what moves, and falls to nothing along a cosine. `scales` and `gains` say
    what is tuned; `top` takes the divergence among as many of the original's likeliest tokens. The last `held_out`
    windows are not trained on: what does not help there is not kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: Annotated[int, Field(gt=0, le=1_000_000)] = 100
    batch_size: Annotated[int, Field(gt=0)] = 4
    lr: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    scales: bool = True
    gains: bool = True
    top: Annotated[int, Field(gt=1)] | None = None
    held_out: Annotated[int, Field(gt=0)] = 4

    @model_validator(mode="after")
    def _something(self) -> Finish:
        if not (self.scales or self.gains):
            raise ValueError("scales: false and gains: false leave nothing to tune")
        return self


@torch.no_grad()
def finish(
    store: PackedStore,
    original: WeightStore,
    tokens: Tensor,
    settings: Finish,
    dtype: torch.dtype,
    seed: int,
    progress: Stages,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Tunes a packed folder in place, on tokens of shape (samples, length), more samples than are held out, and says
    how it went. With `checkpoint`, a file, the state is kept there now and then, and what was stopped goes on from it.
    """
    blocks = len(original.graph.blocks)
    outer = original.read(original.graph.outer_params())
    stream = Stream(BlockRunner(original.skeleton(), original.graph), tokens, outer, dtype)
    with progress.stage("run the original", blocks) as advance:
        stream.run_all(original, advance)
    model = _Model(store, settings, dtype)
    batches = _Batches(model, stream, outer, tokens, settings)
    with progress.stage("finish", settings.steps + 2) as advance:
        losses: list[float] = [] if checkpoint is None else batches.resume(checkpoint)
        before = batches.before if losses else batches.held_out()
        batches.before = before
        advance()
        for step in range(settings.steps):
            if step >= len(losses):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
                picks = torch.randperm(len(tokens) - settings.held_out, generator=generator)[: settings.batch_size]
                losses.append(batches.step(picks.tolist(), step))
                if checkpoint is not None and len(losses) % _CHECKPOINT == 0:
                    batches.save(checkpoint, losses)
            advance()
        after = batches.held_out()
        advance()
    if after < before:
        _write(store, model.result())
    return {"losses": losses, "held_out": [before, after], "kept": after < before}


class _Model:
    """The rounded model's parameters, those that move as what they are times ``1 + moved``."""

    def __init__(self, store: PackedStore, settings: Finish, dtype: torch.dtype):
        self.store, self.graph, self.dtype = store, store.graph, dtype
        rounded = set(store.description["tensors"])
        names = [name for index in range(len(self.graph.blocks)) for name in self.graph.block_params(index)]
        self.moved: dict[str, Tensor] = {}
        for name in names:
            if name in rounded and settings.scales:
                self.moved[name] = torch.zeros_like(store.quantized(name).params.scale)
        for name in (*names, *self.graph.outer_params()):
            if name not in rounded and settings.gains and len(store.shapes[name]) == 1:
                self.moved[name] = torch.zeros(store.shapes[name])
        for tensor in self.moved.values():
            tensor.requires_grad_()

    def rescaled(self, name: str) -> tuple[QuantizedWeight, Tensor]:
        """A rounded weight with the scales that can be stored now, and these with gradients."""
        weight, moved = self.store.quantized(name), self.moved[name]
        scale = weight.params.scale * (1 + moved)
        kept = weight.grid.storable(scale.detach(), weight.params.zero)
        return replace(weight, params=kept), straight_through(scale, kept.scale)

    def made(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Parameters as they are now, fp32, with gradients to what moves."""
        return {name: self._made(name) for name in names}

    def _made(self, name: str) -> Tensor:
        tensor = self.moved.get(name)
        if tensor is None:
            return self.store.read([name])[name].float()
        if name not in self.store.description["tensors"]:
            stored = self.store.read([name])[name]
            value = stored.float() * (1 + tensor)
            return straight_through(value, value.to(stored.dtype).float())
        weight, scale = self.rescaled(name)
        rows = len(weight.codes)
        steps = weight.grid.decode(weight.codes.view(rows, scale.shape[1], -1), weight.params) / weight.params.scale
        numbers = (steps * scale).view(rows, -1)
        matrix = numbers if weight.basis is None else weight.basis.decode(numbers)
        entry = self.store.description["tensors"][name]
        return from_matrix(matrix, self.store.shapes[name], bool(entry.get("transposed")))

    def leaves(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters for the model to run on, in its dtype; gradients gather in those of what moves."""
        return {name: t.detach().to(self.dtype).requires_grad_(t.requires_grad) for name, t in made.items()}

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The arrays of the folder that are others now."""
        arrays: dict[str, Tensor] = {}
        for name in self.moved:
            if name in self.store.description["tensors"]:
                weight, _ = self.rescaled(name)
                arrays |= {f"{name}_{part}": array for part, array in weight.pack().items()}
            else:
                stored = self.store.read([name])[name]
                arrays[name] = self._made(name).to(stored.dtype)
        return arrays


class _Batches:
    """Passes of the rounded model over windows of the text, forth and back."""

    def __init__(self, model: _Model, original: Stream, outer: Mapping[str, Tensor], tokens: Tensor, settings: Finish):
        self.model, self.original, self.tokens, self.settings = model, original, tokens, settings
        self.runner = BlockRunner(model.store.skeleton(), model.graph)
        self._outer = original.local(outer)
        self._adam = torch.optim.Adam(model.moved.values(), lr=settings.lr)
        self.before = math.inf  # the divergence on what is held out, before the first step

    def save(self, path: Path, losses: list[float]) -> None:
        """Keeps what moves and the optimizer's state."""
        tensors = {f"value.{name}": tensor for name, tensor in self.model.moved.items()}
        for name, tensor in self.model.moved.items():
            tensors |= {f"{kind}.{name}": value for kind, value in self._adam.state[tensor].items()}
        put_state(path, tensors, _MARK, [self.before, losses])

    @torch.no_grad()
    def resume(self, path: Path) -> list[float]:
        """Takes up a state that was kept; returns the losses until then, none where nothing was kept."""
        found = get_state(path, _MARK)
        if found is None:
            return []
        tensors, (self.before, losses) = found
        for name, tensor in self.model.moved.items():
            tensor.copy_(tensors[f"value.{name}"])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            self._adam.state[tensor] = {
                kind: tensors[f"{kind}.{name}"] for kind in kinds if f"{kind}.{name}" in tensors
            }
        return list(losses)

    def _online(self, index: int) -> list[Attachment]:
        return self.model.graph.in_block(index, self.model.store.online)

    def _forth(self, picks: list[int]) -> tuple[list[list[Tensor]], list[list[Call]]]:
        """The hidden states of windows in front of every block and behind the last, and how blocks are called."""
        outer = self.model.leaves(self.model.made(self.model.graph.outer_params()))
        begun = [self.runner.begin(self.tokens[pick : pick + 1], outer) for pick in picks]
        states, calls = [[first for first, _ in begun]], [calls for _, calls in begun]
        for index in range(len(self.model.graph.blocks)):
            tensors = self.model.leaves(self.model.made(self.model.graph.block_params(index)))
            with attached(self.model.store.skeleton(), self._online(index)):
                states.append(
                    [
                        self.runner.run(index, tensors, state, call[index])
                        for state, call in zip(states[-1], calls, strict=True)
                    ]
                )
        return states, calls

    def _loss(self, pick: int, state: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        assert self.original.hidden is not None
        with torch.no_grad():
            wanted = self.original.runner.finish(self.original.hidden[pick : pick + 1], self._outer)
        with attached(self.model.store.skeleton(), self.model.graph.around_blocks(self.model.store.online)):
            found = self.runner.logits(state, outer)
        return divergence(wanted.float().log_softmax(-1), found.float().log_softmax(-1), self.settings.top)

    def held_out(self) -> float:
        """The mean divergence on the windows that are not trained on."""
        picks = list(range(len(self.tokens) - self.settings.held_out, len(self.tokens)))
        total, outer = 0.0, self.model.leaves(self.model.made(self.model.graph.outer_params()))
        for pick in picks:
            states, _ = self._forth([pick])
            total += float(self._loss(pick, states[-1][0], outer)) / len(picks)
        return total

    def step(self, picks: list[int], number: int) -> float:
        """Takes a step on these windows; returns the loss in front of it."""
        states, calls = self._forth(picks)
        with torch.enable_grad():
            made = self.model.made(self.model.graph.outer_params())
            leaves, total, slopes = self.model.leaves(made), 0.0, []
            for pick, state in zip(picks, states.pop(), strict=True):
                last = state.detach().requires_grad_()
                loss = self._loss(pick, last, leaves) / len(picks)
                loss.backward()
                total += float(loss.detach())
                slopes.append(last.grad)
            pass_back(made, leaves)
            for index in reversed(range(len(self.model.graph.blocks))):
                slopes = self._back(index, states.pop(), calls, slopes)
            for group in self._adam.param_groups:
                group["lr"] = self.settings.lr * (1 + math.cos(math.pi * number / self.settings.steps)) / 2
            self._adam.step()
            self._adam.zero_grad()
        return total

    def _back(
        self, index: int, states: list[Tensor], calls: list[list[Call]], slopes: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Runs a block again and takes the slopes of its outputs to its inputs and to what moves."""
        made = self.model.made(self.model.graph.block_params(index))
        leaves, found = self.model.leaves(made), []
        with attached(self.model.store.skeleton(), self._online(index)):
            for state, call, slope in zip(states, calls, slopes, strict=True):
                first = state.detach().requires_grad_()
                out = self.runner.differentiable(index, leaves, first, call[index])
                torch.autograd.backward(out, slope)
                found.append(first.grad)
        pass_back(made, leaves)
        return found


def _write(store: PackedStore, arrays: Mapping[str, Tensor]) -> None:
    """Puts arrays in the place of those of the same name in a folder's files."""
    for path in sorted(store.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata()
        if tensors.keys() & arrays.keys():
            fresh = path.with_suffix(".partial")
            save_tensors({key: arrays.get(key, tensor) for key, tensor in tensors.items()}, fresh, metadata)
            fresh.replace(path)
