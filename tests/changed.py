"""The fast tests of what changed since a revision: those that mirror a changed module, and changed tests themselves.

    python tests/changed.py [REVISION]     # main by default; prints one file a line

`make check` runs them. The tests of a module are in `tests/ROOM/test_NAME.py`. Where the room has no file of that name,
they are the test files of the room that import the module, or else all of the room.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TESTS = Path("src/gyroquant"), Path("tests")
ALWAYS = ["tests/test_house.py"]


def changed_files(revision: str) -> list[Path]:
    """What differs from a revision in the working tree, new files included; paths below the root."""
    base = _git("merge-base", revision, "HEAD") or [revision]
    names = _git("diff", "--name-only", base[0]) + _git("ls-files", "--others", "--exclude-standard")
    return [Path(name) for name in names if name.endswith(".py")]


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split()


def tests_of(module: Path) -> list[Path]:
    """The test files of a module, below the root; none for a module without tests of its own."""
    inside = module.relative_to(SOURCE).with_suffix("")
    folder = ROOT / TESTS / inside.parts[0]
    mirrored = [*folder.rglob(f"test_{inside.name}.py"), *(ROOT / TESTS).glob(f"test_{inside.name}.py")]
    if not mirrored and folder.is_dir():
        dotted = "gyroquant." + ".".join(inside.parts)
        room = list(folder.rglob("test_*.py"))
        mirrored = [path for path in room if dotted in path.read_text(encoding="utf-8")] or room
    return [path.relative_to(ROOT) for path in mirrored]


def selected(files: list[Path]) -> list[str]:
    """The test files to run for changed files."""
    found = set(ALWAYS)
    for path in files:
        if path.is_relative_to(SOURCE):
            found |= {str(test) for test in tests_of(path)}
        elif path.is_relative_to(TESTS) and path.name.startswith("test_") and (ROOT / path).exists():
            found.add(str(path))
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(selected(changed_files(sys.argv[1] if len(sys.argv) > 1 else "main"))))
