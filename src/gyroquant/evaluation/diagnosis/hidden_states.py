"""Hidden states of the rounded model beside the original's, block by block.

For a token with the state h of the original, in the rounded model's basis, and the state h' of the rounded model:

- relative_error: ``|h' - h| / |h|``, after the block.
- cosine: the cosine of h' and h, after the block.
- own_cosine: the cosine of what the block adds to its input (output minus input) in both models, with the original's
  input for both. It shows the fault of this block alone, without what came before.
- own_error: ``|d' - d| / |d|`` of the same two additions.
- growth: relative_error over that of the block before.

The others are means over tokens, so the attention sink of a window counts as one token, however large its state is.
Arxiv 2604.19884 tells its two failure modes apart by what components do and by the states of early layers. Running one
block on the original's input is this project's way to keep the fault of a block apart from noise that adds up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TOKENS = 4096  # this many are compared at once
_NAMES = ("relative_error", "cosine", "own_error", "own_cosine")


@dataclass(frozen=True)
class BlockStates:
    """The states around one block for some windows, shape (windows, length, ..., hidden).

    - index: the number of the block.
    - before, after: the original's input and output.
    - expected_before, expected_after: the same in the basis of the rounded model.
    - rounded_before, rounded_after: the rounded model's input and output.
    - own: the output of the rounded block for `expected_before`.
    """

    index: int
    before: Tensor
    after: Tensor
    expected_before: Tensor
    expected_after: Tensor
    rounded_before: Tensor
    rounded_after: Tensor
    own: Tensor


def token_errors(expected: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The relative error of `other` and its cosine with `expected`, for every token.

    Both have shape (tokens, hidden), the results (tokens,). Two vectors of zeros have error 0 and cosine 1; one alone
    has cosine 0. Where a value is not finite, the error is infinite and the cosine 0.
    """
    expected, other = expected.float(), other.float()
    lengths, others, gaps = expected.norm(dim=1), other.norm(dim=1), (other - expected).norm(dim=1)
    error = torch.where(gaps > 0, gaps / lengths, gaps).nan_to_num(math.inf, math.inf)
    product = lengths * others
    cosine = torch.where(product > 0, (expected * other).sum(1) / product, (lengths == others).float())
    return error, cosine.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)


class StateErrors:
    """Sums the errors of all blocks over the tokens of all windows."""

    def __init__(self, blocks: int):
        self.sums = torch.zeros(blocks, len(_NAMES), dtype=torch.float64)
        self.tokens = torch.zeros(blocks, dtype=torch.float64)
        self.at_start = torch.zeros(2, dtype=torch.float64)

    def see(self, states: BlockStates) -> None:
        """Takes the states around a block. Those before the first block are the embeddings."""
        pieces = zip(
            *(
                x.flatten(0, -2).split(_TOKENS)
                for x in (
                    states.expected_before,
                    states.expected_after,
                    states.rounded_before,
                    states.rounded_after,
                    states.own,
                )
            ),
            strict=True,
        )
        for before, after, rounded_before, rounded_after, own in pieces:
            figures = (*token_errors(after, rounded_after), *token_errors(after - before, own - before))
            self.sums[states.index] += torch.stack([figure.double().sum() for figure in figures])
            self.tokens[states.index] += len(before)
            if states.index == 0:
                self.at_start += torch.stack([f.double().sum() for f in token_errors(before, rounded_before)])

    def rows(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Relative error and cosine of the embeddings, and the figures of every block in order."""
        error, cosine = (self.at_start / self.tokens[0]).tolist()
        rows: list[dict[str, Any]] = []
        for index, means in enumerate((self.sums / self.tokens[:, None]).tolist()):
            row: dict[str, Any] = {"block": index, **dict(zip(_NAMES, means, strict=True))}
            last = rows[-1]["relative_error"] if rows else 0.0
            rows.append(row | {"growth": row["relative_error"] / last if last > 0 else None})
        return {"relative_error": error, "cosine": cosine}, rows
