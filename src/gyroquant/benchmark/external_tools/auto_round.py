"""Intel's auto-round: SignRound, tuned by signed gradients (Cheng et al. 2024, arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gyroquant.benchmark.external_tools.scripted import ScriptedTool


class AutoRound(ScriptedTool):
    """Saves its own format: scales of 16 bits, zero points of as many bits as codes.

    To load codes of 4 bits with zero points again, it needs its library of CPU kernels.
    """

    name = "auto-round"
    home = "intel/auto-round"
    requirements = ("auto-round==0.16.1", "auto-round-lib==0.16.0")
    script = "auto_round.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "50 steps": {"iters": 50},
        "200 steps": {"iters": 200},  # its default
    }


__all__ = ["AutoRound"]
