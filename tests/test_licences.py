"""The page of licences names every dependency, at the version that is pinned."""

from __future__ import annotations

import sys

import licence_table
import pytest

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")


def shown() -> dict[str, tuple[str, ...]]:
    lines = licence_table.PAGE.read_text().splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    return {name: rest for name, *rest in cells[1:]}


def test_every_dependency_has_a_licence() -> None:
    table = shown()
    for extra, names in licence_table.direct().items():
        for name in names:
            assert name in table, f"{name} is missing: python tests/licence_table.py"
            version, licence, needed = table[name]
            assert version
            assert licence not in ("", "not stated")
            assert extra in needed.split(", ") or "core" in needed


def test_versions_are_the_pinned_ones() -> None:
    pinned = licence_table.pinned()
    for name, (version, _, _) in shown().items():
        assert pinned.get(name, version) == version, name


def test_the_table_is_made_again_where_packages_are_installed() -> None:
    table = shown()
    for name in licence_table.direct()["core"]:
        assert table[name][1] == licence_table.licence(licence_table.distribution(name).metadata)
