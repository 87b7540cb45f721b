"""Plans a recipe for a model from sizes alone: maps, layers to round, grids, quantizers of activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gyroquant.errors import RecipeError
from gyroquant.finetuning.differentiable_fold import learnable
from gyroquant.finetuning.rotations import Setting
from gyroquant.grids import Grid, LeadingOrder
from gyroquant.methods.leading import Leading
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.pipeline.folds import plan_folds
from gyroquant.recipes.schema import Recipe
from gyroquant.rounding.layers import find_targets, is_head


def plan_all(graph: ModelGraph, recipe: Recipe) -> tuple[FoldPlan, dict[str, LinearOp], list[OnlineOp]]:
    """The plan of a recipe for a model: the folds, the layers to round, and the quantizers that run with the model.

    Maps that are measured or learned later have placeholders in the plan. Raises UnsupportedModelError or RecipeError,
    with the reason, if the recipe does not fit the model. The model does not change.
    """
    plan = plan_folds(graph, recipe)
    weights = recipe.weights
    for step in weights.steps:
        step.check()
    grids = [weights.grid, *(other.grid for other in (*weights.overrides, recipe.embeddings, recipe.head) if other)]
    for grid in grids:
        grid.check()
    overridden = [override.layers for override in weights.overrides]
    own_head = recipe.head is not None and not _stays_tied(graph, plan)
    orders = leading_orders(plan, recipe)
    named = {graph.op(name).name: order for name, order in orders.items()}

    def grid_of(name: str) -> Grid:
        return weights.grid_of(name).for_input(named.get(name))

    targets = find_targets(graph, grid_of, weights.ignore, overridden, weights.basis, own_head)
    if recipe.head is not None:
        for op in filter(is_head, targets.values()):
            recipe.head.grid.for_columns(op.matrix_shape[1]).check_shape(*op.matrix_shape, op.name)
    quantizers = plan_quantizers(graph, recipe, orders)
    if recipe.learn is not None:
        learnable(plan, recipe.learn.sites)
        if rounds_while_learning(recipe) and not all(grid.coded_singly for grid in grids):
            raise RecipeError(
                "maps are not learned with weights on grids that code several together: set learn.round_weights=false"
            )
        if recipe.learn.rounds and not (quantizers or rounds_while_learning(recipe)):
            raise RecipeError(
                f"learn.objective={recipe.learn.objective} has nothing to learn from: nothing is rounded during it. "
                "Round activations or the KV cache, set learn.round_weights=true, or learn.objective=weights"
            )
    return plan, targets, quantizers


def _turns(plan: FoldPlan) -> bool:
    """Whether R1 is fused, which unties a head unless the plan keeps it tied."""
    return any(site.name == "R1" and not online for site, _, online in plan.folded)


def _stays_tied(graph: ModelGraph, plan: FoldPlan) -> bool:
    return bool(graph.tied) and (plan.keeps_ties or not _turns(plan))


def plan_tables(graph: ModelGraph, recipe: Recipe, plan: FoldPlan) -> dict[str, LinearOp]:
    """The tables of embeddings to round, by name.

    Raises RecipeError if a group size does not fit, or if a fold unties the head, so that it would be left as it is.
    """
    if recipe.embeddings is None:
        return {}
    tables = {op.weight: op for op in graph.tables}
    if not tables:
        raise RecipeError(f"{graph.config.model_type} has no table of embeddings that is described: remove embeddings")
    for op in tables.values():
        recipe.embeddings.grid.for_columns(op.matrix_shape[1]).check_shape(*op.matrix_shape, op.name)
    tied = [alias for alias, name in graph.tied.items() if name in tables]
    if tied and not recipe.keep_ties and recipe.head is None and _turns(plan):
        raise RecipeError(
            f"R1 unties {tied[0]} from the embedding, so the head would stay as it is: set keep_ties=true, give the "
            "head a section of its own, or leave embeddings out"
        )
    return tables


def plan_quantizers(
    graph: ModelGraph, recipe: Recipe, orders: Mapping[str, LeadingOrder] | None = None
) -> list[OnlineOp]:
    """The quantizers that run with the model, for inputs with these `leading_orders`.

    Raises RecipeError if a group size does not fit.
    """
    found: list[OnlineOp] = []
    if recipe.activations is not None:
        found += recipe.activations.quantizers(graph, orders or {})
    if recipe.kv_cache is not None:
        found += recipe.kv_cache.quantizers(graph)
    return found


def leading_orders(plan: FoldPlan, recipe: Recipe) -> dict[str, LeadingOrder]:
    """Where the leading directions of a layer's inputs are, by the name of the layer's weight.

    Only layers that read a site whose last map is from the method `leading` have any.
    """
    last = {name: steps[-1].method for name, steps in recipe.transform.items() if steps}
    found: dict[str, LeadingOrder] = {}
    for site, _, _ in plan.folded:
        method = last.get(site.name)
        if isinstance(method, Leading):
            for port in site.readers:
                op = plan.graph.find_op(port.param)
                if op is not None and port.axis == op.in_axis:
                    found[op.weight] = method.order(site)
    return found


def grids_of(recipe: Recipe, targets: Mapping[str, LinearOp], orders: Mapping[str, LeadingOrder]) -> dict[str, Grid]:
    """The grid of every layer that is rounded, by the name of its weight, for inputs with these `leading_orders`."""
    grids = {
        name: recipe.head.grid if recipe.head is not None and is_head(op) else recipe.weights.grid_of(op.name)
        for name, op in targets.items()
    }
    return {name: grid.for_input(orders.get(name)) for name, grid in grids.items()}


def replaced_grids(layers: Mapping[str, LinearOp], grid_of: Callable[[str], Grid]) -> list[str]:
    """A sentence for each length of rows, of these layers and tables, for which their grid takes another one."""
    names: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for name, op in layers.items():
        grid, columns = grid_of(name), op.matrix_shape[1]
        own = grid.for_columns(columns)
        if own is not grid:
            names[grid.grid, columns, f"{own.grid}, {own.bits} bits in groups of {own.group_size}"].append(name)
    return [
        f"the grid {grid} does not fit rows of {columns}, so {_counted(replaced)} get the nearest that does: {own}"
        for (grid, columns, own), replaced in names.items()
    ]


def _counted(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def rounds_while_learning(recipe: Recipe) -> bool:
    """Whether maps are learned on a model with rounded weights."""
    if recipe.learn is None or recipe.learn.round_weights is not None:
        return recipe.learn is not None and bool(recipe.learn.round_weights)
    return not recipe.weights.needs_statistics and recipe.weights.basis is None


def learning_setting(
    recipe: Recipe,
    plan: FoldPlan,
    tokens: Tensor | None,
    targets: Mapping[str, LinearOp],
    quantizers: Sequence[OnlineOp],
    dtype: torch.dtype,
) -> Setting:
    """The setting in which the rotations of a recipe are learned."""
    grids = grids_of(recipe, targets, leading_orders(plan, recipe)) if rounds_while_learning(recipe) else {}
    return Setting(
        tokens=tokens,
        targets=targets,
        grids={name: grid.for_columns(targets[name].in_features) for name, grid in grids.items()},
        attachments=quantizers,
        dtype=dtype,
        seed=recipe.seed,
    )
