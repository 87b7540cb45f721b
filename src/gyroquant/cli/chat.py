"""`gyroquant chat`: a conversation with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.chat_session import Chat
from gyroquant.cli.common import Debug


def chat(
    folder: Annotated[Path, typer.Argument(metavar="OUT|DEST", help="A folder that gyroquant wrote, or an export.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this prompt, then exit.")] = None,
    tokens: Annotated[int, typer.Option(help="Maximal number of tokens per answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    debug: Debug = False,
) -> None:
    """Chat with a model, in the program that runs its folder. An empty line or Ctrl-D ends the chat."""
    conversation = Chat(folder, temperature, seed)
    while True:
        text = prompt
        if text is None:
            try:
                text = input("> ").strip()
            except EOFError:
                text = ""
        if not text:
            return
        for piece in conversation.ask(text, tokens):
            print(piece, end="", flush=True)
        print()
        if prompt is not None:
            return
