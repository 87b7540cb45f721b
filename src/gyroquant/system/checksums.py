"""Checksums of a folder: written when it is complete, compared when it is read.

`SHA256SUMS` has the format of coreutils' ``sha256sum``. So ``sha256sum -c SHA256SUMS`` checks a folder without
gyroquant.
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
from gyroquant.system.files import file_digest, put

CHECKSUM_FILE = "SHA256SUMS"
_BESIDE = {".md", ".rst", ".txt", ".log", ".csv", ".html", ".pdf", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".svg"}
_READ = {"merges.txt", "vocab.txt", "dict.txt"}  # text files that tokenizers read
_NAMES = {"LICENSE", "NOTICE", "README"}
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_checking: ContextVar[bool] = ContextVar("checking", default=True)


@dataclass(frozen=True)
class Integrity:
    """How a folder differs from its checksums. Files are given by their relative POSIX paths.

    - `files`: the number of listed files.
    - `bytes`: the number of hashed bytes.
    - `missing`: listed files that do not exist.
    - `changed`: listed files with another checksum.
    - `extra`: files that are not listed.
    """

    files: int
    bytes: int
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def unlisted(self) -> tuple[str, ...]:
        """The extra files that should be listed. Pictures, documents and hidden files need not be listed."""
        return tuple(name for name in self.extra if not _is_beside(PurePosixPath(name)))

    @property
    def intact(self) -> bool:
        """Whether every listed file exists unchanged, and every file that should be listed is."""
        return not (self.missing or self.changed or self.unlisted)


def _is_beside(path: PurePosixPath) -> bool:
    if any(part.startswith(".") for part in path.parts):  # files of git, of the hub, of an export that was killed
        return True
    return path.name not in _READ and (path.suffix.lower() in _BESIDE or path.name in _NAMES)


def write_checksums(folder: str | Path) -> Path:
    """Writes the checksums of every file below a folder, sorted by path, atomically. Returns the path of the list."""
    folder = Path(folder)
    target, lines = folder / CHECKSUM_FILE, []
    for name in _files(folder):
        escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
        lines.append(f"{chr(92) * (escaped != name)}{file_digest(folder / name)}  {escaped}\n")
    put(target, lambda place: place.write_text("".join(lines), encoding="utf-8", newline="\n"))
    return target


def read_sums(folder: str | Path) -> dict[str, str] | None:
    """The digests in a folder's list, by path; None if the folder has no list.

    Raises InputError if the list cannot be read or names files outside of the folder.
    """
    path = Path(folder) / CHECKSUM_FILE
    if not path.is_file():
        return None
    sums: dict[str, str] = {}
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if lines.pop():
        raise InputError(f"{path} ends in the middle of a line: its end is cut off. Copy or make the folder again")
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise InputError(
                f"{path}, line {number}, is not a checksum in the format of sha256sum: the list is damaged"
            )
        name = match[3]
        if match[1]:
            name = re.sub(r"\\([\\nr])", lambda m: {"\\": "\\", "n": "\n", "r": "\r"}[m[1]], name)
        listed = PurePosixPath(name)
        if listed.is_absolute() or ".." in listed.parts:
            raise InputError(f"{path}, line {number}, names {name!r}, which lies outside of the folder")
        sums[name] = match[2]
    return sums


def check(folder: str | Path, note: Callable[[], None] = lambda: None) -> Integrity | None:
    """Compares every file of a folder with its list; None if the folder has no list.

    A folder below it with its own list, such as an export, is compared with that list. `note` is called after each
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
    for inner in [name.rpartition("/")[0] for name in extra if name.endswith(f"/{CHECKSUM_FILE}")]:
        nested = check(folder / inner, note)
        assert nested is not None
        listed_inside = [name for name in extra if name.startswith(f"{inner}/")]
        extra = [name for name in extra if name not in listed_inside] + [f"{inner}/{name}" for name in nested.extra]
        missing += [f"{inner}/{name}" for name in nested.missing]
        changed += [f"{inner}/{name}" for name in nested.changed]
        files, size = files + nested.files, size + nested.bytes
    return Integrity(files, size, tuple(sorted(missing)), tuple(sorted(changed)), tuple(sorted(extra)))


@contextmanager
def unchecked() -> Iterator[None]:
    """A context in which `check_files` compares nothing, so that damaged folders can be opened."""
    before = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(before)


def check_files(folder: Path, names: Collection[str]) -> None:
    """Raises InputError, naming the file, if one of these files of a folder is not listed or has another checksum.

    A folder without a list is not checked. A file that this process has compared before is read again only if it has
    changed since.
    """
    sums = read_sums(folder) if _checking.get() else None
    if sums is None:
        return
    for name in names:
        path = folder / name
        if name not in sums:
            raise InputError(
                f"{path} is not in {CHECKSUM_FILE}: the list is damaged, or the file does not belong to this folder. "
                "Copy or make the folder again, or remove the file"
            )
        try:
            facts = path.stat()
            digest = _digest(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if digest != sums[name]:
            raise InputError(
                f"{path} is damaged: its sha256 is not the one in {CHECKSUM_FILE}. Copy or make the folder again "
                "(`gyroquant verify` says how it was made)"
            )


@lru_cache(maxsize=256)
def _digest(path: Path, inode: int, size: int, changed: int) -> str:
    """The digest of a file. The cache holds one for each inode, size and time of change."""
    return file_digest(path)


def _files(folder: Path) -> list[str]:
    """Every file below a folder except its list, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUM_FILE)
