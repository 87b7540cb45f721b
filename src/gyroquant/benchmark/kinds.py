"""The kinds of runs, as results store them. They are part of the key of a stored result, so they must not change."""

from __future__ import annotations

from typing import Final, Literal

Kind = Literal["recipe", "opponent"]
RECIPE: Final = "recipe"
EXTERNAL_TOOL: Final = "opponent"

__all__ = ["EXTERNAL_TOOL", "RECIPE", "Kind"]
