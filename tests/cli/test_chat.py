"""A conversation: what is said comes in pieces, is remembered, and ends where the model ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
import saved_models
import tiny_models
import torch
from typer.testing import CliRunner

import gyroquant as gq
from gyroquant.cli import app
from gyroquant.cli.chat_session import Chat
from gyroquant.errors import InputError


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rounded."""
    return saved_models.rounded(tiny_models.build("llama"), tmp_path_factory.mktemp("saved") / "out", bits=8).folder


def greedy(folder: Path, text: str, count: int) -> list[int]:
    """The likeliest tokens, by running everything again for each."""
    model = gq.load(folder)
    ids = tiny_models.tokenizer()(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()


def test_the_likeliest_tokens_in_pieces(out: Path) -> None:
    wanted = greedy(out, "w5 w9", 12)
    stop = wanted.index(2) if 2 in wanted else 12
    talk = Chat(out)
    pieces = list(talk.ask("w5 w9", 12))
    assert "".join(pieces) == tiny_models.tokenizer().decode(wanted[:stop], skip_special_tokens=True)
    assert len(pieces) == stop
    assert [one["role"] for one in talk.messages] == ["user", "assistant"]


def test_it_ends_at_the_token_that_ends_text(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Chat(out)
    monkeypatch.setattr(talk, "_ends", lambda: {greedy(out, "w5 w9", 3)[2]})
    said = list(talk.ask("w5 w9", 12))
    assert len(said) <= 2


def test_drawn_tokens_come_again_with_the_seed(out: Path) -> None:
    one, two, three = (list(Chat(out, 5.0, seed).ask("w1", 8)) for seed in (1, 1, 2))
    assert one == two != three


def test_an_export_answers_as_its_source(out: Path, tmp_path: Path) -> None:
    gq.export(out, "dense", tmp_path / "x")
    assert list(Chat(tmp_path / "x").ask("w7 w8", 6)) == list(Chat(out).ask("w7 w8", 6))


def test_the_command(out: Path, tmp_path: Path) -> None:
    run = CliRunner()
    once = run.invoke(app, ["chat", str(out), "--prompt", "w5", "--tokens", "4"])
    typed = run.invoke(app, ["chat", str(out), "--tokens", "4"], input="w5\n\n")
    assert once.exit_code == typed.exit_code == 0
    assert once.stdout.strip() in typed.stdout
    assert len(once.stdout.split()) >= 1
    with pytest.raises(InputError, match=r"is not a model: it has no config\.json"):
        Chat(tmp_path)
