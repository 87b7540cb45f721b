"""One pass of calibration windows forwards through the unrounded model, and of the loss's gradient backwards.

The loss is that of labels drawn from the model's own predictions, so the mean square of its gradient is the Fisher
information. Both directions go block by block: memory holds one block, and the inputs of all blocks for the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.pipeline.cost_probe import CostProbe, Ticks
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.system.environment import reused_memory
from gyroquant.system.progress import Advance

See = Callable[[LinearOp, Tensor, Tensor | None], None]
"""A function of a layer, its inputs and the gradient of the loss at its outputs, shape (tokens, features), for one
window. The gradient is None if the loss does not depend on the outputs.
"""
Visit = Callable[[int, Mapping[str, Tensor]], See]
"""A function of a block's number and folded parameters. It returns what sees the block's layers."""


class BackwardPass:
    """Runs the windows of a stream.

    - `first`: the number of its first window among all calibration windows; the seed of labels depends on it.
    """

    def __init__(self, job: Job, stream: Stream, outer: Mapping[str, Tensor], first: int = 0):
        self.job, self.stream, self.outer, self.first = job, stream, outer, first

    def run(self, visit: Visit, advance: Advance) -> list[Tensor]:
        """Runs both directions; reports progress twice a block. Returns, for every window, the gradient of the loss at
        the inputs of the first block. The stream ends after the last block.
        """
        with reused_memory():
            return self._run(visit, advance)

    def _run(self, visit: Visit, advance: Advance) -> list[Tensor]:
        job, stream, blocks = self.job, self.stream, len(self.job.graph.blocks)
        assert stream.hidden is not None
        states: list[Tensor] = []
        for index in range(blocks):
            states.append(stream.hidden.clone())
            with attached(job.store.skeleton(), job.plan.online_in(index)):
                stream.run(index, job.plan.read_block(job.store, index))
            advance()
        gradients = self._loss_gradients()
        for index in reversed(range(blocks)):
            gradients = self._block(index, states.pop(), gradients, visit)
            advance()
        return gradients

    def _loss_gradients(self) -> list[Tensor]:
        """For every window, the gradient of the loss at the last hidden states."""
        job, stream = self.job, self.stream
        assert stream.hidden is not None
        generator = torch.Generator().manual_seed(job.recipe.seed + self.first)
        local, found = stream.local(self.outer), []
        around = attached(job.store.skeleton(), job.graph.around_blocks(job.plan.online))
        with around, torch.enable_grad():
            for window in stream.hidden.split(1):
                state = window.to(stream.device).requires_grad_()
                predicted = stream.runner.logits(state, local)[0].float().log_softmax(-1)
                labels = torch.multinomial(predicted.detach().exp().cpu(), 1, generator=generator)
                (gradient,) = torch.autograd.grad(-predicted.gather(1, labels.to(predicted.device)).sum(), state)
                found.append(gradient)
        return found

    def _block(self, index: int, states: Tensor, gradients: Sequence[Tensor], visit: Visit) -> list[Tensor]:
        job, stream = self.job, self.stream
        tensors = job.plan.read_block(job.store, index)
        local, see, found = stream.local(tensors), visit(index, tensors), []
        ops = {op.weight: op for op in job.graph.blocks[index].linears if op.weight in job.targets}
        for window, (state, gradient) in enumerate(zip(states.split(1), gradients, strict=True)):
            first = state.to(stream.device).requires_grad_()
            with _observed(job, index, ops) as seen, torch.enable_grad():
                torch.autograd.backward(stream.few(index, local, first, [window]), gradient)
            assert first.grad is not None
            found.append(first.grad)
            for name, op in ops.items():
                for inputs, outputs in seen[name]:
                    there = None if outputs.grad is None else outputs.grad.flatten(0, -2)
                    see(op, inputs.flatten(0, -2), there)
        return found


class _observed(ExitStack):  # noqa: N801 - used like a function
    """While it lasts, the inputs and outputs of a block's layers are kept, the outputs with their gradients."""

    def __init__(self, job: Job, index: int, ops: Mapping[str, LinearOp]):
        super().__init__()
        model = job.store.skeleton()
        self.enter_context(attached(model, job.plan.online_in(index)))
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ops}
        for name, op in ops.items():
            handle = model.get_submodule(op.module).register_forward_hook(self._keeper(name))
            self.callback(handle.remove)

    def _keeper(self, name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            self.seen[name].append((inputs[0].detach(), output))

        return keep

    def __enter__(self) -> Any:
        super().__enter__()
        return self.seen


def backward_memory(model: MemoryModel, windows: int, held: int) -> float:
    """Bytes of a pass: inputs of every block for all windows, and the largest of one block with gradients and `held`
    more bytes, logits, and rounded tables.
    """
    state, block = model.length * model.width * model.compute, model.numel(model.block)
    states = (len(model.graph.blocks) + 2) * windows * state
    backward = model.folded(model.block) + 8 * block + held + 3 * model.activations(model.length, 4)
    logits = 6 * 4 * model.length * model.graph.config.vocab_size
    tables = 16 * sum(op.numel for op in model.job.tables.values())
    around = model.outer_folded + model.compute * model.outer_numel
    return model.measured_maps + around + states + max(backward, logits, tables)


def backward_cost(probe: CostProbe, windows: int, at_once: int) -> tuple[float, int]:
    """Seconds of a pass over `windows`, and bytes of the inputs of all blocks for the windows that run at once.

    Measured on the first block, which runs once, and once more with gradients and backwards.
    """
    job = probe.job
    runner = BlockRunner.of(job.store, job.plan.online)
    outer = job.plan.read_outer(job.store)
    stream = Stream(runner, probe.sample[:1], outer, job.compute_dtype, None, job.output.device)
    assert stream.hidden is not None
    local, ticks = stream.local(job.plan.read_block(job.store, 0)), Ticks()
    with attached(runner.model, job.plan.online_in(0)), torch.enable_grad():
        stream.few(0, local, stream.hidden.detach(), [0])
        first = stream.hidden.detach().to(stream.device).requires_grad_()
        stream.few(0, local, first, [0]).sum().backward()
    ticks.tick()
    blocks = len(job.graph.blocks)
    return ticks.last() * windows * blocks, (blocks + 1) * at_once * first.numel() * first.element_size()
