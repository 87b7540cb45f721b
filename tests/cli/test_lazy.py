"""Commands are loaded when they run; their help stands in one table."""

from __future__ import annotations

import inspect
import warnings

import pytest
import typer
from typer.testing import CliRunner

from gyroquant.cli import app, shown_warnings
from gyroquant.cli.lazy import COMMANDS, load_command
from gyroquant.system.deprecation import warn_renamed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    loaded = COMMANDS[name].load()
    text = loaded.info.help if isinstance(loaded, typer.Typer) else inspect.getdoc(loaded)
    assert " ".join(text.split()) == COMMANDS[name].help
    command = load_command(name)
    assert command.get_short_help_str(60)


def test_the_list_of_commands_is_that_of_the_table() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    section = shown.partition("Commands:")[2]
    names = [line.split()[0] for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
    assert names == list(COMMANDS)
    assert "Measure perplexity, divergence from the original" in section


def test_a_misspelt_command_gets_a_suggestion() -> None:
    done = CliRunner().invoke(app, ["quantise"])
    assert done.exit_code == 2
    assert "quantize" in done.output


def test_groups_have_their_commands() -> None:
    shown = CliRunner().invoke(app, ["rotations", "--help"]).output
    for name in ("show", "save", "compose", "invert"):
        assert name in shown
    assert "--install-completion" not in shown


def test_our_future_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_warnings():
        warnings.simplefilter("always")
        warn_renamed("--opponents", "--external-tools")
    expected = "warning: --opponents is now --external-tools; the next release drops the old name\n"
    assert capsys.readouterr().err == expected


def test_warnings_of_others_are_left_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: shown.append(str(message))  # type: ignore[assignment]
        with shown_warnings():
            warnings.simplefilter("always")
            warnings.warn("of another package", FutureWarning, stacklevel=1)
            warn_renamed("a", "b")
            warnings.warn("of another kind", UserWarning, stacklevel=1)
    assert shown == ["of another package", "of another kind"]
    assert capsys.readouterr().err == "warning: a is now b; the next release drops the old name\n"
