"""External tools for tests that need none, and an interpreter that does what a test says instead of a script."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gyroquant.benchmark.external_tools import ExternalTool
from gyroquant.benchmark.external_tools.scripted import ScriptedTool


@contextmanager
def fake(**members: Any) -> Iterator[type[ScriptedTool]]:
    """An external tool of that name and those members, registered for as long as it is used."""
    usual = {"name": "fake", "home": "nobody/fake", "requirements": (), "script": "fake.py"}
    kind = type("Fake", (ScriptedTool,), usual | {"variants": {"plain": {"speed": 1}}} | members)
    try:
        yield kind
    finally:
        ExternalTool.registry.discard(kind.name)


def interpreter(folder: Path, body: str) -> Path:
    """An executable that is called like python and runs `body` with the arguments of the script in `arguments`."""
    path = folder / "python"
    head = f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\narguments = sys.argv[1:]\n"
    path.write_text(head + "report = Path(arguments[arguments.index('--report') + 1])\nout = report.parent\n" + body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
