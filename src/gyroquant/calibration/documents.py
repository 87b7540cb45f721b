"""Rows of data sets as conversations or as texts: JSON, JSON lines and Parquet files, or rows in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
"""How the names of files end that hold rows; every other file is prose."""

SHAPES = (
    "`messages` (a list of {role, content}), `conversations` (a list of {from, value}), `prompt` and `completion`, "
    "`instruction` (with `input`) and `output`, or `text`"
)
"""The columns that are understood, in the order in which they are looked for."""

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
    """One conversation: `messages` as chat templates take them, and `place`, where it stands, for errors."""

    messages: tuple[Mapping[str, Any], ...]
    place: str
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row with the place where it stands, such as ``line 3 of chat.jsonl``."""

    value: Any
    place: str


def is_rows(path: Path) -> bool:
    """Whether a file holds rows, by its name."""
    return path.suffix.lower() in SUFFIXES


def parse_json(content: str, name: str) -> list[Row]:
    """The rows of a JSON array, of one JSON object, or of JSON lines (empty lines are passed over).

    Raises InputError, with the line, for what is none of them.
    """
    start = content.lstrip()[:1]
    try:
        whole = json.loads(content)
    except RecursionError as error:
        raise InputError(f"{name} is nested too deeply to be read") from error
    except ValueError as error:
        if start == "[" and "Extra data" not in str(error):  # else a line each, which may be lists of messages
            raise InputError(f"{name} is not valid JSON: {error}") from error
        return list(_lines(content, name))
    if isinstance(whole, list) and not _is_messages(whole):
        return [Row(value, f"entry {number} of {name}") for number, value in enumerate(whole, 1)]
    return [Row(whole, f"line 1 of {name}")]


def _lines(content: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines: strings may hold other line ends
        if not line.strip():
            continue
        try:
            yield Row(json.loads(line), f"line {number} of {name}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {name} is not valid JSON: {error}") from error


def read_parquet(path: Path) -> list[Row]:
    """The rows of a Parquet file, with the columns that are understood.

    Raises InputError where pyarrow is not installed, and for a file that it does not read.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file, which needs pyarrow: pip install 'gyroquant[parquet]'; or give a text file or "
            "JSON lines"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        there = file.schema_arrow.names
        chosen = [column for column in _COLUMNS if column in there]
        rows = [row for batch in file.iter_batches(columns=chosen or there) for row in batch.to_pylist()]
    except (OSError, ArrowException) as error:
        raise InputError(f"{path} cannot be read as a Parquet file: {' '.join(str(error).split())}") from error
    return [Row(row, f"row {number} of {path.name}") for number, row in enumerate(rows, 1)]


def documents(rows: Sequence[Row]) -> list[str] | list[Conversation]:
    """What rows hold: all of them texts, or all of them conversations. Columns are those of SHAPES.

    Raises InputError that names the first row which cannot be understood, or which is not of the first one's kind.
    """
    found = [_document(row) for row in rows]
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, str) != isinstance(found[0], str):
            kinds = ("a text", "a conversation") if isinstance(one, str) else ("a conversation", "a text")
            raise InputError(f"{row.place} is {kinds[0]}, and {rows[0].place} is {kinds[1]}: give one kind in a file")
    return found  # type: ignore[return-value]  # all are of one kind


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
    def is_message(one: Any) -> bool:
        return isinstance(one, Mapping) and any(keys <= set(one) for keys in ({"role", "content"}, {"from", "value"}))

    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _conversation(turns: Any, place: str, tools: Any = None) -> Conversation:
    """A conversation of turns, each with `role` and `content` or with `from` and `value`."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{place} has no list of messages: a row has {SHAPES}")
    messages = tuple(_message(turn, f"message {number} in {place}") for number, turn in enumerate(turns, 1))
    return Conversation(messages, place, tuple(tools) if isinstance(tools, list) else ())


def _message(turn: Any, place: str) -> dict[str, Any]:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str):
        raise InputError(f"{place} says not whose it is: it needs role and content, or from and value")
    if "role" not in turn:
        if role.lower() not in _ROLES:
            raise InputError(f"{place} is from {role!r}; it can be from {', '.join(_ROLES)}")
        role = _ROLES[role.lower()]
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    rest = {key: value for key, value in rest.items() if value is not None}  # Parquet fills columns up with None
    content = turn.get("content", turn.get("value"))
    if content is None and "tool_calls" in rest:
        return {"role": role, "content": "", **rest}
    return {"role": role, "content": _plain(content, place), **rest}


def _plain(content: Any, place: str) -> str:
    """The text of a message, which may be given as parts of which each is a text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content]
        if texts and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise InputError(f"{place} holds something other than text: give conversations of text alone")


def _string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column} in {place} is {type(value).__name__}, not a text")
    return value


def _turns(value: Any, role: str, column: str, place: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": _string(value, column, place)}]


def _completed(row: Mapping[str, Any], place: str) -> Conversation:
    """A prompt and what completes it, each a text or a list of messages."""
    turns = _turns(row["prompt"], "user", "prompt", place)
    return _conversation([*turns, *_turns(row["completion"], "assistant", "completion", place)], place)


def _instructed(row: Mapping[str, Any], place: str) -> Conversation:
    """An instruction, with an input behind an empty line if there is one, and the output."""
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
    """The tokens of a conversation as the tokenizer's chat template writes it, special tokens included.

    Raises InputError for a tokenizer without a template, and for a conversation that the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{conversation.place} is a conversation, and the tokenizer has no chat template to write it by: put the "
            "chat_template.jinja of the instruction-tuned model into the model's folder, or give plain text"
        )
    extra: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    try:
        text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False, **extra)
    except Exception as error:  # templates are programs, and raise what they like
        why = " ".join(str(error).split())
        raise InputError(f"the tokenizer's chat template does not take {conversation.place}: {why}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def canonical(rows: Iterable[Row]) -> str:
    """Rows as JSON lines, by which data that is no text itself is known again."""
    return "\n".join(json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str) for row in rows)


__all__ = ["SHAPES", "Conversation", "Row", "canonical", "documents", "is_rows", "parse_json", "read_parquet", "render"]
