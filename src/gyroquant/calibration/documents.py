"""Rows of data sets as conversations or as texts: JSON, JSON lines and Parquet files, or rows in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
"""The endings of files with rows. Every other file is prose."""

SHAPES = (
    "`messages` (a list of {role, content}), `conversations` (a list of {from, value}), `prompt` and `completion`, "
    "`instruction` (with `input`) and `output`, or `text`"
)
"""The columns that are understood, in the order in which they are tried."""

_COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "system",
    "tools",
)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES |= {"chatgpt": "assistant", "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool"}


@dataclass(frozen=True)
class Conversation:
    """One conversation: `messages` in the form of chat templates, and `place`, its line or entry, for errors."""

    messages: tuple[Mapping[str, Any], ...]
    place: str
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row and its place, such as ``line 3 of chat.jsonl``."""

    value: Any
    place: str


def is_rows(path: Path) -> bool:
    """Whether a file has rows, by the ending of its name."""
    return path.suffix.lower() in SUFFIXES


def parse_json(content: str, name: str) -> list[Row]:
    """The rows of a JSON array, of one JSON object, or of JSON lines (empty lines are skipped).

    Raises InputError, with the line, for anything else.
    """
    start = content.lstrip()[:1]
    try:
        whole = json.loads(content)
    except RecursionError as error:
        raise InputError(f"{name} is nested too deeply to be read") from error
    except ValueError as error:
        if start == "[" and "Extra data" not in str(error):  # else JSON lines, each of them a list of messages
            raise InputError(f"{name} is not valid JSON: {error}") from error
        return list(_lines(content, name))
    if isinstance(whole, list) and not _is_messages(whole):
        return [Row(value, f"entry {number} of {name}") for number, value in enumerate(whole, 1)]
    return [Row(whole, f"line 1 of {name}")]


def _lines(content: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines: strings may contain other line ends
        if not line.strip():
            continue
        try:
            yield Row(json.loads(line), f"line {number} of {name}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {name} is not valid JSON: {error}") from error


def read_parquet(path: Path) -> list[Row]:
    """The rows of a Parquet file, with the columns that are understood.

    Raises InputError if pyarrow is not installed, or cannot read the file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file, which needs pyarrow: pip install 'gyroquant[parquet]', or give a text file or "
            "JSON lines"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        chosen = [column for column in _COLUMNS if column in columns]
        rows = [row for batch in file.iter_batches(columns=chosen or columns) for row in batch.to_pylist()]
    except (OSError, ArrowException) as error:
        raise InputError(f"{path} cannot be read as a Parquet file: {' '.join(str(error).split())}") from error
    return [Row(row, f"row {number} of {path.name}") for number, row in enumerate(rows, 1)]


def documents(rows: Sequence[Row]) -> list[str] | list[Conversation]:
    """The content of rows: either all texts, or all conversations. The columns are those of SHAPES.

    Raises InputError for the first row that is not understood, or that is not of the same kind as the first row.
    """
    contents = [_document(row) for row in rows]
    for row, content in zip(rows, contents, strict=True):
        if isinstance(content, str) != isinstance(contents[0], str):
            kinds = ("a text", "a conversation") if isinstance(content, str) else ("a conversation", "a text")
            raise InputError(f"{row.place} is {kinds[0]}, and {rows[0].place} is {kinds[1]}: give one kind in a file")
    return contents  # type: ignore[return-value]  # all are of one kind


def _document(row: Row) -> str | Conversation:
    value = row.value
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _conversation(value, row.place)
    if isinstance(value, Mapping):
        for columns, read in _READERS:
            if all(value.get(column) is not None for column in columns):
                return read(value, row.place)
    keys = f"its columns are {', '.join(map(str, list(value)[:8])) or 'none'}" if isinstance(value, Mapping) else ""
    raise InputError(f"{row.place} is not understood ({keys or repr(value)[:40]}): a row has {SHAPES}")


def _is_messages(value: Any) -> bool:
    def is_message(turn: Any) -> bool:
        return isinstance(turn, Mapping) and any(keys <= set(turn) for keys in ({"role", "content"}, {"from", "value"}))

    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _conversation(turns: Any, place: str, tools: Any = None) -> Conversation:
    """A conversation made of turns, each with `role` and `content` or with `from` and `value`."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{place} has no list of messages: a row has {SHAPES}")
    messages = tuple(_message(turn, f"message {number} in {place}") for number, turn in enumerate(turns, 1))
    return Conversation(messages, place, tuple(tools) if isinstance(tools, list) else ())


def _message(turn: Any, place: str) -> dict[str, Any]:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str):
        raise InputError(f"{place} does not have an author: give it role and content, or from and value")
    if "role" not in turn:
        if role.lower() not in _ROLES:
            raise InputError(f"{place} has the unknown author {role!r} in from; use {', '.join(_ROLES)}")
        role = _ROLES[role.lower()]
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    rest = {key: value for key, value in rest.items() if value is not None}  # Parquet fills missing values with None
    content = turn.get("content", turn.get("value"))
    if content is None and "tool_calls" in rest:
        return {"role": role, "content": "", **rest}
    return {"role": role, "content": _plain(content, place), **rest}


def _plain(content: Any, place: str) -> str:
    """The text of a message. A message may be a list of parts, each of them a text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content]
        if texts and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise InputError(f"{place} has content other than text: give conversations of text alone")


def _string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column} in {place} is {type(value).__name__}, not a text")
    return value


def _turns(value: Any, role: str, column: str, place: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": _string(value, column, place)}]


def _completed(row: Mapping[str, Any], place: str) -> Conversation:
    """A prompt and its completion, each a text or a list of messages."""
    turns = _turns(row["prompt"], "user", "prompt", place)
    return _conversation([*turns, *_turns(row["completion"], "assistant", "completion", place)], place)


def _instructed(row: Mapping[str, Any], place: str) -> Conversation:
    """An instruction, followed by an empty line and the input if there is one, and the output."""
    parts = [_string(row[key], key, place) for key in ("instruction", "input") if row.get(key)]
    turns = [("system", row["system"])] if row.get("system") else []
    turns += [("user", "\n\n".join(parts)), ("assistant", _string(row["output"], "output", place))]
    return _conversation([{"role": role, "content": content} for role, content in turns], place)


_READERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], str | Conversation]], ...] = (
    (("messages",), lambda row, place: _conversation(row["messages"], place, row.get("tools"))),
    (("conversations",), lambda row, place: _conversation(row["conversations"], place, row.get("tools"))),
    (("prompt", "completion"), _completed),
    (("instruction", "output"), _instructed),
    (("text",), lambda row, place: _string(row["text"], "text", place)),
)


def render(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The tokens of a conversation, written by the tokenizer's chat template, special tokens included.

    Raises InputError if the tokenizer has no template, or if the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{conversation.place} is a conversation, but the tokenizer has no chat template: put the "
            "chat_template.jinja of the instruction-tuned model into the model's folder, or give plain text"
        )
    extra: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    try:
        text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False, **extra)
    except Exception as error:  # templates are programs and may raise anything
        reason = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer's chat template refuses {conversation.place}: {reason}. Correct the conversation, or "
            "leave it out"
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def canonical(rows: Iterable[Row]) -> str:
    """Rows as JSON lines: the text whose sha256 identifies data that is not a text itself."""
    return "\n".join(json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str) for row in rows)


__all__ = ["SHAPES", "Conversation", "Row", "canonical", "documents", "is_rows", "parse_json", "read_parquet", "render"]
