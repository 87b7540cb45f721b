"""Folded models in memory: writes a plan's folds into a model, and builds models from a store and a plan."""

from __future__ import annotations

from typing import Any

import torch

from gyroquant.models.execution.runner import auto_class
from gyroquant.models.folding.fold import FoldPlan, fold
from gyroquant.models.stores.base import ModuleStore, WeightStore, untie


@torch.no_grad()
def write_folded(model: Any, plan: FoldPlan) -> None:
    """Writes a plan's folded parameters into the model and unties parameters that the plan unties.

    Online maps are not attached.
    """
    store, stored = ModuleStore(model), model.state_dict()
    outer = {name: tensor.clone() for name, tensor in store.read(plan.graph.outer_params()).items()}
    untied = plan.unties(outer)
    for name, tensor in fold(plan, outer, (*outer, *untied)).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if name in untied:
            module.weight = torch.nn.Parameter(tensor.to(module.weight), requires_grad=module.weight.requires_grad)
        else:
            stored[name].copy_(tensor)
    if untied:
        untie(model.config)
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in untied}
    for i in range(len(plan.graph.blocks)):
        for name, tensor in plan.read_block(store, i).items():
            stored[name].copy_(tensor)


@torch.no_grad()
def build_folded(store: WeightStore, plan: FoldPlan) -> Any:
    """A new model with the folded parameters of a store, fp32, without the plan's online maps."""
    model = auto_class(store.config).from_config(store.config, dtype=torch.float32, trust_remote_code=False)
    stored = model.state_dict()
    for name in store.shapes:
        stored[name].copy_(store.read([name])[name])
    write_folded(model, plan)
    return model.eval()
