"""The folder of a report: diagnosis.json, diagnosis.md, diagnosis.html and every_eval_ever.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.evaluation.diagnosis.every_eval_ever import every_eval_ever, timestamp
from gyroquant.evaluation.diagnosis.markdown import markdown
from gyroquant.evaluation.diagnosis.page import page
from gyroquant.system.files import put, put_json

DATA = "diagnosis.json"
KIND = "gyroquant diagnosis"
FORMAT = 1


def check_destination(folder: Path) -> None:
    """Raises InputError if `folder` exists and is neither empty nor a report. A report is replaced."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    try:
        data = json.loads((folder / DATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise InputError(f"{folder} exists and is not a report of gyroquant: choose another --report")


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes a report, made of the result of `evaluate` with its `diagnosis`. What is not finite becomes null.

    Files are the same for the same measurements, but for the time in every_eval_ever.json. Raises InputError if the
    folder cannot be written.
    """
    exported = clean(every_eval_ever(report, timestamp()))
    try:
        put_json(folder / DATA, clean({"kind": KIND, "format": FORMAT, **report}))
        for name, text in (("diagnosis.md", markdown(report)), ("diagnosis.html", page(report))):
            _put_text(folder / name, text)
        put_json(folder / "every_eval_ever.json", exported)
    except OSError as error:
        raise InputError(f"the report {folder} cannot be written: {error}") from error


def _put_text(path: Path, text: str) -> None:
    put(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


def clean(value: Any) -> Any:
    """Data for JSON: None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
