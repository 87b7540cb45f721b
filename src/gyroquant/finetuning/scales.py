"""Finetuning of a rounded model: scales and gains are tuned end to end, codes do not change.

The loss is the divergence of the rounded model's prediction from the original's. The scales of groups and the gains and
biases around them change, as in the second phase of EfficientQAT (arXiv 2407.11062) and in QuIP# (arXiv 2402.04396).
Codes do not change, so the folder keeps its size.

The backward pass goes block by block. Each block is decoded and run again for it. Memory holds one block, the hidden
states of a batch before every block, and the logits of one sequence. With `keep`, memory holds all blocks, decoded, and
the activations of one sequence in all of them: nothing is run again, and the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gyroquant.calibration.stream import Stream
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.grids import QuantizedWeight, straight_through
from gyroquant.models.execution.online import OnlineOp, attached
from gyroquant.models.execution.runner import BlockRunner, Call, pass_back
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.packed import PackedStore
from gyroquant.system.environment import reused_memory
from gyroquant.system.files import save_tensors
from gyroquant.system.journal import get_state, put_state
from gyroquant.system.progress import Progress

_CHECKPOINT = 5  # steps between saved states
_MARK = "finetune"  # the journal itself identifies the run that a state belongs to


class Finetune(BaseModel):
    """Tunes the scales and gains of a rounded model end to end, with Adam.

    Options:
        steps: the number of steps; default 100.
        batch_size: windows of the calibration text in each step; default 4.
        lr: the length of a step relative to the tuned number; default 0.001. It falls to 0 along a cosine.
        scales: whether to tune the scales of groups; default true.
        gains: whether to tune the gains and biases of norms and layers; default true.
        top: the number of the original's most likely tokens that the divergence compares; default all.
        held_out: the number of windows, the last ones of the text, that are not trained on; default 4. The result is
            kept only if it is better on them.
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
    def _tunes_something(self) -> Finetune:
        if not (self.scales or self.gains):
            raise ValueError("scales: false and gains: false leave nothing to tune; set one of them to true")
        return self


