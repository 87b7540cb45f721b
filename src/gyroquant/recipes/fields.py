"""Reads the sections of a recipe: options of registered kinds, and sections that also hold the options of a grid.

These classes mark the fields of the models in `schema`. A name is looked up in its registry when a recipe is read, not
when the models are built. So classes of plug-ins that register later are found too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, SerializeAsAny, ValidationError
from pydantic_core import CoreSchema, core_schema

from gyroquant.grids import Grid
from gyroquant.methods import Method
from gyroquant.recipes.errors import check_keys, of_kind, refusal, refusal_at, within
from gyroquant.recipes.overrides import DEFAULT_GRID, grid_kind
from gyroquant.registry import Registry, nearest
from gyroquant.rounding import Solver
from gyroquant.rounding.steps.base import LayerStep, StepOptions

Model = TypeVar("Model", bound=BaseModel)


def build(registry: Registry[Any], tag: str, value: Any) -> Any:
    """An object of a registered class from ``{tag: name, option: value}`` or from the name alone."""
    options = {tag: value} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or not isinstance(options.get(tag), str):
        raise refusal(f"needs {tag}: one of {', '.join(sorted(registry))}")
    name = options[tag]
    if name not in registry:
        text = f"is {name!r}; did you mean {nearest(name, registry)!r}? There are {', '.join(sorted(registry))}"
        raise refusal_at(tag, text, name)
    kind = registry[name]
    check_keys(options, tuple(kind.model_fields))
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise of_kind(error, f"{tag} {name}") from error


class Registered:
    """Marks a field that holds an object of a registered class. The option `tag` names the class."""

    def __init__(self, tag: str):
        self.tag = tag

    def __get_pydantic_core_schema__(self, base: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(base, lambda value: build(base.registry, self.tag, value), handler)


class Options:
    """Marks a section whose keys are the fields of its class."""

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(kind, lambda value: self.read(kind, value), handler)

    def read(self, kind: type[BaseModel], value: Any) -> Any:
        """The value itself, if it is a mapping with known keys."""
        keys = tuple(kind.model_fields)
        if not isinstance(value, Mapping):
            raise refusal(f"holds settings such as {', '.join(keys[:3])}, not {value!r}")
        check_keys(value, keys)
        return value


class BesideGrid:
    """Marks a section that holds the options of its grid beside its own.

    - `says`: the message for a value that is not such a section.
    - `defaults`: options of the grid if the section does not name a grid.
    """

    def __init__(self, says: str = "holds bits, group_size, symmetric and so on", **defaults: Any):
        self.says, self.defaults = says, defaults

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(kind, lambda value: self.read(kind, value), handler)

    def read(self, kind: type[BaseModel], value: Any) -> Any:
        """The section's own options, with a grid made of the others."""
        needed = [key for key, setting in kind.model_fields.items() if key != "grid" and setting.is_required()]
        registered = LayerStep.registry if issubclass(kind, StepOptions) else ()
        steps = [key for key in registered if key not in kind.model_fields]  # steps of other packages
        own = [key for key in dict.fromkeys((*kind.model_fields, *steps)) if key != "grid"]
        if not isinstance(value, Mapping) or any(key not in value for key in needed):
            raise refusal(self.says)
        if isinstance(value.get("grid"), Grid):
            check_keys(value, (*kind.model_fields, *steps))
            return value
        settings = {key: setting for key, setting in value.items() if key not in own}
        grid = grid_kind(settings)
        if grid is not None and grid.by_rows:
            text = "is made by weights.allocate with granularity: rows: take integer, and that"
            raise refusal_at("grid", text, settings["grid"])
        named = grid is not None and grid is not Grid.registry[DEFAULT_GRID]
        if grid is not None:
            check_keys(settings, (*grid.model_fields, *own), f"of grid {settings['grid']} " if named else "")
        if grid is Grid.registry[DEFAULT_GRID]:
            settings = {"grid": DEFAULT_GRID} | self.defaults | settings
        sections = {key: _step(key, value[key]) if key in steps else value[key] for key in value if key in own}
        return sections | {"grid": build(Grid.registry, "grid", settings)}


def _step(key: str, value: Any) -> Any:
    """A step from its options. Null and false mean no step, true means the default options."""
    kind = LayerStep.registry[key]
    keys = tuple(kind.model_fields)

    def read() -> Any:
        if keys and isinstance(value, Mapping):
            check_keys(value, keys)
        elif keys and value is not None and not isinstance(value, (bool, kind)):
            raise refusal(f"holds settings such as {', '.join(keys[:3])}, not {value!r}")
        return kind.of(value)

    return within(key, read)


def _schema(kind: Any, read: Callable[[Any], Any], handler: GetCoreSchemaHandler) -> CoreSchema:
    """A schema that accepts objects of `kind` unchanged and passes all other values to `read` first."""
    return core_schema.no_info_before_validator_function(
        lambda value: value if isinstance(value, kind) else read(value), handler(kind)
    )


AnyGrid = Annotated[SerializeAsAny[Grid], Registered("grid")]
AnySolver = Annotated[SerializeAsAny[Solver], Registered("name")]
AnyMethod = Annotated[SerializeAsAny[Method], Registered("method")]
Section = Annotated[Model, Options()]
"""A section whose keys are the fields of its class, as in ``Section[Learn] | None``."""

__all__ = ["AnyGrid", "AnyMethod", "AnySolver", "BesideGrid", "Options", "Registered", "Section", "build"]
