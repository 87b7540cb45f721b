"""The commands by name. The module of a command, which imports torch and transformers, is loaded when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class LazyCommand:
    """A command: the function or Typer group `name` in `gyroquant.cli.<module>`, and its help text."""

    module: str
    name: str
    help: str

    def load(self) -> Any:
        """The function, or the Typer group."""
        return getattr(import_module(f"gyroquant.cli.{self.module}"), self.name)


COMMANDS = {
    "quantize": LazyCommand("quantize", "quantize", "Transform, prove, round and save a model."),
    "evaluate": LazyCommand(
        "evaluate", "evaluate", "Measure perplexity, divergence from the original, and accuracy in zero-shot tasks."
    ),
    "inspect": LazyCommand(
        "inspect",
        "inspect",
        "Show the sites of a model, its outliers, the recipes that fit it, and the time and memory of a recipe.",
    ),
    "recipes": LazyCommand("recipes", "recipes", "List the recipes, or show one as YAML with every setting."),
    "fuzz": LazyCommand(
        "fuzz", "fuzz", "Build a tiny random model of an architecture and prove every site with every method."
    ),
    "export": LazyCommand("deploy", "export", "Write OUT in a format that another program opens without gyroquant."),
    "verify-export": LazyCommand(
        "deploy",
        "verify_export",
        "Run an export in its own program and compare logits, perplexity and greedy tokens with OUT; exit 1 beyond the "
        "tolerance.",
    ),
    "verify": LazyCommand(
        "verify",
        "verify",
        "Check the sha256 of every file of OUT and every array in it, and print the command that makes it again; exit "
        "1 if there is a problem.",
    ),
    "formats": LazyCommand(
        "deploy",
        "formats",
        "List the formats of other programs and what each can hold. With OUT: whether each can hold OUT, and why not.",
    ),
    "push": LazyCommand(
        "deploy",
        "push",
        "Push a folder that gyroquant wrote to the hub, as a private model unless --public is given.",
    ),
    "chat": LazyCommand(
        "chat",
        "chat",
        "Chat with a model, in the program that runs its folder. An empty line or Ctrl-D ends the chat.",
    ),
    "compare": LazyCommand(
        "compare",
        "compare",
        "Compare methods on one model and state which one to use; the page is OUT/index.html.",
    ),
    "rotations": LazyCommand(
        "rotations", "rotations", "Save the rotations of a run to a file, change them and use them again."
    ),
}


class LazyGroup(TyperGroup):
    """The group of the commands in COMMANDS. Its help comes from that table; a command is loaded when it is called."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._loaded: dict[str, Any] = {}
        self.commands: Any = dict.fromkeys(COMMANDS)  # typer suggests these names for a misspelt one

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self._loaded:
            self._loaded[cmd_name] = load_command(cmd_name)
        return self._loaded[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        limit = formatter.width - 6 - max(map(len, COMMANDS))
        rows = [
            (name, TyperCommand(name, help=command.help).get_short_help_str(limit))
            for name, command in COMMANDS.items()
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def load_command(name: str) -> Any:
    """Loads a command by its name. Makes transformers print errors only."""
    loaded = COMMANDS[name].load()
    import_module("gyroquant.cli.common").quiet_transformers()
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(loaded)
    return typer.main.get_command(single)


__all__ = ["COMMANDS", "LazyCommand", "LazyGroup", "load_command"]
