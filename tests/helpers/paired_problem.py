"""A layer whose inputs in the rounded model differ from those in the original."""

from __future__ import annotations

import torch

from gyroquant.rounding import InputStatistics


class Problem:
    """A layer, the inputs it had (x) and the inputs it has (y): mixed, noisier, and correlated."""

    def __init__(self, seed: int = 0, rows: int = 8, columns: int = 32, tokens: int = 120, noise: float = 0.4):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x = normal(tokens, columns) @ (normal(columns, columns) / columns**0.5)
        self.y = self.x @ (torch.eye(columns) + noise * normal(columns, columns) / columns**0.5)
        self.y += 0.3 * noise * normal(tokens, columns)
        self.weight = normal(rows, columns).float()

    @property
    def statistics(self) -> InputStatistics:
        gram, input_error_cross = self.y.T @ self.y, (self.x - self.y).T @ self.y
        return InputStatistics(gram.float(), len(self.y), input_error_cross.float())

    def error(self, rounded: torch.Tensor) -> float:
        """``|X W^T - Y Q^T|^2``."""
        return float((self.x @ self.weight.double().T - self.y @ rounded.double().T).square().sum())
