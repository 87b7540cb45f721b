"""Checksums of a folder: written when it is complete, compared when it is read.

`SHA256SUMS` is what coreutils' ``sha256sum`` writes, so ``sha256sum -c SHA256SUMS`` checks a folder without gyroquant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from gyroquant.errors import InputError
from gyroquant.files import file_digest, put

FILE = "SHA256SUMS"
_BESIDE = {".md", ".rst", ".txt", ".log", ".csv", ".html", ".pdf", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".svg"}
_READ = {"merges.txt", "vocab.txt", "dict.txt"}  # by tokenizers
_NAMES = {"LICENSE", "NOTICE", "README"}
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_checking: ContextVar[bool] = ContextVar("checking", default=True)


@dataclass(frozen=True)
class Integrity:
    """How a folder differs from its checksums; files by their relative posix paths.

    `files` is how many are listed, `bytes` how much was hashed. `extra` files are not listed.
    """

    files: int
    bytes: int
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def unlisted(self) -> tuple[str, ...]:
        """The extra files that belong into the list. Pictures and texts for people do not, nor does what is hidden."""
        return tuple(name for name in self.extra if not _is_beside(PurePosixPath(name)))

    @property
    def intact(self) -> bool:
        """Whether every file that is listed is there and unchanged, and all that belong into the list are in it."""
        return not (self.missing or self.changed or self.unlisted)


def _is_beside(path: PurePosixPath) -> bool:
    if any(part.startswith(".") for part in path.parts):  # of git, of the hub, of an export that was killed
        return True
    return path.name not in _READ and (path.suffix.lower() in _BESIDE or path.name in _NAMES)


def seal(folder: str | Path) -> Path:
    """Writes the checksums of every file below a folder, sorted by path, by way of a temporary file; returns theirs."""
    folder = Path(folder)
    target, lines = folder / FILE, []
    for name in _files(folder):
        escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
        lines.append(f"{chr(92) * (escaped != name)}{file_digest(folder / name)}  {escaped}\n")
    put(target, lambda place: place.write_text("".join(lines), encoding="utf-8", newline="\n"))
    return target


def read_sums(folder: str | Path) -> dict[str, str] | None:
    """The digests in a folder's list, by path; None for a folder without one.

    Raises InputError for a list that cannot be read, and for one that names files outside of the folder.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    found: dict[str, str] = {}
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if lines.pop():
        raise InputError(f"{path} ends in the middle of a line: its end is cut off")
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{path}, line {number}, is no checksum as sha256sum writes it: the list is damaged")
        name = match[3]
        if match[1]:
            name = re.sub(r"\\([\\nr])", lambda m: {"\\": "\\", "n": "\n", "r": "\r"}[m[1]], name)
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise InputError(f"{path}, line {number}, names {name!r}, which lies outside of the folder")
        found[name] = match[2]
    return found


def check(folder: str | Path, note: Callable[[], None] = lambda: None) -> Integrity | None:
    """Compares every file of a folder with its list; None for a folder without one.

    A folder below it that has a list of its own, such as an export, is compared with that. `note` is called after each
    megabyte. Raises InputError as `read_sums` does.
    """
    folder = Path(folder)
    sums = read_sums(folder)
    if sums is None:
        return None
    present = set(_files(folder))
    missing = [name for name in sums if name not in present]
    changed, size = [], 0
    for name in sorted(present & sums.keys()):
        size += (folder / name).stat().st_size
        if file_digest(folder / name, note) != sums[name]:
            changed.append(name)
    extra, files = sorted(present - sums.keys()), len(sums)
    for inner in [name.rpartition("/")[0] for name in extra if name.endswith(f"/{FILE}")]:
        nested = check(folder / inner, note)
        assert nested is not None
        mine = [name for name in extra if name.startswith(f"{inner}/")]
        extra = [name for name in extra if name not in mine] + [f"{inner}/{name}" for name in nested.extra]
        missing += [f"{inner}/{name}" for name in nested.missing]
        changed += [f"{inner}/{name}" for name in nested.changed]
        files, size = files + nested.files, size + nested.bytes
    return Integrity(files, size, tuple(sorted(missing)), tuple(sorted(changed)), tuple(sorted(extra)))


@contextmanager
def unchecked() -> Iterator[None]:
    """Folders are opened without a look at their checksums for the duration of a with block."""
    before = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(before)


def check_files(folder: Path, names: Collection[str]) -> None:
    """Raises InputError, naming the file, when one of these files of a folder is not what its list says, or not in it.

    A folder without a list is taken as it is. A file that was compared once in this process and has not been written to
    since is not read again.
    """
    sums = read_sums(folder) if _checking.get() else None
    if sums is None:
        return
    for name in names:
        path = folder / name
        if name not in sums:
            raise InputError(
                f"{path} is not in {FILE}: the list is damaged, or the file is none of this folder. Copy or make the "
                "folder again, or take the file out of it"
            )
        try:
            facts = path.stat()
            digest = _digest(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if digest != sums[name]:
            raise InputError(
                f"{path} is damaged: its sha256 is not the one in {FILE}. Copy or make the folder again "
                "(`gyroquant verify` says how it was made)"
            )


@lru_cache(maxsize=256)
def _digest(path: Path, inode: int, size: int, changed: int) -> str:
    """The digest of a file in this state."""
    return file_digest(path)


def _files(folder: Path) -> list[str]:
    """Every file below a folder but its own list, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != FILE)
