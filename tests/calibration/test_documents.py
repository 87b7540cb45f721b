"""Files of rows: conversations go through the chat template, texts are joined, anything else is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from gyroquant.calibration.text import load_text, token_stream, tokenize
from gyroquant.errors import InputError

USER, ANSWER = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
SAME: dict[str, Any] = {
    "messages": {"messages": [USER, ANSWER]},
    "messages before text": {"text": "w9", "messages": [USER, ANSWER], "prompt": "w9"},
    "parts": {
        "messages": [USER | {"content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]}, ANSWER]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]},
    "prompt": {"prompt": "w1 w2", "completion": "w3"},
    "prompt of messages": {"prompt": [USER], "completion": [ANSWER]},
    "alpaca": {"instruction": "w1", "input": "w2", "output": "w3"},
    "alpaca without input": {"instruction": "w1 w2", "input": "", "output": "w3"},
    "bare": [USER, ANSWER],
}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("shape", SAME)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_conversations_are_written_by_the_chat_template(shape: str, suffix: str, tmp_path: Path) -> None:
    row, path = SAME[shape], tmp_path / f"chat{suffix}"
    if suffix == ".json":
        path.write_text("\ufeff" + json.dumps([row, row], indent=1), encoding="utf-8")
    else:
        lines(path, row, row)
    text, tokenizer = load_text(path), tiny_models.beginning(template=tiny_models.CHAT)
    assert len(text.conversations) == text.about()["conversations"] == 2
    ids = tokenize(text, tokenizer, 96).tolist()
    one = tokenizer.apply_chat_template([USER, ANSWER], tokenize=True, return_dict=False)
    assert ids == one * 2
    assert ids.count(1) == 2  # each begins once, as the template writes it
    assert torch.equal(
        tokenize(load_text([row, row] if isinstance(row, dict) else [{"messages": row}] * 2), tokenizer, 96),
        torch.tensor(ids),
    )


def test_a_window_that_begins_with_a_conversation_has_one_bos(tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", *[SAME["messages"]] * 9)
    stream = token_stream(load_text(path), tiny_models.beginning(template=tiny_models.CHAT), 96)
    size = stream.ids.numel() // 9
    first, second = stream.windows(size).ids[:2].tolist()
    assert first == second == stream.ids[:size].tolist()
    other = stream.windows(size + 1).ids
    assert other[:, 0].eq(1).all()
    assert other[0].tolist() == stream.ids[: size + 1].tolist()


def test_rows_of_text_are_prose_joined_as_datasets_rows_are(tmp_path: Path) -> None:
    rows = [{"text": "w1"}, {"text": "", "id": 7}, {"text": "w2\u2028w3"}]
    wanted = load_text(["w1", "", "w2\u2028w3"])
    for found in (
        load_text(lines(tmp_path / "a.jsonl", *rows)),
        load_text(lines(tmp_path / "c.ndjson", *rows)),
        load_text(rows),
    ):
        assert (found.content, found.sha256) == (wanted.content, wanted.sha256)
    (tmp_path / "strings.json").write_text('["w1", "", "w2\u2028w3"]')
    assert load_text(tmp_path / "strings.json").content == wanted.content


def test_other_names_are_prose_whatever_they_hold(tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.txt", SAME["messages"])
    assert load_text(path).content == path.read_text()
    assert load_text(lines(tmp_path / "chat.jsonl", SAME["messages"]), prose=True).conversations == ()


WRONG: dict[str, tuple[list[Any], str]] = {
    "unknown columns": (
        [SAME["messages"], {"question": "w1"}],
        r"line 2 of x.jsonl is not understood \(its columns are question\).*`messages`",
    ),
    "a number": ([3], "line 1 of x.jsonl is not understood"),
    "no messages": ([{"messages": []}], "line 1 of x.jsonl has no list of messages"),
    "messages of something": ([{"messages": "w1"}], "line 1 of x.jsonl has no list of messages"),
    "a message of nobody": (
        [{"messages": [{"content": "w1"}]}],
        "message 1 in line 1 of x.jsonl does not have an author",
    ),
    "a stranger": (
        [{"conversations": [{"from": "cat", "value": "w"}]}],
        "message 1 in line 1 of x.jsonl has the unknown author 'cat'",
    ),
    "a picture": ([{"messages": [USER | {"content": [{"type": "image"}]}]}], "content other than text"),
    "mixed": (
        [{"text": "w1"}, SAME["messages"]],
        "line 2 of x.jsonl is a conversation, and line 1 of x.jsonl is a text",
    ),
    "a text that is none": ([{"text": 5}], "text in line 1 of x.jsonl is int"),
    "a completion that is none": ([{"prompt": "w1", "completion": 5}], "completion in line 1 of x.jsonl is int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_understood_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    rows, why = WRONG[case]
    with pytest.raises(InputError, match=why):
        load_text(lines(tmp_path / "x.jsonl", *rows))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", '{"text": "w1"}\nw2 w3\n', "line 2 of x.jsonl is not valid JSON"),
        ("x.json", '[{"text": "w1"},', "x.json is not valid JSON"),
        ("x.json", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("x.json", "[]", "empty"),
        ("x.jsonl", " \n", "empty"),
    ],
)
def test_files_that_are_no_rows(name: str, content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=why):
        load_text(tmp_path / name)


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    text = load_text(lines(tmp_path / "x.jsonl", SAME["messages"]))
    with pytest.raises(InputError, match=r"line 1 of x.jsonl is a conversation.*no chat template.*chat_template.jinja"):
        tokenize(text, tiny_models.tokenizer(), 96)


def test_a_template_that_refuses_a_conversation_names_it(tmp_path: Path) -> None:
    text = load_text(lines(tmp_path / "x.jsonl", SAME["messages"], {"messages": [ANSWER]}))
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users first') }}{% endif %}w1"
    with pytest.raises(InputError, match=r"refuses line 2 of x.jsonl: users first"):
        tokenize(text, tiny_models.beginning(template=template), 96)


def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'gyroquant\[parquet\]'"):
        load_text(tmp_path / "x.parquet")


def test_parquet_files_hold_the_same_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [USER, ANSWER], "n": i} for i in range(3)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    tokenizer = tiny_models.beginning(template=tiny_models.CHAT)
    there = tokenize(load_text(lines(tmp_path / "x.jsonl", *rows)), tokenizer, 96)
    found = load_text(tmp_path / "x.parquet")
    assert torch.equal(tokenize(found, tokenizer, 96), there)
    assert found.sha256 == load_text(tmp_path / "x.parquet").sha256
    parquet.write_table(arrow.Table.from_pylist([{"text": "w1"}, {"text": "w2"}]), tmp_path / "y.parquet")
    assert load_text(tmp_path / "y.parquet").content == "w1\n\nw2"
    parquet.write_table(arrow.Table.from_pylist([{"body": "w1"}]), tmp_path / "z.parquet")
    with pytest.raises(InputError, match=r"row 1 of z.parquet is not understood \(its columns are body\)"):
        load_text(tmp_path / "z.parquet")
    (tmp_path / "w.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match="cannot be read as a Parquet file"):
        load_text(tmp_path / "w.parquet")
