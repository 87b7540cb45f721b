"""What a run has done so far, on the disk, so that nothing of it is lost: the same command goes on from there.

Beside the folder that a run is to make lies its journal until that folder is in place: what the run is of, the results
of stages that are done, every rounded block, and the hidden states behind the last of them. Each of these files is
written under another name, seen on the disk, and renamed; a block counts once its record is there, which comes last and
holds the checksums of what it speaks of. So whenever the process dies, the journal is that of a moment between two
blocks.
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
from gyroquant.files import file_digest, locked, make_folder, put, put_tensors, sync

_FORMAT = 1
_HEAD = "run"
_DONE = "done"
_PART = 1 << 24  # bytes of hidden states that are copied at once


class JournalError(InputError):
    """What lies in a journal is not what this run can go on from, nor its to remove."""


class Journal:
    """The journal of the run that makes `out`; a context in which no other run can have it.

    Leaving it after an error of the user's to mend (GyroquantError), or before anything was done, removes it, if
    `begin` has found it to be this run's; after an interruption, a full disk or want of memory it stays, and the
    error's attribute `kept` tells where. `fresh` throws away what is there.

    A worker of another process, which does not enter it, gives the checksum of the `head` that it works for: nothing is
    kept when another run has begun there since.
    """

    def __init__(self, out: Path, fresh: bool = False, head: str | None = None):
        self.out, self.fresh = out.absolute(), fresh
        self.folder = self.out.with_name(f".{self.out.name}.journal")
        self._held, self._ours, self._for = ExitStack(), False, head

    def __enter__(self) -> Journal:
        self._held.enter_context(locked(self.out))
        return self

    def begin(self, facts: Mapping[str, Any]) -> bool:
        """Opens the journal of a run of which `facts`, plain data, tell everything that its result depends on.

        Returns whether there is something to go on from. Raises JournalError, naming what differs, when what is there
        belongs to another run.
        """
        if self.folder.exists() and (self.fresh or not self._record(_HEAD).exists()):
            self._clear()  # without a head it is what is left of one that was being removed
        make_folder(self.folder)
        for left in (*self.folder.glob(".*.partial"), *self.folder.glob(".tmp*")):
            left.unlink()
        facts, known = _as_kept(facts), self.read(_HEAD)
        if known is None:
            self.write(_HEAD, facts)
        elif known != facts:
            raise JournalError(
                f"{self.out} has an unfinished run with other settings: {_differences(known, facts)}. Run that one "
                "again to finish it, or give --fresh to start over"
            )
        self._ours = True
        return known is not None

    @property
    def head(self) -> str:
        """The checksum of what the run is of."""
        return file_digest(self._record(_HEAD))

    def finish(self, sums: Path) -> None:
        """Notes that the folder is about to be put in place, whose checksums are in the file `sums`."""
        self.write(_DONE, {"sums": file_digest(sums), "facts": self.read(_HEAD)})

    def finished(self, sums: Path) -> bool:
        """Whether the folder was put in place, and only the journal was left to be removed."""
        done = self.read(_DONE)
        return done is not None and sums.exists() and file_digest(sums) == done["sums"]

    def has_finished(self, facts: Mapping[str, Any]) -> bool:
        """Whether the run that has put the folder in place was one of these facts."""
        done = self.read(_DONE)
        return done is not None and bool(done["facts"] == _as_kept(facts))

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def path(self, name: str) -> Path:
        """Where the tensors of a group lie, or the state of a stage that is under way."""
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, data: Any) -> None:
        """Keeps plain data with its checksum."""
        text = json.dumps(data)
        whole = json.dumps({"sha256": _digest(text), "data": text})
        put(self._record(name), lambda place: place.write_text(whole, encoding="utf-8"))

    def read(self, name: str) -> Any | None:
        """Plain data that was kept, None for none. Raises InputError when it is damaged."""
        path = self._record(name)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["sha256"] == _digest(found["data"]):
                return json.loads(found["data"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise self._damaged(path)

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a stage, plain data: what was kept of it, or what `make` gives now."""
        if self.read(name) is None:
            self.write(name, {"result": make()})
        found: dict[str, Any] = self.read(name) or {}
        return found["result"]

    def put(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keeps a group of tensors, and with them a record."""
        path = self.path(name)
        if self._for is not None and not (self._record(_HEAD).exists() and self.head == self._for):
            raise JournalError(f"{self.folder} is another run's by now")
        put_tensors(path, tensors)
        self.write(name, {**record, "tensors": file_digest(path)})

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a group, None for one that was not kept. Raises InputError when group or record is damaged."""
        record: dict[str, Any] | None = self.read(name)
        if record is not None:
            self._check(self.path(name), record["tensors"])
        return record

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group."""
        with safe_open(self.path(name), framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}

    def put_states(self, name: str, states: Iterable[Tensor | Path]) -> list[dict[str, str]]:
        """Keeps large tensors, in memory or in files of their raw bytes; returns what `get_states` wants to know."""
        kept = []
        for number, state in enumerate(states):
            path, total = self.folder / f"{name}-{number}.bin", hashlib.sha256()
            put(path, partial(_copy, state, total))
            kept.append({"file": path.name, "sha256": total.hexdigest()})
        return kept

    def get_states(self, kept: Iterable[Mapping[str, str]], states: Iterable[Tensor | Path]) -> None:
        """Fills tensors, or files, with what was kept. Raises InputError when that is damaged."""
        for known, state in zip(kept, states, strict=True):
            path = self.folder / known["file"]
            self._check(path, known["sha256"], state.stat().st_size if isinstance(state, Path) else state.nbytes)
            with path.open("rb") as file:
                if isinstance(state, Path):
                    with state.open("r+b") as there:  # a file that is mapped stays the same file
                        shutil.copyfileobj(file, there, _PART)
                else:
                    file.readinto(_raw(state))

    def drop_states(self, name: str) -> None:
        """Deletes large tensors that were kept."""
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
        """The folder is in place: the journal goes."""
        with suppress(OSError):  # what is left is removed by the next run
            if self._record(_DONE).exists():  # then it tells until the last that the run is done
                for path in self.folder.iterdir():
                    if path != self._record(_DONE):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._clear()

    def _clear(self) -> None:
        """Removes everything, and first of all what says whose it is."""
        self._record(_HEAD).unlink(missing_ok=True)
        sync(self.folder)
        shutil.rmtree(self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if error is None or isinstance(error, JournalError):
                return
            names = {path.name for path in self.folder.glob("[!.]*")} - {self._record(_HEAD).name}
            if names and not isinstance(error, GyroquantError):
                error.kept = self.folder  # type: ignore[attr-defined]
            elif self._ours:
                self.close()


def put_state(path: Path, tensors: Mapping[str, Tensor], mark: str, data: Any) -> None:
    """Keeps the state of a stage that is under way: tensors, plain data, and a `mark` of what they depend on."""
    text = json.dumps(data)
    metadata = {"mark": mark, "data": text, "sha256": _state_digest(tensors, text)}
    put_tensors(path, tensors, metadata)


def get_state(path: Path, mark: str) -> tuple[dict[str, Tensor], Any] | None:
    """A state with this mark; None for any other file, and for a damaged one: those are to start over from."""
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


def _as_kept(facts: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps({"format": _FORMAT, **facts}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _raw(tensor: Tensor) -> Any:
    """The memory of a tensor on the CPU, as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _copy(state: Tensor | Path, total: Any, target: Path) -> None:
    """Writes the bytes of a state into a file, part by part, and adds them to a checksum."""
    with ExitStack() as opened:
        into = opened.enter_context(target.open("wb"))
        if isinstance(state, Path):
            file = opened.enter_context(state.open("rb"))
            parts: Iterable[Any] = iter(lambda: file.read(_PART), b"")
        else:
            data = _raw(state.detach().contiguous())
            parts = (data[start : start + _PART] for start in range(0, len(data), _PART))
        for part in parts:
            total.update(part)
            into.write(part)


def _differences(known: Any, facts: Any) -> str:
    ours, theirs = dict(_leaves(facts)), dict(_leaves(known))
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    told = [f"{name} was {_short(theirs.get(name))}, now {_short(ours.get(name))}" for name in names[:4]]
    return "; ".join(told) + (f"; and {len(names) - 4} more" if len(names) > 4 else "")


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def _leaves(data: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, data
