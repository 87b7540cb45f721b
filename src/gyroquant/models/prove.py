"""The proof: the folded model is the same function as the original, measured on real tokens in fp32, block by block.

Three streams of hidden states pass through the model, one block at a time, so that no two whole models are ever held:
the original's; the folded model's own, whose logits are compared in the end; and the original's carried over into the
folded basis in front of each block, which shows each block's own error and so names the one that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gyroquant.errors import ProofError
from gyroquant.maps import Map, product
from gyroquant.models.fold import FoldPlan, fold
from gyroquant.models.graph import LinearOp, ModelGraph
from gyroquant.models.online import attached
from gyroquant.models.runner import BlockRunner

Progress = Callable[[int, int], None]
_AROUND = "the embeddings, the last norm or the head"
_IMAGE_ROWS = 64  # random inputs of each projection of images


class Source(Protocol):
    """Where original parameters come from."""

    def read(self, names: tuple[str, ...]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Proof:
    """What was measured. Errors are relative: norm of the difference over norm of the original.

    `relative_logit_error` is over all logits, or of what a model that takes images adds to the residual stream where
    that is larger; `block_errors` are each block's own, at its worst token.
    """

    relative_logit_error: float
    worst_block: int
    worst_block_error: float
    threshold: float
    tokens: int
    block_errors: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"block_errors": list(self.block_errors)}


def residual_map(plan: FoldPlan) -> Map | None:
    """The change of basis of the residual stream that a plan fuses, or None."""
    fused = [m for site, m, online in plan.folded if site.name == "R1" and not online]
    return product(*fused) if fused else None


def fp32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in fp32; whole numbers, which buffers may hold, stay as they are."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def worst_token_error(reference: Tensor, other: Tensor) -> float:
    """The largest ``|other - reference| / |reference|`` over tokens (the last dimension is the vector); NaN counts as
    inf.
    """
    error = (other - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)
    return float(torch.nan_to_num(error, nan=torch.inf).max())


def folded_outer(plan: FoldPlan, outer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The folded parameters around the blocks, with those that are no longer tied under their own names."""
    return fp32(fold(plan, outer, (*outer, *plan.unties(outer))))


def prove(
    source: Source,
    plan: FoldPlan,
    runner: BlockRunner,
    input_ids: Tensor,
    threshold: float = 1e-4,
    progress: Progress = lambda done, total: None,
    blocks: int | None = None,
) -> Proof:
    """Compares the original with the folded model on `input_ids`, shape (batch, length).

    With `blocks`, only the first of them are run, which proves nothing and tells what running costs.
    Raises ProofError, naming the worst block and the sites in it, when an error exceeds `threshold`.
    """
    graph, change = plan.graph, residual_map(plan)
    there = change.apply if change else lambda x: x
    back = change.inverse().apply if change else lambda x: x
    outer = source.read(graph.outer_params())
    original, calls = runner.begin(input_ids, fp32(outer))
    folded, _ = runner.begin(input_ids, folded_outer(plan, outer))
    errors: list[float] = []
    for i, call in enumerate(calls[:blocks]):
        tensors = source.read(graph.block_params(i))
        changed = fp32(fold(plan, tensors))
        with attached(runner.model, plan.online_in(i)):
            folded = runner.run(i, changed, folded, call)
            alone = runner.run(i, changed, there(original), call)
        original = runner.run(i, fp32(tensors), original, call)
        errors.append(worst_token_error(original, back(alone)))
        progress(i + 1, len(calls))
    changed = folded_outer(plan, outer)
    wanted = runner.finish(original, fp32(outer))
    got = runner.finish(folded, changed)
    error = float(torch.nan_to_num((got - wanted).norm() / wanted.norm(), nan=torch.inf))
    image_error = _image_error(graph, outer, changed, back)
    worst = max(range(len(errors)), key=errors.__getitem__)
    head = "what writes images into the residual stream" if image_error > error else _AROUND
    error = max(error, image_error)
    proof = Proof(error, worst, errors[worst], threshold, input_ids.numel(), tuple(errors))
    if not max(error, errors[worst]) <= threshold:
        sites = sorted({site.name for site, _, _ in plan.folded if site.block in (None, worst)})
        place = f"block {worst}" if errors[worst] > threshold else head
        raise ProofError(
            f"folding {', '.join(sites)} changed the model: relative logit error {error:.2e}, worst block {worst} with "
            f"{errors[worst]:.2e} (threshold {threshold:.0e}). The fault lies in {place}. Nothing was changed; leave a "
            f"site out (--set transform.{sites[0] if sites else 'R1'}=null) to find it"
        )
    return proof


def _image_error(
    graph: ModelGraph, outer: Mapping[str, Tensor], changed: Mapping[str, Tensor], back: Callable[[Tensor], Tensor]
) -> float:
    """How far projections of images into the residual stream are from themselves once they are folded, relatively, on
    random numbers: no token passes through them.
    """
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for op in graph.outer.readers("image"):
        x = torch.randn(_IMAGE_ROWS, op.in_features, generator=generator)

        def project(weights: Mapping[str, Tensor], op: LinearOp = op, x: Tensor = x) -> Tensor:
            bias = None if op.bias is None else weights[op.bias].float().cpu()
            return torch.nn.functional.linear(x, weights[op.weight].float().cpu(), bias)

        worst = max(worst, worst_token_error(project(outer), back(project(changed))))
    return worst
