"""The base of all contracts: how a check is declared, which instances it is for, and the message of a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Generic, TypeVar
from unittest import SkipTest

from gyroquant.registry import Registry

T = TypeVar("T")
Check = Callable[[T], None]


@dataclass
class Contract(Generic[T]):
    """The checks of one kind.

    `kind`: the name of the kind in messages.
    `base`: the base class of the instances.
    `named`: returns a short, readable name of an instance.
    `checks`: every check with its condition, by the name of its function.
    """

    kind: str
    base: type[Any]
    named: Callable[[T], str] = str
    checks: dict[str, tuple[Check[T], Callable[[T], bool]]] = field(default_factory=dict)

    def check(self, when: Callable[[T], bool] = lambda instance: True) -> Callable[[Check[T]], Check[T]]:
        """Declares a check of the instances for which `when` returns true.

        An error in the check becomes an AssertionError that names the class and the check. SkipTest is passed on.
        """

        def declared(function: Check[T]) -> Check[T]:
            @wraps(function)
            def checked(instance: T) -> None:
                try:
                    function(instance)
                except SkipTest:
                    raise
                except AssertionError as error:
                    raise AssertionError(f"{self.label(instance)}: {error}") from error
                except Exception as error:
                    name = function.__name__.removeprefix("check_")
                    raise AssertionError(
                        f"{self.label(instance)}: {name} raised {type(error).__name__}: {error}"
                    ) from error

            self.checks[function.__name__] = checked, when
            return checked

        return declared

    def label(self, instance: T) -> str:
        """The class of an instance and its short name."""
        return f"{type(instance).__name__} ({self.named(instance)})"

    def checks_of(self, instance: T) -> Iterator[Check[T]]:
        """The checks that apply to an instance."""
        return (check for check, when in self.checks.values() if when(instance))

    def instances(self, subject: T | type[T]) -> list[T]:
        """The examples of a class, or the given instance itself.

        Raises AssertionError for a class without examples, and for objects of another kind.
        """
        if isinstance(subject, self.base):
            return [subject]
        if not (isinstance(subject, type) and issubclass(subject, self.base)):
            raise AssertionError(f"{subject!r} is not a {self.kind}: derive it from {self.base.__name__}")
        kind: Any = subject
        try:
            examples: list[T] = list(kind.examples())
        except NotImplementedError as error:
            raise AssertionError(str(error)) from error
        if not examples:
            raise AssertionError(f"{kind.__name__}.examples() is empty. Return at least one object")
        return examples

    def run(self, subject: T | type[T]) -> None:
        """Runs all checks that apply to a class or an instance."""
        for instance in self.instances(subject):
            for check in self.checks_of(instance):
                check(instance)


def require(condition: bool, message: str) -> None:
    """Raises AssertionError with `message` unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def refuses(call: Callable[[], Any], error: type[Exception], message: str, expected: str = "") -> None:
    """Raises AssertionError with `message` unless `call` raises an `error` whose text contains `expected`."""
    try:
        call()
    except error as raised:
        require(expected in str(raised), f"{message} The error should contain {expected!r}, not {str(raised)!r}")
    else:
        raise AssertionError(f"{message} No error was raised; raise {error.__name__}")


def pairs(contract: Contract[T], subjects: Iterable[Any]) -> Iterator[tuple[str, T, Check[T]]]:
    """Every instance and check of `subjects` (classes, instances or registries), with an id."""
    for subject in subjects:
        kinds = list(subject.values()) if isinstance(subject, Registry) else [subject]
        for kind in dict.fromkeys(kinds):
            for instance in contract.instances(kind):
                for check in contract.checks_of(instance):
                    name = check.__name__.removeprefix("check_")
                    yield f"{contract.label(instance)}-{name}", instance, check
