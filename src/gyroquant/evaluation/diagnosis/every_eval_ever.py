"""A report in the schema of Every Eval Ever (arXiv 2606.14516), for exchange with other evaluation programs.

Source: `every_eval_ever/schemas/eval.schema.json` of https://github.com/evaleval/every_eval_ever, version 0.3.0.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from gyroquant.evaluation.diagnosis.measures import BOOTSTRAP, Measure, measures, task_measures
from gyroquant.evaluation.perplexity import RESAMPLES

SCHEMA_VERSION = "0.3.0"
_NAME = "gyroquant.diagnosis"


def timestamp() -> str:
    """The time now in seconds since 1970; the value of SOURCE_DATE_EPOCH, where it is set, so that files repeat."""
    return os.environ.get("SOURCE_DATE_EPOCH") or str(int(time.time()))


def every_eval_ever(report: Mapping[str, Any], now: str) -> dict[str, Any]:
    """A report as one record of the schema. `now` is the time of the record in seconds since 1970.

    Measures without a finite value are left out.
    """
    model = PurePath(str(report["model"])).name or str(report["model"])
    version = str(report["versions"]["gyroquant"])
    details = {
        "deployment_type": "self_deployed",
        "model_availability": "unknown",
        "original": str(report["against"]),
        "true_bits_per_weight": str(report["true_bits_per_weight"]),
        "verdict": str(report["diagnosis"]["verdict"]["kind"]),
        "verdict_block": str(report["diagnosis"]["verdict"]["block"]),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{_NAME}/{model}/{now}",
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": "gyroquant evaluate --report",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {"name": "gyroquant", "version": version},
        "model_info": {
            "name": model,
            "id": model,
            "inference_engine": {"name": "gyroquant", "version": version},
            "additional_details": details,
        },
        "evaluation_results": [
            _result(report, measure)
            for measure in [*measures(report), *task_measures(report)]
            if measure.value is not None and math.isfinite(measure.value)
        ],
    }


def _result(report: Mapping[str, Any], measure: Measure) -> dict[str, Any]:
    details: dict[str, Any] = {"score": measure.value}
    if measure.original is not None:
        details["details"] = {"original": str(measure.original)}
    if measure.interval is not None and all(math.isfinite(end) for end in measure.interval):
        details["uncertainty"] = {
            "confidence_interval": {
                "lower": measure.interval[0],
                "upper": measure.interval[1],
                "confidence_level": 0.95,
                "method": measure.method,
            },
        }
        if measure.method == BOOTSTRAP:
            details["uncertainty"]["num_bootstrap_samples"] = RESAMPLES
    return {
        "evaluation_result_id": f"{_NAME}.{measure.key}",
        "evaluation_name": _NAME,
        "source_data": _source(report, measure.task),
        "metric_config": {
            "evaluation_description": measure.meaning,
            "metric_id": f"gyroquant.{measure.key}",
            "metric_name": measure.name,
            "lower_is_better": measure.lower_is_better,
            "score_type": "continuous",
            "min_score": measure.least,
            "max_score": measure.most if math.isfinite(measure.most) else "Infinity",
        },
        "score_details": details,
    }


def _source(report: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """What was measured on: the text, or the questions of a task."""
    if task is None:
        name, facts = report["text"]["name"], {"sha256": report["text"]["sha256"], "windows": report["windows"]}
    else:
        score, harness = report["tasks"][task], report["harness"]["lm_eval"]
        name, facts = task, {key: score[key] for key in ("items", "source", "sha256") if key in score}
        facts["lm_eval"] = harness
    details = {key: str(value) for key, value in facts.items()}
    return {"dataset_name": str(name), "source_type": "other", "additional_details": details}
