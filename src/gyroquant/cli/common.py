"""What the commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def print_json(data: Any) -> None:
    """A result as JSON on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
