"""All contracts in one place: a pytest parametrization over instances and checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from gyroquant.models.graph.spec import Architecture
from gyroquant.registry import Registry
from gyroquant.testing.architectures import ARCHITECTURE, tiny_architectures
from gyroquant.testing.contract import Contract, pairs
from gyroquant.testing.formats import FORMAT
from gyroquant.testing.grids import GRID
from gyroquant.testing.maps import MAP
from gyroquant.testing.methods import METHOD
from gyroquant.testing.observers import OBSERVER
from gyroquant.testing.solvers import SOLVER
from gyroquant.testing.steps import STEP

CONTRACTS: tuple[Contract[Any], ...] = (METHOD, SOLVER, STEP, GRID, MAP, FORMAT, OBSERVER, ARCHITECTURE)

_SCRATCH = re.compile(r"/\S*gyroquant-example-\w+/")  # of examples that are files: another name in every process


def contract_of(thing: Any) -> Contract[Any]:
    """The contract of a class or an instance. Raises TypeError for what has none."""
    kind = thing if isinstance(thing, type) else type(thing)
    for contract in CONTRACTS:
        if issubclass(kind, contract.base):
            return contract
    raise TypeError(f"{thing!r} is of no kind that has a contract: there are {', '.join(c.kind for c in CONTRACTS)}")


def _things(given: tuple[Any, ...]) -> Iterator[Any]:
    """Classes and instances, with registries and architectures taken apart."""
    for thing in given:
        if isinstance(thing, Registry):
            yield from _things(tuple(dict.fromkeys(thing.values())))
        elif isinstance(thing, Architecture):
            yield from tiny_architectures(thing)
        else:
            yield thing


def parametrize_with_checks(*things: Any) -> Any:
    """A pytest mark that gives a test every pair of `instance` and `check`, with readable ids.

    `things` are classes, of which all examples are checked, instances, or whole registries. A check takes the instance
    and raises AssertionError, or unittest.SkipTest where something is not installed.
    """
    import pytest

    cases = [case for thing in _things(things) for case in pairs(contract_of(thing), [thing])]
    return pytest.mark.parametrize(
        ("instance", "check"),
        [pytest.param(instance, check, id=_SCRATCH.sub("", name)) for name, instance, check in cases],
    )
