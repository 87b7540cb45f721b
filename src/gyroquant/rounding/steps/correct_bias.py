"""Bias correction: subtracts the mean output error of a block from its last bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from typing_extensions import Self

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.rounding.base import When
from gyroquant.rounding.steps.base import BlockStep, RoundedBlock


class CorrectBias(BlockStep):
    """Subtracts the mean output error of a block, over the calibration tokens, from the block's last bias."""

    key = "correct_bias"
    when = When.CORRECT_BLOCK

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    @property
    def passes(self) -> int:
        return 1

    def check_layers(self, graph: ModelGraph, targets: Mapping[str, LinearOp]) -> None:
        if any(group.last_bias is None for group in graph.blocks):
            raise UnsupportedModelError(
                f"weights.correct_bias needs a bias in the last layer of every block, and {graph.config.model_type} "
                "has none there: leave it out"
            )

    def apply_block(self, block: RoundedBlock) -> RoundedBlock:
        name = block.group.last_bias
        assert name is not None
        bias = block.plain[name]
        corrected = bias.double() + block.mean_error() / block.residual_multiplier
        return replace(block, plain={**block.plain, name: corrected.to(bias.dtype)})
