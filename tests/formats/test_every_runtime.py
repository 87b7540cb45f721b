"""The contract of formats: each one installed here is written, and its program sees the model that was saved."""

from __future__ import annotations

from typing import Any

from gyroquant.formats.base import Format
from gyroquant.testing import parametrize_with_checks


@parametrize_with_checks(Format.registry)
def test_every_format_keeps_its_contract(instance: Format, check: Any) -> None:
    check(instance)
