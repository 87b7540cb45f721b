"""The verdict: level, degradation or collapse, and the block where it happens.

Arxiv 2604.19884 describes two ways in which rounding fails. In *signal degradation* every component still works, and
noise adds up. In *computation collapse* components stop working, in early layers, and no repair after them helps. We
know of no threshold in the paper. The rule and its numbers are this project's:

1. **level**: the expected acceptance rate is at least 0.99. SLQ (arXiv 2605.02404) calls such a model lossless.
2. **collapse** at the first block for which one of these holds: what the block adds, computed from the original's own
   input, has a cosine below 0.5 with what the original's block adds (`own_cosine`); or the block is in the first
   quarter of the depth, and the state after it has a cosine below 0.5 with the original's.
3. **degradation** else. The named block is the one through which the relative error of the state grows most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gyroquant.evaluation.diagnosis.acceptance import LOSSLESS

BROKEN = 0.5
"""Below this cosine, a block no longer does what the original's does, or a state no longer is the original's."""
EARLY = 0.25
"""The part of the depth in which a lost state is a collapse."""


def verdict(
    rate: float, start: Mapping[str, float], rows: Sequence[Mapping[str, Any]], determined: bool = True
) -> dict[str, Any]:
    """The verdict on a rounded model, its block, or None, and the reason as a sentence.

    - rate: the expected acceptance rate.
    - start, rows: the errors of the embeddings and of all blocks, see `hidden_states.StateErrors.rows`.
    - determined: whether the basis of the hidden states is known. If not, the verdict is "level" or "unknown".
    """
    if rate >= LOSSLESS:
        reason = f"The expected acceptance rate is {rate:.4f}, at least {LOSSLESS}."
        return {"kind": "level", "block": None, "reason": reason}
    if not determined:
        reason = "The embeddings do not determine the basis of the hidden states, so these cannot be compared."
        return {"kind": "unknown", "block": None, "reason": reason}
    for row in rows:
        if row["own_cosine"] < BROKEN:
            reason = (
                f"On the original's input, what block {row['block']} adds has cosine {row['own_cosine']:.3f} with what "
                f"the original's block adds, below {BROKEN}."
            )
            return {"kind": "collapse", "block": row["block"], "reason": reason}
        if row["block"] < EARLY * len(rows) and row["cosine"] < BROKEN:
            reason = (
                f"In the first quarter of the depth, the state after block {row['block']} has cosine "
                f"{row['cosine']:.3f} with the original's, below {BROKEN}."
            )
            return {"kind": "collapse", "block": row["block"], "reason": reason}
    errors = [start["relative_error"], *(row["relative_error"] for row in rows)]
    increases = [after - before for before, after in pairwise(errors)]
    worst = max(range(len(increases)), key=increases.__getitem__)
    least = min(row["own_cosine"] for row in rows)
    reason = (
        f"No block has stopped working: what each adds has a cosine of at least {least:.3f} with what the original's "
        f"adds. The relative error of the state grows most through block {worst}, from {errors[worst]:.3f} to "
        f"{errors[worst + 1]:.3f}."
    )
    return {"kind": "degradation", "block": worst, "reason": reason}
