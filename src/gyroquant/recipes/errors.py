"""Error messages for recipes: the path of the key, what is wrong with it, and the nearest valid name.

Validators raise `refusal` for errors that they find themselves; pydantic raises the others. `translated` converts both
to a RecipeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from gyroquant.errors import RecipeError
from gyroquant.registry import nearest

_REFUSAL = "recipe"
_VALUE = "recipe_value"
_LONGEST = 120  # characters of a value that a message quotes


def refusal(text: str) -> PydanticCustomError:
    """An error whose text continues a sentence that starts with the path of the key, such as "must be a list"."""
    return PydanticCustomError(_REFUSAL, "{text}", {"text": text})


def refusal_at(key: str, text: str, value: Any) -> ValidationError:
    """As `refusal`, for a key of the section that is being validated."""
    return ValidationError.from_exception_data(
        "recipe", [InitErrorDetails(type=refusal(text), loc=(key,), input=value)]
    )


def within(key: str, make: Callable[[], Any]) -> Any:
    """The result of `make`. The paths of errors that it raises get the prefix `key`."""
    try:
        return make()
    except PydanticCustomError as error:
        details = [InitErrorDetails(type=error, loc=(key,), input=None)]
    except ValidationError as error:
        details = [
            _moved_error(detail, (key, *detail["loc"]), _message(detail)) for detail in error.errors(include_url=False)
        ]
    raise ValidationError.from_exception_data("recipe", details)


def check_keys(keys: Iterable[object], known: Sequence[str], where: str = "") -> None:
    """Raises a refusal, with the nearest known key, for the first unknown key. `where` is the start of the message."""
    for key in keys:
        if key not in known:
            raise refusal(
                f"{where}has no key {str(key)!r}; did you mean {nearest(key, known)!r}? Keys are {', '.join(known)}"
            )


def of_kind(error: ValidationError, kind: str) -> ValidationError:
    """The same errors. Those about a value of an option also name the kind with this option ("grid mxfp4")."""
    details = []
    for detail in error.errors(include_url=False):
        done = detail["type"] in (_REFUSAL, _VALUE) or not detail["loc"]
        text = _message(detail) if done else f"{_message(detail)} for {kind}"
        details.append(_moved_error(detail, detail["loc"], text))
    return ValidationError.from_exception_data(error.title, details)


def _moved_error(detail: ErrorDetails, path: tuple[int | str, ...], text: str) -> InitErrorDetails:
    """A copy of an error with another path or another text."""
    kind = _REFUSAL if detail["type"] == _REFUSAL else _VALUE
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=path, input=detail["input"])


def translated(error: ValidationError) -> RecipeError:
    """The first error of a validation as a RecipeError: path, message, and the given value."""
    detail = error.errors(include_url=False)[0]
    place, text = ".".join(map(str, detail["loc"])), _message(detail)
    if detail["type"] == _REFUSAL:
        return RecipeError(f"{place or 'the recipe'} {text}")
    if detail["type"] == "extra_forbidden":
        section, _, key = place.rpartition(".")
        return RecipeError(f"{section or 'the recipe'} has no key {key!r}")
    return RecipeError(f"{place}: {text}{_given(detail['input'])}" if place else text)


def _message(detail: ErrorDetails) -> str:
    """The message of pydantic or of a validator."""
    return "this option is required" if detail["type"] == "missing" else detail["msg"].removeprefix("Value error, ")


def _given(value: Any) -> str:
    """The wrong value, as text for the message. A whole section is not quoted, because its keys conflict."""
    if isinstance(value, (Mapping, BaseModel)):
        return ""
    text = repr(value)
    return f" (given: {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'})"
