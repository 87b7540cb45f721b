"""What people read after a run, from the manifest of a folder on the disk."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gyroquant.report import console, summaries

FOLDER = Path(__file__).parent.parent / "data" / "folders_of_0.1.0" / "packed-gsr"


def shown(parts: Any) -> str:
    """The texts and tables of a summary as a wide terminal shows them."""
    stream = io.StringIO()
    terminal = Console(file=stream, width=200)
    for part in parts:
        terminal.print(part, highlight=False)
    return stream.getvalue()


def test_a_quantization_tells_its_proof_and_its_bits() -> None:
    manifest = json.loads((FOLDER / "gyroquant.json").read_text())
    text = shown(summaries.quantized(manifest, str(FOLDER)))
    assert f"{manifest['bits']['per_weight']:.2f}"[:4] in text
    assert f"{manifest['proof']['relative_logit_error']:.1e}" in text
    assert str(FOLDER) in text.replace("\n", "")
    assert f"{manifest['bits']['whole_model_per_weight']:.4f}" in text  # as the last release calls it
    assert "weights in the file" not in text


def test_bytes_are_told_by_part() -> None:
    manifest = json.loads((FOLDER / "gyroquant.json").read_text())
    parts = {"layers": 3_000_000, "embeddings": 2_000_000, "head": 0, "rest": 1_000_000, "total": 6_000_000}
    manifest["bits"] |= {"whole_model": 3.25, "bytes": parts}
    text = shown(summaries.quantized(manifest, str(FOLDER)))
    assert "3.2500" in text
    assert "6.0 MB (layers 3.0 MB, embeddings 2.0 MB, rest 1.0 MB)" in text


def test_time_is_told_by_long_stages() -> None:
    manifest = json.loads((FOLDER / "gyroquant.json").read_text())
    manifest |= {"seconds": 300.0, "stage_seconds": {"prove": 29.0, "quantize": 80.0, "finetune": 180.0}}
    assert "5.0 min (finetune 3.0 min, quantize 80 s)" in shown(summaries.quantized(manifest, str(FOLDER)))


@pytest.mark.parametrize(("seconds", "expected"), [(3.2, "3 s"), (119.6, "120 s"), (150.0, "2.5 min")])
def test_durations_are_for_people(seconds: float, expected: str) -> None:
    assert console.duration(seconds) == expected


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.ConsoleProgress().stage("quantize", 3) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err.splitlines() == ["quantize: 2/3, 20 s left", "quantize: 3/3, 0 s left"]
