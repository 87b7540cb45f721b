"""The contract of descriptions, for every architecture that is registered."""

from __future__ import annotations

from typing import Any

from gyroquant.models.graph.spec import ARCHITECTURES
from gyroquant.testing import parametrize_with_checks


@parametrize_with_checks(ARCHITECTURES)
def test_every_architecture_keeps_its_contract(instance: Any, check: Any) -> None:
    check(instance)
