"""Rounding by a solver from outside: the transformed model is built whole and given away."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gyroquant.export.memory import build_folded
from gyroquant.grids import QuantizedWeight
from gyroquant.job import Job
from gyroquant.models.online import Attachment, attach
from gyroquant.progress import Stages
from gyroquant.rounding.base import ModelSolver


def round_elsewhere(job: Job, progress: Stages) -> dict[str, QuantizedWeight]:
    """What a solver that takes whole models makes of a job's targets, by name; nothing for other solvers.

    Solvers from outside put modules of their own in the place of linear layers and do not run their hooks. So a layer
    with a hook is put into a container, and the hook on that.
    """
    solver = job.recipe.weights.solver
    if not isinstance(solver, ModelSolver):
        return {}
    assert job.tokens is not None
    with progress.stage(solver.name, 1) as advance:
        model = build_folded(job.store, job.plan)
        online = [one for i in range(len(job.graph.blocks)) for one in job.running_in(i)]
        places = {op.module: _contained(model, op.module, online) for op in job.targets.values()}
        attach(model, [*online, *job.running_around()])
        layers = {places[op.module]: job.grids[name] for name, op in job.targets.items()}
        with torch.enable_grad():
            found = solver.round_model(model, layers, job.tokens, job.tokenizer, job.recipe.seed)
        advance()
    return {name: found[places[op.module]] for name, op in job.targets.items()}


def _contained(model: Any, name: str, online: list[Attachment]) -> str:
    """Puts a layer that something runs with into a container; returns where it is now."""
    if all(one.module != name for one in online):
        return name
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Sequential(model.get_submodule(name)))
    return f"{name}.0"
