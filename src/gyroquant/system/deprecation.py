"""Names of the last release that still work. Each gives a RenamedWarning with the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from gyroquant.errors import RenamedWarning

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warns that `old` is now `new`. `stacklevel` counts from the caller of this function, as in `warnings.warn`."""
    warnings.warn(f"{old} is now {new}; the next release drops the old name", RenamedWarning, stacklevel + 1)


def renamed(**names: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Lets a function take keywords by their old names: ``@renamed(calibration="text")``.

    An old keyword gives a RenamedWarning. The function raises TypeError when a caller gives both names.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return function(*args, **_new_names(function.__name__, kwargs, names))

        return call

    return decorate


def _new_names(function: str, given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The keywords of a call by their new names."""
    result = dict(given)
    for old, new in names.items():
        if old in result:
            if new in result:
                raise TypeError(f"{function}() got {new} and also {old}, its old name; leave {old} out")
            warn_renamed(f"{old}= of {function}()", f"{new}=", stacklevel=3)
            result[new] = result.pop(old)
    return result


__all__ = ["renamed", "warn_renamed"]
