"""All contracts, and a pytest parametrization over instances and checks."""

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

_SCRATCH = re.compile(r"/\S*gyroquant-example-\w+/")  # folder of example files; differs in every process


def contract_of(subject: Any) -> Contract[Any]:
    """The contract of a class or an instance. Raises TypeError if there is no contract for it."""
    kind = subject if isinstance(subject, type) else type(subject)
    for contract in CONTRACTS:
        if issubclass(kind, contract.base):
            return contract
    raise TypeError(f"{subject!r} has no contract. Kinds with a contract: {', '.join(c.kind for c in CONTRACTS)}")


def _flattened(subjects: tuple[Any, ...]) -> Iterator[Any]:
    """Classes and instances; registries are replaced by their items, architectures by their tiny models."""
    for subject in subjects:
        if isinstance(subject, Registry):
            yield from _flattened(tuple(dict.fromkeys(subject.values())))
        elif isinstance(subject, Architecture):
            yield from tiny_architectures(subject)
        else:
            yield subject


def parametrize_with_checks(*subjects: Any) -> Any:
    """A pytest mark that runs a test with every pair of `instance` and `check`, with readable ids.

    `subjects` are classes, of which all examples are checked, instances, or whole registries. A check takes the
    instance and raises AssertionError, or unittest.SkipTest if a package is not installed.
    """
    import pytest

    cases = [case for subject in _flattened(subjects) for case in pairs(contract_of(subject), [subject])]
    return pytest.mark.parametrize(
        ("instance", "check"),
        [pytest.param(instance, check, id=_SCRATCH.sub("", name)) for name, instance, check in cases],
    )
