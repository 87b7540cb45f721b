"""Tasks by name, the text that items come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import plain_sentences
import pytest

import gyroquant as gq
from gyroquant.evaluation.offline_tasks import OFFLINE, TASKS, make_items, read_items, split_names, task_text

GENERATED = ["arithmetic", "brackets"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(plain_sentences.prose(60), encoding="utf-8")
    return path


def test_offline_is_all_of_them_once() -> None:
    assert split_names([OFFLINE]) == (list(TASKS), [])
    assert split_names(["code", "hellaswag", OFFLINE, "hellaswag"]) == (
        ["code", "cloze", "arithmetic", "spelling", "brackets"],
        ["hellaswag"],
    )


def test_items_are_the_same_for_a_seed_and_others_for_another(text: Path) -> None:
    names = ["cloze", "spelling", *GENERATED]
    made = [make_items(names, task_text(names, text), 10, seed) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert all(first.sha256 != other.sha256 for first, other in zip(made[0], made[2], strict=True))
    assert [entry.name for entry in made[0]] == names
    assert all(len(entry.items) == entry.asked == 10 and entry.chance == 0.25 for entry in made[0])
    assert [entry.source for entry in made[0]] == ["text.txt", "text.txt", "generated", "generated"]


def test_a_task_alone_has_the_items_that_it_has_among_others(text: Path) -> None:
    content = task_text(["cloze"], text)
    assert make_items(["cloze"], content, 5)[0] in make_items([*GENERATED, "cloze"], content, 5)


def test_generated_items_stay_the_same() -> None:
    """A change of these digests changes everyone's results: it needs a line in CHANGELOG.md."""
    made = {entry.name: entry.sha256[:12] for entry in make_items(GENERATED, None, 200)}
    assert made == {"arithmetic": "b6ac28d16658", "brackets": "1f62488a347a"}


def test_items_are_read_again(tmp_path: Path) -> None:
    made = make_items(GENERATED, None, 4)
    (tmp_path / "items.json").write_text(json.dumps([entry.to_dict() for entry in made]))
    assert read_items(tmp_path / "items.json") == made


def test_without_a_text_sentences_are_of_pythons_reference() -> None:
    reference = task_text(["cloze"])
    assert reference is not None
    assert "language reference of Python 3" in reference.name
    assert "statement" in reference.content
    assert task_text(GENERATED) is None


def test_fewer_items_than_asked_are_stated(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(plain_sentences.prose(8))
    (made,) = make_items(["spelling"], task_text(["spelling"], tmp_path / "short.txt"), 200)
    assert 2 <= len(made.items) <= 8
    assert made.asked == 200


def test_what_cannot_be_items_is_refused(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text("one two three\n" * 50)
    with pytest.raises(gq.InputError, match=r"verse.txt has too few plain sentences for the task cloze.*--task-text"):
        make_items(["cloze"], task_text(["cloze"], tmp_path / "verse.txt"))
    with pytest.raises(gq.InputError, match="--task-items is 1, and has to be at least 2"):
        make_items(GENERATED, None, 1)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello there."}]}))
    with pytest.raises(gq.InputError, match="holds conversations"):
        task_text(["cloze"], tmp_path / "chat.jsonl")
