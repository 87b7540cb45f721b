"""What `evaluate` measures on a text: perplexity, divergence from the original and, for a report, the diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gyroquant.calibration.text import Text, TokenBatch, bos_text
from gyroquant.evaluation.diagnosis.options import ReportOptions
from gyroquant.evaluation.diagnosis.run import DiagnosisInputs, diagnose, prepare_diagnosis
from gyroquant.evaluation.perplexity import DTYPES, score_windows, summary, text_windows
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Progress


@dataclass(frozen=True)
class TextMeasurement:
    """A measurement on a text, checked before any work.

    - store, other: the model and its original, if there is one.
    - text, batch: the text and its windows.
    - asked: how many windows were asked for. None: all.
    - tokenizer: the one that cut the text into tokens.
    - inputs: what the diagnosis of a report reads. None without a report.
    """

    store: WeightStore
    other: WeightStore | None
    text: Text
    batch: TokenBatch
    asked: int | None
    tokenizer: Any
    inputs: DiagnosisInputs | None

    def run(self, dtype: str, device: str, progress: Progress) -> dict[str, Any]:
        """The measures of `summary`, what they were measured on, and `diagnosis` if there is a report."""
        batch, found = self.batch, dict[str, Any]()
        if self.inputs is not None and self.other is not None:
            scores, diagnosis = diagnose(self.store, self.other, batch, self.inputs, DTYPES[dtype], device, progress)
            found["diagnosis"] = diagnosis
        else:
            scores = score_windows(self.store, batch.ids, self.other, DTYPES[dtype], device, progress, bos=batch.bos)
        return summary(scores) | {
            "text": self.text.about() | {"tokens": batch.text_tokens},
            "bos": bos_text(batch.bos, self.tokenizer),
            "tokens": batch.tokens,
            "windows": len(batch.ids),
            "windows_asked": self.asked,
            "window": batch.ids.shape[1],
            **found,
        }


def prepare_text(
    store: WeightStore,
    other: WeightStore | None,
    text: Text,
    cutting: tuple[int, int | None],
    tokenizer: Any,
    add_bos: bool,
    report: ReportOptions | None = None,
) -> TextMeasurement:
    """Cuts a text into windows, and checks what a report needs.

    cutting: tokens in a window, and at most how many windows (None: all).
    report: the options of a report, which needs `other`. None: no report.

    Raises InputError as `text_windows` and `prepare_diagnosis`.
    """
    length, count = cutting
    batch, inputs = text_windows(text, store, length, count, tokenizer, add_bos), None
    if report is not None and other is not None:
        inputs = prepare_diagnosis(report, store, other, text, batch, tokenizer, add_bos)
    return TextMeasurement(store, other, text, batch, count, tokenizer, inputs)


__all__ = ["TextMeasurement", "prepare_text"]
