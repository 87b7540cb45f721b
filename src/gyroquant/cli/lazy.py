"""The commands by name. The module of a command, and with it torch and transformers, is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class LazyCommand:
    """A command: the function or Typer group `name` of `gyroquant.cli.module`, and its help text."""

    module: str
    name: str
    help: str

    def load(self) -> Any:
        """The function, or the Typer group."""
        return getattr(import_module(f"gyroquant.cli.{self.module}"), self.name)


COMMANDS = {
    "quantize": LazyCommand("quantize", "quantize", "Transform, prove, round and save a model."),
    "evaluate": LazyCommand("evaluate", "evaluate", "Measure perplexity, and divergence from the original, on a text."),
    "inspect": LazyCommand(
        "inspect",
        "inspect",
        "Show a model's sites, which recipes fit it, where its outliers are, and what a recipe will take.",
    ),
    "recipes": LazyCommand("recipes", "recipes", "List the recipes, or show one as YAML with every setting."),
    "fuzz": LazyCommand(
        "fuzz", "fuzz", "Build a tiny random model of an architecture and prove every site with every method."
    ),
    "export": LazyCommand("deploy", "export", "Write OUT in a format that another program opens without gyroquant."),
    "verify-export": LazyCommand(
        "deploy",
        "verify_export",
        "Run an export by its own program and compare logits, perplexity and greedy tokens with OUT; exit 1 beyond the "
        "tolerance.",
    ),
    "verify": LazyCommand(
        "verify",
        "verify",
        "Check the sha256 of every file of OUT and every array in it, print the command that makes it again; exit 1 "
        "when anything is wrong.",
    ),
    "formats": LazyCommand(
        "deploy",
        "formats",
        "List the formats of other programs and what each can hold, or whether each holds a folder, and why not.",
    ),
    "chat": LazyCommand(
        "chat",
        "chat",
        "Talk to a model, through whichever program runs its folder. An empty line or Ctrl-D ends it.",
    ),
    "compare": LazyCommand(
        "compare",
        "compare",
        "Run methods head to head on one model and say which to use; the page is OUT/index.html.",
    ),
    "rotations": LazyCommand(
        "rotations", "rotations", "Rotations as files: take them out of a run, change, use again."
    ),
}


class LazyGroup(TyperGroup):
    """A group of the commands in COMMANDS: its help lists them from that table, and one is loaded when it is called."""

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
        rows = [(name, TyperCommand(name, help=one.help).get_short_help_str(limit)) for name, one in COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def load_command(name: str) -> Any:
    """The command of that name, ready to run, with transformers told to print errors alone."""
    loaded = COMMANDS[name].load()
    import_module("gyroquant.cli.common").quiet_transformers()
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(loaded)
    return typer.main.get_command(alone)


__all__ = ["COMMANDS", "LazyCommand", "LazyGroup", "load_command"]
