"""The options of a diagnosis, and what is refused before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError


@dataclass(frozen=True)
class ReportOptions:
    """What a diagnosis measures besides the windows of the text.

    prompts: how many prompts from the start of the text both models continue. Default 8.
    prompt_tokens: tokens in a prompt. Default 32.
    steps: tokens of a continuation. Default 32.
    coverage: the share of tokens that conformal prediction sets shall hold, between 0 and 1. Default 0.9.
    generations: texts of the original, read by both models: a file of JSON lines or a list of rows, each with the
        strings `prompt` and `completion`. Default None.
    """

    prompts: int = 8
    prompt_tokens: int = 32
    steps: int = 32
    coverage: float = 0.9
    generations: str | Path | Sequence[Mapping[str, Any]] | None = None

    def check(self) -> None:
        """Raises InputError, with the name of the option, for a value that is out of range."""
        for name in ("prompts", "prompt_tokens", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} of the report is {value!r}, and has to be a whole number of at least 1")
        if not 0 < self.coverage < 1:
            raise InputError(f"coverage of the report is {self.coverage!r}, and has to be between 0 and 1, such as 0.9")

    def check_tokens(self, predicted: int) -> None:
        """Raises InputError if a text with so many predicted tokens is too short for the coverage.

        Half of the tokens calibrate. n of them give a finite threshold if ceil((n + 1) coverage) is at most n.
        """
        half = predicted // 2
        if math.ceil((half + 1) * self.coverage) > half:
            needed = 2 * math.ceil(self.coverage / (1 - self.coverage) - 1e-9)
            raise InputError(
                f"the text is too short for a report: it has {predicted} predicted tokens, and prediction sets of "
                f"coverage {self.coverage} need {needed}. Give a longer text, more windows, or a lower coverage"
            )


__all__ = ["ReportOptions"]
