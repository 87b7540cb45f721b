"""The templates of docs/extend.md, and a plug-in package made of them."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
TEXT = PAGE.read_text(encoding="utf-8")


def template(section: str) -> str:
    """The fenced block of a section of the page."""
    return re.findall(rf"^## {section}$.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[0]


def install_plugin(site: Path, package: str, *sections: str) -> None:
    """Makes an installed package in the folder `site`: a module for each template, and an entry point that names it.

    A process finds it that has the folder on its PYTHONPATH.
    """
    folder, info = site / package, site / f"{package}-0.1.dist-info"
    folder.mkdir(parents=True)
    info.mkdir()
    names = [section.lower() for section in sections]
    for name, section in zip(names, sections, strict=True):
        (folder / f"{name}.py").write_text(template(section), encoding="utf-8")
    imports = "".join(f"from {package} import {name} as {name}\n" for name in names)
    (folder / "__init__.py").write_text(f'"""Classes for gyroquant."""\n\n{imports}', encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[gyroquant.plugins]\nexample = {package}\n", encoding="utf-8")
