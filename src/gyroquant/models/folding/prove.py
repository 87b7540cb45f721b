"""The proof: measures whether the folded model is the same function as the original, on real tokens, in fp32.

Three streams of hidden states pass through the model, one block at a time, so memory never holds two whole models:

- The original's hidden states.
- The folded model's hidden states. Their logits are compared at the end.
- The original's hidden states, changed to the folded basis before each block. They give each block's own error, and so
  the name of the block that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import ProofError
from gyroquant.maps import Map, product
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner, own_mappings
from gyroquant.models.folding.fold import FoldPlan, Source, fold, folded_outer, fp32
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph

Progress = Callable[[int, int], None]
_AROUND = "the embeddings, the last norm or the head"
_IMAGE_ROWS = 64  # random inputs of each projection of images


@dataclass(frozen=True)
class Proof:
    """Relative errors: the norm of the difference, divided by the norm of the original.

    - relative_logit_error: the error of all logits, or of the image projections if that is larger.
    - worst_block, worst_block_error: the block with the largest error of its own, and that error.
    - block_errors: each block's own error, at its worst token.
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
    """The change of basis of the residual stream that a plan fuses. None if it does not change."""
    fused = [m for site, m, online in plan.folded if site.name == "R1" and not online]
    return product(*fused) if fused else None


def worst_token_error(reference: Tensor, other: Tensor) -> float:
    """The largest ``|other - reference| / |reference|`` over tokens. NaN counts as inf.

    Vectors lie along the last dimension.
    """
    error = (other - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)
    return float(torch.nan_to_num(error, nan=torch.inf).max())


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

    With `blocks`, only as many blocks run. That proves nothing, but measures the cost. Raises ProofError, with the
    worst block and its sites, if an error exceeds `threshold`.
    """
    graph, change = plan.graph, residual_map(plan)
    forward = change.apply if change else lambda x: x
    back = change.inverse().apply if change else lambda x: x
    outer = source.read(graph.outer_params())
    original, calls = runner.begin(input_ids, fp32(outer))
    with attached(runner.model, graph.around_blocks(plan.online)):
        folded, folded_calls = runner.begin(input_ids, folded_outer(plan, outer))
    errors: list[float] = []
    for i in range(len(calls[:blocks])):
        tensors = source.read(graph.block_params(i))
        changed = fp32(fold(plan, tensors))
        with attached(runner.model, plan.online_in(i)):
            # blocks may share values, whose basis may have changed: this run reads those of the folded model
            alone = runner.run(i, changed, forward(original), own_mappings(folded_calls[i]))
            folded, *more = runner.step(i, changed, folded, folded_calls[i])
            runner.advance(folded_calls, i, more)
        original, *more = runner.step(i, fp32(tensors), original, calls[i])
        runner.advance(calls, i, more)
        errors.append(worst_token_error(original, back(alone)))
        progress(i + 1, len(calls))
    changed = folded_outer(plan, outer)
    expected = runner.finish(original, fp32(outer))
    with attached(runner.model, graph.around_blocks(plan.online)):
        logits = runner.finish(folded, changed)
    error = float(torch.nan_to_num((logits - expected).norm() / expected.norm(), nan=torch.inf))
    image_error = _image_error(graph, outer, changed, back)
    worst = max(range(len(errors)), key=errors.__getitem__)
    around = "the layers that write images to the residual stream" if image_error > error else _AROUND
    error = max(error, image_error)
    proof = Proof(error, worst, errors[worst], threshold, input_ids.numel(), tuple(errors))
    if not max(error, errors[worst]) <= threshold:
        sites = sorted({site.name for site, _, _ in plan.folded if site.block in (None, worst)})
        place = f"block {worst}" if errors[worst] > threshold else around
        raise ProofError(
            f"folding {', '.join(sites)} changed the model: relative logit error {error:.2e}, worst block {worst} with "
            f"{errors[worst]:.2e} (threshold {threshold:.0e}). The fault lies in {place}. Nothing was changed; leave a "
            f"site out (--set transform.{sites[0] if sites else 'R1'}=null) to find it"
        )
    return proof


def _image_error(
    graph: ModelGraph, outer: Mapping[str, Tensor], changed: Mapping[str, Tensor], back: Callable[[Tensor], Tensor]
) -> float:
    """The relative error of folded projections of images to the residual stream, at the worst of the random inputs.

    Inputs are random because tokens do not pass through these projections.
    """
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for op in graph.outer.readers("image"):
        x = torch.randn(_IMAGE_ROWS, op.in_features, generator=generator)

        def project(weights: Mapping[str, Tensor], op: LinearOp = op, x: Tensor = x) -> Tensor:
            bias = None if op.bias is None else weights[op.bias].float().cpu()
            return torch.nn.functional.linear(x, weights[op.weight].float().cpu(), bias)

        worst = max(worst, worst_token_error(project(outer), back(project(changed))))
    return worst
