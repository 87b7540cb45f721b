"""What the checks of all kinds share: how a check is declared, who it is for, and what it says when it fails."""

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
    """The checks of one kind: of instances of `base`, which are called `kind`.

    `named` gives an instance a short, readable name.
    """

    kind: str
    base: type[Any]
    named: Callable[[T], str] = str
    checks: dict[str, tuple[Check[T], Callable[[T], bool]]] = field(default_factory=dict)

    def check(self, when: Callable[[T], bool] = lambda instance: True) -> Callable[[Check[T]], Check[T]]:
        """Declares a check of instances for which `when` is true, by what their class declares.

        Whatever the check meets becomes an AssertionError that names the class and the check.
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
        """The class of an instance, and its options."""
        return f"{type(instance).__name__} ({self.named(instance)})"

    def checks_of(self, instance: T) -> Iterator[Check[T]]:
        """The checks that are meant for an instance."""
        return (check for check, when in self.checks.values() if when(instance))

    def instances(self, thing: T | type[T]) -> list[T]:
        """The examples of a class, or the one instance that is given.

        Raises AssertionError for a class that gives no examples, and for what is not of this kind.
        """
        if isinstance(thing, self.base):
            return [thing]
        if not (isinstance(thing, type) and issubclass(thing, self.base)):
            raise AssertionError(f"{thing!r} is not a {self.kind}: derive it from {self.base.__name__}")
        kind: Any = thing
        try:
            examples: list[T] = list(kind.examples())
        except NotImplementedError as error:
            raise AssertionError(str(error)) from error
        if not examples:
            raise AssertionError(f"{kind.__name__}.examples() is empty. Return one object or more")
        return examples

    def run(self, thing: T | type[T]) -> None:
        """Runs all checks that are meant for a class or an instance."""
        for instance in self.instances(thing):
            for check in self.checks_of(instance):
                check(instance)


def require(condition: bool, what: str) -> None:
    """Raises AssertionError with what is wrong and what to do about it, unless the condition holds."""
    if not condition:
        raise AssertionError(what)


def refuses(call: Callable[[], Any], error: type[Exception], what: str, says: str = "") -> None:
    """Raises AssertionError with `what` unless a call raises an error of this kind whose message contains `says`."""
    try:
        call()
    except error as raised:
        require(says in str(raised), f"{what} The message should say {says!r}, not {str(raised)!r}")
    else:
        raise AssertionError(f"{what} Nothing was raised; raise {error.__name__}")


def pairs(contract: Contract[T], things: Iterable[Any]) -> Iterator[tuple[str, T, Check[T]]]:
    """Every instance and check of classes, instances or registries of them, with an id."""
    for thing in things:
        kinds = list(thing.values()) if isinstance(thing, Registry) else [thing]
        for kind in dict.fromkeys(kinds):
            for instance in contract.instances(kind):
                for check in contract.checks_of(instance):
                    name = check.__name__.removeprefix("check_")
                    yield f"{contract.label(instance)}-{name}", instance, check
