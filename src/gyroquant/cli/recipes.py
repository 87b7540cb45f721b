"""`gyroquant recipes`: lists the recipes, or shows one with every setting."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

from gyroquant.cli.common import AsJson, Changes, Debug, Effort, print_json
from gyroquant.recipes.presets import preset_names
from gyroquant.recipes.schema import load_recipe
from gyroquant.report import console


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show every setting of this recipe.")] = None,
    effort: Effort = None,
    change: Changes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one as YAML with every setting."""
    if name is None:
        descriptions = {preset: load_recipe(preset).description for preset in preset_names()}
        if as_json:
            print_json(descriptions)
        else:
            console.show(console.table("", ("recipe", "what it does"), list(descriptions.items())))
        return
    data = load_recipe(name, change or (), effort).to_dict()
    print(json.dumps(data, indent=2) if as_json else yaml.safe_dump(data, sort_keys=False), end="\n" if as_json else "")
