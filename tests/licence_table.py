"""The table of licences in docs/licences.md: what gyroquant needs, at the pinned versions, as the packages state it.

    python tests/licence_table.py          # in the environment of constraints.txt; writes the page

For optional packages that are not installed pip is asked what it would install, without installing it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of the packages that gyroquant needs

gyroquant itself is under Apache-2.0 ([LICENSE](../LICENSE)). The table states what each package declares in its
metadata. `python tests/licence_table.py` makes it. Versions are those of `constraints.txt` where it pins them.
"needed by" names the extra that installs a package. Packages of *core* are always installed, with the packages that
they need in turn.
No package is part of gyroquant's source or wheel. PyTorch is the CPU build. PyPI's build for Linux also installs
NVIDIA's libraries, under NVIDIA's own licences.

| package | version | licence | needed by |
|---|---|---|---|
"""
_LONGEST = 120  # a longer statement is the text of a licence, not its name


def direct() -> dict[str, list[str]]:
    """The names of the packages in pyproject.toml, by extra; `core` for those without. Tools for development aside."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"core": project["dependencies"]} | project["optional-dependencies"]
    return {
        extra: [canonicalize_name(Requirement(line).name) for line in lines]
        for extra, lines in groups.items()
        if extra != "dev"
    }


def behind(names: Iterable[str]) -> Iterator[str]:
    """Packages and all that they need, each once, as they are installed here."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        yield name
        for line in distribution(name).requires or ():
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(one.name))


def licence(metadata: Any) -> str:
    """The licence that a package's metadata states: an expression, else its short field, else its classifiers."""
    if isinstance(metadata, dict):
        expression, field, classifiers = (metadata.get(k) for k in ("license_expression", "license", "classifier"))
    else:
        expression, field = metadata["License-Expression"], metadata["License"]
        classifiers = metadata.get_all("Classifier")
    if expression:
        return str(expression)
    if field and "\n" not in field.strip() and len(field) <= _LONGEST:
        return str(field).strip().removeprefix("OSI Approved :: ")
    found = [one.rpartition(" :: ")[2] for one in classifiers or () if one.startswith("License ::")]
    return " or ".join(found) or "not stated"


def not_installed(name: str) -> tuple[str, str]:
    """Version and licence of a package as pip would install it."""
    asked = ["install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--report", "-", name]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=True)
    metadata = json.loads(done.stdout[done.stdout.index("{") :])["install"][0]["metadata"]
    return metadata["version"], licence(metadata)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Package, version, licence and what needs it."""
    groups = direct()
    found: dict[str, list[str]] = {name: ["core"] for name in sorted(behind(groups.pop("core")))}
    for extra, names in groups.items():
        for name in names:
            found.setdefault(name, []).append(extra)
    for name, needed in found.items():
        try:
            metadata = distribution(name).metadata
            version, stated = metadata["Version"].partition("+")[0], licence(metadata)
        except PackageNotFoundError:
            version, stated = not_installed(name)
        yield name, version, stated, ", ".join(one for one in needed)


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows()))
