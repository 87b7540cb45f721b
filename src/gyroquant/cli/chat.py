"""The command for a first look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.chat_session import Chat
from gyroquant.cli.common import Debug


def chat(
    folder: Annotated[Path, typer.Argument(metavar="OUT|DEST", help="A folder that gyroquant wrote, or an export.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this and leave.")] = None,
    tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn where the temperature is not 0.")] = 0,
    debug: Debug = False,
) -> None:
    """Talk to a model, through whichever program runs its folder. An empty line or Ctrl-D ends it."""
    talk = Chat(folder, temperature, seed)
    while True:
        asked = prompt
        if asked is None:
            try:
                asked = input("> ").strip()
            except EOFError:
                asked = ""
        if not asked:
            return
        for piece in talk.ask(asked, tokens):
            print(piece, end="", flush=True)
        print()
        if prompt is not None:
            return