@torch.no_grad()
def finetune(
    store: PackedStore,
    original: WeightStore,
    tokens: Tensor,
    settings: Finetune,
    dtype: torch.dtype,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Tunes a packed folder in place on tokens of shape (samples, length). Some samples must remain besides `held_out`.

    `keep` takes more memory and less time.

    With `checkpoint`, a file, the state is saved there every few steps, and a run that was stopped continues from it.
    Returns the loss of every step, the divergence on the held-out windows before and after, and whether the result was
    kept.
    """
    blocks = len(original.graph.blocks)
    outer = original.read(original.graph.outer_params())
    stream = Stream(BlockRunner.of(original), tokens, outer, dtype)
    with progress.stage("finetune: run the original", blocks) as advance:
        stream.run_all(original, advance)
    model = _Model(store, settings, dtype, keep)
    batches = _Batches(model, stream, outer, tokens, settings)
    with progress.stage("finetune", settings.steps + 2) as advance, reused_memory():
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
        _replace_arrays(store, model.result())
    return {"losses": losses, "held_out": [before, after], "kept": after < before}


class _Model:
    """The parameters of the rounded model. A tuned parameter is its stored value times ``1 + moved``.

    - `keep`: whether weights that do not change are kept decoded.
    """

    def __init__(self, store: PackedStore, settings: Finetune, dtype: torch.dtype, keep: bool = False):
        self.store, self.graph, self.dtype, self.keep = store, store.graph, dtype, keep
        self._kept: dict[str, Tensor] = {}
        rounded = set(store.description["tensors"])
        *blocks, outer = self.graph.params
        names = [name for block in blocks for name in block]
        self.moved: dict[str, Tensor] = {}
        for name in names:
            if name in rounded and settings.scales:
                self.moved[name] = torch.zeros_like(store.quantized(name).params.scale)
        for name in (*names, *outer):
            if name not in rounded and settings.gains and len(store.shapes[name]) == 1:
                self.moved[name] = torch.zeros(store.shapes[name])
        for tensor in self.moved.values():
            tensor.requires_grad_()
        tuned = ((name, store.quantized(name)) for name in self.moved if name in rounded)
        self._by_output = {name: (w.grid, w.params) for name, w in tuned if self._scales_outputs(name, w)}

    def _scales_outputs(self, name: str, weight: QuantizedWeight) -> bool:
        """Whether the scales of a weight scale the outputs of a module: one for each of its rows."""
        op = self.graph.op(name)
        module = self.store.skeleton().get_submodule(op.module)
        plain = isinstance(module, (nn.Linear, Conv1D)) and not op.entry.stacked
        return plain and weight.basis is None and weight.params.scale.shape[1] == 1

    def ratios(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The current scales over the stored ones, a leaf for each layer whose scales scale outputs, by the name of its
        weight.
        """
        found = {}
        for name in names:
            if name in self._by_output:
                grid, stored = self._by_output[name]
                scale = stored.scale * (1 + self.moved[name].detach())
                ratio = grid.round_params(scale, stored.zero).scale / torch.where(stored.scale == 0, 1.0, stored.scale)
                found[name] = torch.where(stored.scale == 0, 1.0, ratio).flatten().requires_grad_()
        return found

    @contextmanager
    def scaling(self, ratios: Mapping[str, Tensor]) -> Iterator[None]:
        """While it lasts, the outputs of these layers, without their biases, are multiplied by the leaves."""
        with ExitStack() as hooks:
            for name, leaf in ratios.items():
                module = self.store.skeleton().get_submodule(self.graph.op(name).module)
                hooks.callback(module.register_forward_hook(_multiply(leaf), prepend=True).remove)
            yield

    def collect(self, ratios: Mapping[str, Tensor]) -> None:
        """Adds the gradients of the leaves to those of the tuned scales: ``1 + moved`` is the ratio before rounding.

        So the gradient of the weight itself, as costly as another forward pass, is not needed.
        """
        for name, leaf in ratios.items():
            if leaf.grad is not None:
                moved = self.moved[name]
                gradient = leaf.grad.view_as(moved)
                moved.grad = gradient if moved.grad is None else moved.grad + gradient

    def rescaled(self, name: str) -> tuple[QuantizedWeight, Tensor]:
        """A rounded weight with its current scales, rounded to storable numbers, and these scales with gradients."""
        weight, change = self.store.quantized(name), self.moved[name]
        scale = weight.params.scale * (1 + change)
        storable = weight.grid.round_params(scale.detach(), weight.params.zero)
        return replace(weight, params=storable), straight_through(scale, storable.scale)

    def params(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The current parameters, fp32, with gradients to the tuned tensors. Those with a ratio have their stored
        scales.
        """
        return {name: self._param(name) for name in names}

    def _unchanged(self, name: str) -> Tensor:
        """A parameter as it is stored, fp32, kept if that is asked for."""
        value = self._kept.get(name)
        if value is None:
            value = self.store.read([name])[name].float()
            if self.keep:
                self._kept[name] = value
        return value

    def _param(self, name: str) -> Tensor:
        change = self.moved.get(name)
        if change is None or name in self._by_output:
            return self._unchanged(name)
        if name not in self.store.description["tensors"]:
            stored = self.store.read([name])[name]
            value = stored.float() * (1 + change)
            return straight_through(value, value.to(stored.dtype).float())
        weight, scale = self.rescaled(name)
        rows = len(weight.codes)
        steps = weight.grid.decode(weight.codes.view(rows, scale.shape[1], -1), weight.params) / weight.params.scale
        numbers = (steps * scale).view(rows, -1)
        matrix = numbers if weight.basis is None else weight.basis.decode(numbers)
        return self.graph.op(name).to_param(matrix)

    def leaves(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Detached parameters for the model to run on, in its dtype. Those with tuned tensors collect gradients."""
        return {name: t.detach().to(self.dtype).requires_grad_(t.requires_grad) for name, t in params.items()}

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The arrays of the folder that have changed."""
        arrays: dict[str, Tensor] = {}
        for name in self.moved:
            if name in self.store.description["tensors"]:
                weight, _ = self.rescaled(name)
                arrays |= {f"{name}_{part}": array for part, array in weight.pack().items()}
            else:
                stored = self.store.read([name])[name]
                arrays[name] = self._param(name).to(stored.dtype)
        return arrays


def _multiply(leaf: Tensor) -> Callable[..., Tensor]:
    """A hook that multiplies the outputs of a module, without its bias, by a leaf."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        scale, bias = leaf.to(output.dtype), module.bias
        return output * scale if bias is None else (output - bias) * scale + bias

    return hook


class _Batches:
    """Forward and backward passes of the rounded model over windows of the text."""

    def __init__(
        self, model: _Model, original: Stream, outer: Mapping[str, Tensor], tokens: Tensor, settings: Finetune
    ):
        self.model, self.original, self.tokens, self.settings = model, original, tokens, settings
        self.runner = BlockRunner.of(model.store, model.store.online)
        self.runner.check_separate("finetuning")
        self._outer = original.local(outer)
        self._adam = torch.optim.Adam(model.moved.values(), lr=settings.lr)
        self.before = math.inf  # the divergence on the held-out windows before the first step

    def save(self, path: Path, losses: list[float]) -> None:
        """Saves the tuned tensors and the optimizer's state."""
        tensors = {f"value.{name}": tensor for name, tensor in self.model.moved.items()}
        for name, tensor in self.model.moved.items():
            tensors |= {f"{kind}.{name}": value for kind, value in self._adam.state[tensor].items()}
        put_state(path, tensors, _MARK, [self.before, losses])

    @torch.no_grad()
    def resume(self, path: Path) -> list[float]:
        """Loads a saved state and returns the losses up to it. Returns an empty list if there is no saved state."""
        state = get_state(path, _MARK)
        if state is None:
            return []
        tensors, (self.before, losses) = state
        for name, tensor in self.model.moved.items():
            tensor.copy_(tensors[f"value.{name}"])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            self._adam.state[tensor] = {
                kind: tensors[f"{kind}.{name}"] for kind in kinds if f"{kind}.{name}" in tensors
            }
        return list(losses)

    def _online(self, index: int) -> list[OnlineOp]:
        return self.model.graph.in_block(index, self.model.store.online)

    def _forward(self, picks: list[int]) -> tuple[list[list[Tensor]], list[list[Call]]]:
        """The hidden states of windows before every block and after the last, and the arguments of blocks."""
        outer = self.model.leaves(self.model.params(self.model.graph.outer_params()))
        starts = [self.runner.begin(self.tokens[pick : pick + 1], outer) for pick in picks]
        states, calls = [[first for first, _ in starts]], [calls for _, calls in starts]
        for index in range(len(self.model.graph.blocks)):
            names = self.model.graph.block_params(index)
            tensors, ratios = self.model.leaves(self.model.params(names)), self.model.ratios(names)
            with attached(self.model.store.skeleton(), self._online(index)), self.model.scaling(ratios):
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
            expected = self.original.runner.finish(self.original.hidden[pick : pick + 1], self._outer)
        with attached(self.model.store.skeleton(), self.model.graph.around_blocks(self.model.store.online)):
            logits = self.runner.logits(state, outer)
        return mean_divergence(expected.float().log_softmax(-1), logits.float().log_softmax(-1), self.settings.top)

    def held_out(self) -> float:
        """The mean divergence on the held-out windows."""
        picks = list(range(len(self.tokens) - self.settings.held_out, len(self.tokens)))
        total, outer = 0.0, self.model.leaves(self.model.params(self.model.graph.outer_params()))
        for pick in picks:
            states, _ = self._forward([pick])
            total += float(self._loss(pick, states[-1][0], outer)) / len(picks)
        return total

    def step(self, picks: list[int], number: int) -> float:
        """Takes step `number` on these windows. Returns the loss before it."""
        with torch.enable_grad():
            params = self.model.params(self.model.graph.outer_params())
            leaves = self.model.leaves(params)
            total = (self._at_once if self.model.keep else self._block_by_block)(picks, leaves)
            pass_back(params, leaves)
            for group in self._adam.param_groups:
                group["lr"] = self.settings.lr * (1 + math.cos(math.pi * number / self.settings.steps)) / 2
            self._adam.step()
            self._adam.zero_grad()
        return total

    def _at_once(self, picks: list[int], outer: Mapping[str, Tensor]) -> float:
        """Runs whole sequences forwards and backwards. Returns the loss; gradients go to the tuned tensors."""
        model, total = self.model, 0.0
        blocks = [model.graph.block_params(index) for index in range(len(model.graph.blocks))]
        params, ratios = [model.params(names) for names in blocks], [model.ratios(names) for names in blocks]
        leaves = [model.leaves(tensors) for tensors in params]
        for pick in picks:
            with torch.no_grad():
                state, calls = self.runner.begin(self.tokens[pick : pick + 1], outer)
            for index in range(len(blocks)):
                with attached(model.store.skeleton(), self._online(index)), model.scaling(ratios[index]):
                    state = self.runner.differentiable(index, leaves[index], state, calls[index])
            loss = self._loss(pick, state, outer) / len(picks)
            loss.backward()
            total += float(loss.detach())
        for index in reversed(range(len(blocks))):
            pass_back(params[index], leaves[index])
            model.collect(ratios[index])
        return total

    def _block_by_block(self, picks: list[int], outer: Mapping[str, Tensor]) -> float:
        """The same with one block in memory."""
        with torch.no_grad():
            states, calls = self._forward(picks)
        total, gradients = 0.0, []
        for pick, state in zip(picks, states.pop(), strict=True):
            last = state.detach().requires_grad_()
            loss = self._loss(pick, last, outer) / len(picks)
            loss.backward()
            total += float(loss.detach())
            gradients.append(last.grad)
        for index in reversed(range(len(self.model.graph.blocks))):
            gradients = self._backward(index, states.pop(), calls, gradients)
        return total

    def _backward(
        self, index: int, states: list[Tensor], calls: list[list[Call]], gradients: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Runs a block again and propagates the gradients of its outputs to its inputs and to the tuned tensors.

        Returns the gradients of its inputs.
        """
        names = self.model.graph.block_params(index)
        params, ratios = self.model.params(names), self.model.ratios(names)
        leaves, input_gradients = self.model.leaves(params), []
        with attached(self.model.store.skeleton(), self._online(index)), self.model.scaling(ratios):
            for state, call, gradient in zip(states, calls, gradients, strict=True):
                first = state.detach().requires_grad_()
                out = self.runner.differentiable(index, leaves, first, call[index])
                torch.autograd.backward(out, gradient)
                input_gradients.append(first.grad)
        pass_back(params, leaves)
        self.model.collect(ratios)
        return input_gradients


def _replace_arrays(store: PackedStore, arrays: Mapping[str, Tensor]) -> None:
    """Replaces arrays in a folder's files by those of the same name."""
    for path in sorted(store.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata()
        if tensors.keys() & arrays.keys():
            fresh = path.with_suffix(".partial")
            save_tensors({key: arrays.get(key, tensor) for key, tensor in tensors.items()}, fresh, metadata)
            fresh.replace(path)
