"""Writes a derived description as a Python file: the file that a person would have written, see docs/extend.md."""

from __future__ import annotations

import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.models.deriving.derive import Derivation
from gyroquant.models.graph.spec import Architecture, Attention

_WIDTH = 120
_LEFT_OUT = ("facts", "examples", "refuse")  # a derived description has no examples and refuses nothing
_LEVELS = {
    "fused": "R1 can be fused.",
    "online": "R1 cannot be fused, but it can run online.",
    "unrotated": "R1 is not available: no map of the residual stream can be used.",
}


def description_text(derivation: Derivation) -> str:
    """The text of the file. Its `Architecture` equals the derived one, without facts. `ruff format` leaves it alone."""
    architecture = derivation.architecture
    names = _classes((*architecture.block, *architecture.outer)) | {"Architecture", "register"}
    imports = ", ".join(sorted(names, key=lambda name: (name.islower(), name)))
    constant = re.sub(r"\W", "_", architecture.model_types[0]).upper()
    constant = constant if constant[:1].isalpha() else f"MODEL_{constant}"
    return (
        f'"""{_docstring(derivation)}"""\n\nfrom gyroquant.models.graph.spec import {imports}\n\n'
        f"{constant} = register(\n    {_value(architecture, 4)}\n)\n"
    )


def write_description(derivation: Derivation, path: Path) -> None:
    """Writes the file. Raises InputError if it exists already, or if it cannot be written."""
    text = description_text(derivation)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{path} exists already: give a new name, or remove the file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): give another place") from error


def _classes(parts: tuple[Any, ...]) -> set[str]:
    """The names of the classes of entries, including those of alternatives."""
    names: set[str] = set()
    for part in parts:
        names |= _classes(part) if isinstance(part, tuple) else {type(part).__name__}
    return names


def _docstring(derivation: Derivation) -> str:
    """What was proven and what was not, as the lines of a docstring."""
    kinds, proofs = ", ".join(derivation.architecture.model_types), derivation.proofs
    level = _LEVELS[derivation.level]
    parts = [f"{kinds}: derived from the model and proven on a tiny one, by `gyroquant inspect --sites --save`."]
    if proofs:
        error = f"the largest relative error of the logits was {max(proofs.values()):.1e}"
        level += f" Random maps were exact at these sites: {', '.join(proofs)}; {error}."
    parts.append(level)
    paragraphs = ["\n".join(textwrap.wrap(part, _WIDTH - 3, break_long_words=False)) for part in parts]
    if derivation.problems:
        reasons = [f"{label}: {' '.join(reason.split())}" for label, reason in derivation.problems.items()]
        paragraphs.append("Not proven:")
        paragraphs.append("\n".join(_item(reason) for reason in reasons))
    text = "\n\n".join(paragraphs).replace("\\", "\\\\").replace('"""', "'''")
    return text if len(paragraphs) == 1 else text + "\n"


def _item(text: str) -> str:
    options: dict[str, Any] = {"initial_indent": "- ", "subsequent_indent": "  ", "break_long_words": False}
    return "\n".join(textwrap.wrap(text, _WIDTH, break_on_hyphens=False, **options))


def _value(value: Any, indent: int, before: int = 0) -> str:
    """The source of a value that begins after `indent` + `before` characters, on several lines if it is long."""
    flat = _flat(value)
    if indent + before + len(flat) < _WIDTH and not isinstance(value, Architecture) and not _of_entries(value):
        return flat
    inner = " " * (indent + 4)
    if isinstance(value, str):
        if not before:
            return flat
        lines = "".join(f"{inner}{_string(piece)}\n" for piece in _pieces(value, _WIDTH - indent - 10))
        return f"(\n{lines}{' ' * indent})"
    if isinstance(value, tuple):
        name, parts = "", [("", item) for item in value]
    else:
        name, parts = type(value).__name__, _arguments(value)
    lines = "".join(f"{inner}{label}{_value(item, indent + 4, len(label))},\n" for label, item in parts)
    return f"{name}(\n{lines}{' ' * indent})"


def _pieces(text: str, width: int) -> list[str]:
    """The pieces of a text, cut after spaces. Together they are the text."""
    options: dict[str, Any] = {"break_long_words": False, "drop_whitespace": False}
    return textwrap.wrap(text, width, expand_tabs=False, replace_whitespace=False, **options)


def _of_entries(value: Any) -> bool:
    return isinstance(value, tuple) and any(not isinstance(item, str) for item in value)


def _flat(value: Any) -> str:
    """The source of a value on one line."""
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_flat, value))}{',' if len(value) == 1 else ''})"
    return f"{type(value).__name__}({', '.join(label + _flat(item) for label, item in _arguments(value))})"


def _arguments(item: Any) -> list[tuple[str, Any]]:
    """The arguments of an entry or an architecture: those without a default, then those that differ from it."""
    arguments = []
    for field in fields(item):
        value = getattr(item, field.name)
        required = field.default is MISSING and field.default_factory is MISSING
        if field.name in _LEFT_OUT or (not required and value == field.default):
            continue
        named = not required or isinstance(item, Architecture) or (isinstance(item, Attention) and field.name != "name")
        arguments.append((f"{field.name}=" if named else "", value))
    return arguments


def _string(text: str) -> str:
    """The literal of a text, with the quotes that `ruff format` prefers."""
    body = text.encode("unicode_escape").decode() if not text.isprintable() else text.replace("\\", "\\\\")
    quote = "'" if body.count('"') > body.count("'") else '"'
    return quote + body.replace(quote, f"\\{quote}") + quote
