"""Which cases of a large product the fast tests take; the others are slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet

FAMILIES = frozenset(
    {
        *("llama_tied", "llama_bias", "qwen3", "phi3", "glm"),  # tied, biases, norms of queries, fused, part of RoPE
        *("gpt2", "opt", "gpt_neox", "nemotron", "cohere"),  # transposed, positions, parallel, 1 + gain, one norm
        *("gemma2", "olmo2", "exaone4"),  # norms after, norms only after, layers without RoPE
        *("mixtral", "qwen2_moe"),  # experts, shared experts
    }
)
"""One of `tiny_models.CONFIGS` for each kind of layer. Others differ from these in their numbers."""


def some(cases: Iterable[Any], fast: Collection[Any] = FAMILIES) -> list[ParameterSet]:
    """Cases for `parametrize`: those in `fast`, and all others as slow ones. A case is a value or a tuple of values."""
    cases = list(cases)
    assert any(case in fast for case in cases)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in fast else pytest.mark.slow)
        for case in cases
    ]


def some_pairs(first: Iterable[Any], second: Iterable[Any], fast: Collection[tuple[Any, Any]]) -> list[ParameterSet]:
    """The same of all pairs. Raises AssertionError if a fast pair is none of them."""
    pairs = list(product(first, second))
    assert {*fast} <= {*pairs}
    return some(pairs, fast)
