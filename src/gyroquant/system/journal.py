"""The journal keeps the finished work of a run on disk. After an interruption, the same command continues from there.

The journal lies beside the output folder of the run until that folder is in place. It holds four kinds of data: the
facts that identify the run, the results of finished stages, every rounded block, and the hidden states after the last
of these blocks. Each file is written under a temporary name, flushed to the disk, and renamed. A block counts as done
once its record exists: the record is written last and holds the checksums of everything that it names. So whenever the
process dies, the journal has a state between two blocks.

The format has a number. A journal with another number belongs to another release, and nothing else in it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gyroquant.errors import GyroquantError, InputError
from gyroquant.system.files import file_digest, locked, make_folder, put, put_tensors, sync

_FORMAT = 2  # 1 is the format of gyroquant 0.1.0
_HEAD = "run"
_DONE = "done"
_PART = 1 << 24  # bytes of hidden states that are copied at once


class JournalError(InputError):
    """This run can neither continue from a journal nor remove it."""


class Journal:
    """The journal of the run that makes `out`. It is a context that locks `out` against other runs.

    When the context ends with a GyroquantError, or before any work was done, the journal is removed, if `begin` found
    that it belongs to this run. After an interruption, a full disk or a lack of memory it stays, and the attribute
    `kept` of the exception holds its path. `fresh` discards an earlier journal.

    A worker in another process does not enter the context. It passes `head`, the checksum of the facts of its run.
    `put` then refuses to write if another run has begun in the meantime.
    """

    def __init__(self, out: Path, fresh: bool = False, head: str | None = None):
        self.out, self.fresh = out.absolute(), fresh
        self.folder = self.out.with_name(f".{self.out.name}.journal")
        self._lock, self._is_ours, self._expected_head = ExitStack(), False, head

    def __enter__(self) -> Journal:
        self._lock.enter_context(locked(self.out))
        return self

    def begin(self, facts: Mapping[str, Any]) -> bool:
        """Opens the journal of a run. `facts` are plain data: everything that the result of the run depends on.

        Returns whether there is a journal to continue from. Raises JournalError if that journal belongs to another run
        (the message names the differences), or has the format of another release (the message names the release).
        """
        if self.folder.exists() and (self.fresh or not self._record(_HEAD).exists()):
            self._clear()  # without a head, it is the rest of a journal that was being removed
        make_folder(self.folder)
        facts, stored = _with_format(facts), self.read(_HEAD)
        if stored is not None and _format_of(stored) != _FORMAT:
            raise JournalError(
                f"{self.out} has an unfinished run that {_release_of(stored)} began, in a format of the journal that "
                f"this release does not read ({_format_of(stored)}, this release has {_FORMAT}). Finish the run with "
                "that release, or give --fresh to start over"
            )
        if stored not in (None, facts):
            raise JournalError(
                f"{self.out} has an unfinished run with other settings: {_differences(stored, facts)}. Run that one "
                "again to finish it, or give --fresh to start over"
            )
        for leftover in (*self.folder.glob(".*.partial"), *self.folder.glob(".tmp*")):
            leftover.unlink()
        if stored is None:
            self.write(_HEAD, facts)
        self._is_ours = True
        return stored is not None

    @property
    def head(self) -> str:
        """The checksum of the facts of the run."""
        return file_digest(self._record(_HEAD))

    def finish(self, sums: Path) -> None:
        """Records that the output folder is about to be put in place. `sums` is the file with its checksums."""
        self.write(_DONE, {"sums": file_digest(sums), "facts": self.read(_HEAD)})

    def finished(self, sums: Path) -> bool:
        """Whether the output folder is in place, and only the journal is left to be removed."""
        done = self.read(_DONE)
        return done is not None and sums.exists() and file_digest(sums) == done["sums"]

    def has_finished(self, facts: Mapping[str, Any]) -> bool:
        """Whether the run that put the output folder in place had these facts."""
        done = self.read(_DONE)
        return done is not None and bool(done["facts"] == _with_format(facts))

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def path(self, name: str) -> Path:
        """The file of a group of tensors, or of the state of an unfinished stage."""
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, data: Any) -> None:
        """Writes plain data with its checksum."""
        text = json.dumps(data)
        content = json.dumps({"sha256": _digest(text), "data": text})
        put(self._record(name), lambda partial: partial.write_text(content, encoding="utf-8"))

    def read(self, name: str) -> Any | None:
        """Plain data of that name; None if there is none. Raises InputError if it is damaged."""
        path = self._record(name)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["sha256"] == _digest(content["data"]):
                return json.loads(content["data"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise self._damaged(path)

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a stage, plain data: from the journal, else from `make`, which is called now."""
        if self.read(name) is None:
            self.write(name, {"result": make()})
        record: dict[str, Any] = self.read(name) or {}
        return record["result"]

    def put(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Writes a group of tensors, and a record with it."""
        path = self.path(name)
        if self._expected_head is not None and not (self._record(_HEAD).exists() and self.head == self._expected_head):
            raise JournalError(f"{self.folder} now belongs to another run")
        put_tensors(path, tensors)
        self.write(name, {**record, "tensors": file_digest(path)})

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a group; None if there is none. Raises InputError if group or record is damaged."""
        record: dict[str, Any] | None = self.read(name)
        if record is not None:
            self._check(self.path(name), record["tensors"])
        return record

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group."""
        with safe_open(self.path(name), framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}

    def put_states(self, name: str, states: Iterable[Tensor | Path]) -> list[dict[str, str]]:
        """Writes large tensors, given in memory or as files of raw bytes. Returns the list that `get_states` needs."""
        kept = []
        for number, state in enumerate(states):
            path, total = self.folder / f"{name}-{number}.bin", hashlib.sha256()
            put(path, partial(_copy, state, total))
            kept.append({"file": path.name, "sha256": total.hexdigest()})
        return kept

    def get_states(self, kept: Iterable[Mapping[str, str]], states: Iterable[Tensor | Path]) -> None:
        """Fills tensors, or files, with the stored bytes. Raises InputError if these are damaged."""
        for entry, state in zip(kept, states, strict=True):
            path = self.folder / entry["file"]
            self._check(path, entry["sha256"], state.stat().st_size if isinstance(state, Path) else state.nbytes)
            with path.open("rb") as file:
                if isinstance(state, Path):
                    with state.open("r+b") as target:  # written in place, because the file is mapped
                        shutil.copyfileobj(file, target, _PART)
                else:
                    file.readinto(_raw(state))

    def drop_states(self, name: str) -> None:
        """Deletes large tensors from the journal."""
        for path in self.folder.glob(f"{name}-*.bin"):
            path.unlink(missing_ok=True)

    def _check(self, path: Path, digest: str, size: int | None = None) -> None:
        if not path.exists() or size not in (None, path.stat().st_size) or file_digest(path) != digest:
            raise self._damaged(path)

    def _damaged(self, path: Path) -> InputError:
        return JournalError(
            f"{path} is damaged: it is not what the run has written there. Give --fresh to start over, on another disk "
            "if this one fails"
        )

    def close(self) -> None:
        """Removes the journal, after the output folder is in place."""
        with suppress(OSError):  # the next run removes the rest
            if self._record(_DONE).exists():  # removed last, because it marks the run as done
                for path in self.folder.iterdir():
                    if path != self._record(_DONE):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._clear()

    def _clear(self) -> None:
        """Removes everything, first the record that identifies the run."""
        self._record(_HEAD).unlink(missing_ok=True)
        sync(self.folder)
        shutil.rmtree(self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if error is None or isinstance(error, JournalError):
                return
            names = {path.name for path in self.folder.glob("[!.]*")} - {self._record(_HEAD).name}
            if names and not isinstance(error, GyroquantError):
                error.kept = self.folder  # type: ignore[attr-defined]
            elif self._is_ours:
                self.close()


def put_state(path: Path, tensors: Mapping[str, Tensor], mark: str, data: Any) -> None:
    """Writes the state of an unfinished stage: tensors, plain data, and a `mark` of the settings they depend on."""
    text = json.dumps(data)
    metadata = {"mark": mark, "data": text, "sha256": _state_digest(tensors, text)}
    put_tensors(path, tensors, metadata)


def get_state(path: Path, mark: str) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors and data of a state with this mark; None if the file is another one or damaged: start over then."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("mark") != mark:
                return None
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (OSError, SafetensorError):
        return None
    if metadata.get("sha256") != _state_digest(tensors, metadata["data"]):
        return None
    return tensors, json.loads(metadata["data"])


def _state_digest(tensors: Mapping[str, Tensor], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(_raw(tensors[name].detach().cpu().contiguous()))
    return total.hexdigest()


def _with_format(facts: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps({"format": _FORMAT, **facts}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _raw(tensor: Tensor) -> Any:
    """The memory of a tensor on the CPU, as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _copy(state: Tensor | Path, total: Any, target: Path) -> None:
    """Writes the bytes of a state into a file, part by part, and adds them to a checksum."""
    with ExitStack() as opened:
        output = opened.enter_context(target.open("wb"))
        if isinstance(state, Path):
            file = opened.enter_context(state.open("rb"))
            parts: Iterable[Any] = iter(lambda: file.read(_PART), b"")
        else:
            data = _raw(state.detach().contiguous())
            parts = (data[start : start + _PART] for start in range(0, len(data), _PART))
        for part in parts:
            total.update(part)
            output.write(part)


def _format_of(head: Any) -> Any:
    """The number of a journal's format; None if the journal does not have one."""
    return head.get("format") if isinstance(head, dict) else None


def _release_of(head: Any) -> str:
    """The release that began a journal, as text. Every format stores the version in its facts."""
    kept = head.get("versions") if isinstance(head, dict) else None
    version = kept.get("gyroquant") if isinstance(kept, dict) else None
    return "an unknown release of gyroquant" if version is None else f"gyroquant {version}"


def _differences(stored: Any, facts: Any) -> str:
    ours, theirs = dict(_leaves(facts)), dict(_leaves(stored))
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    parts = [f"{name} was {_short(theirs.get(name))}, now {_short(ours.get(name))}" for name in names[:4]]
    return "; ".join(parts) + (f"; and {len(names) - 4} more" if len(names) > 4 else "")


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def _leaves(data: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, data
