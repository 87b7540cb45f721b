"""The report of `evaluate`: its files, what is refused before any work, and the schema of Every Eval Ever."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import saved_models

import gyroquant as gq
from gyroquant.evaluation.diagnosis.charts import Series, line_chart, ticks
from gyroquant.evaluation.diagnosis.folder import clean, write_report
from gyroquant.evaluation.diagnosis.measures import measures, task_measures
from gyroquant.evaluation.diagnosis.page import page

OPTIONS = gq.ReportOptions(
    prompts=3, prompt_tokens=8, steps=4, generations=[{"prompt": "w1 w2", "completion": "w3 w4 w5"}]
)
FILES = {"diagnosis.json", "diagnosis.md", "diagnosis.html", "every_eval_ever.json"}

TEXT = str
# What the schema of Every Eval Ever requires: of every object, the keys and what they hold. A statement of our own of
# `every_eval_ever/schemas/eval.schema.json`, version 0.3.0, of https://github.com/evaleval/every_eval_ever.
REQUIRED: dict[str, Any] = {
    "schema_version": {"0.3.0"},
    "evaluation_id": TEXT,
    "retrieved_timestamp": TEXT,
    "source_metadata": {
        "source_type": {"documentation", "evaluation_run"},
        "source_organization_name": TEXT,
        "evaluator_relationship": {"first_party", "third_party", "collaborative", "other"},
    },
    "model_info": {
        "name": TEXT,
        "id": TEXT,
        "additional_details": {
            "deployment_type": {"self_deployed", "externally_managed", "unknown"},
            "model_availability": {"open_weights", "closed_weights", "unknown"},
        },
    },
    "eval_library": {"name": TEXT, "version": TEXT},
    "evaluation_results": [
        {
            "evaluation_name": TEXT,
            "source_data": {"dataset_name": TEXT, "source_type": {"other"}},
            "metric_config": {
                "lower_is_better": bool,
                "score_type": {"continuous"},
                "min_score": (int, float),
                "max_score": (int, float, str),
            },
            "score_details": {"score": (int, float)},
        }
    ],
}
OPTIONAL = {"evaluation_timestamp", "detailed_evaluation_results"}  # no others beside those required


def check(value: Any, wanted: Any, place: str = "") -> None:
    """Fails unless a value holds what is wanted: keys, types, or one of some texts."""
    if isinstance(wanted, dict):
        for key, inner in wanted.items():
            assert key in value, f"{place}.{key}"
            check(value[key], inner, f"{place}.{key}")
    elif isinstance(wanted, list):
        assert value, place
        for number, entry in enumerate(value):
            check(entry, wanted[0], f"{place}[{number}]")
    elif isinstance(wanted, set):
        assert value in wanted, place
    else:
        assert isinstance(value, wanted), place


@pytest.fixture(scope="module")
def rounded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model rounded to 3 bits in a rotated basis."""
    out = tmp_path_factory.mktemp("report") / "out"
    saved_models.rounded(folders["llama"], out, {"R1": {"method": "hadamard"}}, bits=3)
    return out


def evaluated(rounded: Path, model: Path, corpus: Path, report: Path | None, **more: Any) -> dict[str, Any]:
    options = {"report_options": OPTIONS} if report is not None else {}
    return gq.evaluate(rounded, corpus, model, window=32, windows=6, report=report, **options | more)


@pytest.fixture(scope="module")
def report(rounded: Path, folders: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a report, and the result that came with it."""
    folder = tmp_path_factory.mktemp("made") / "deep" / "report"
    return folder, evaluated(rounded, folders["llama"], corpus, folder)


def test_a_rotated_model_is_compared_in_its_own_basis(report: Any) -> None:
    found = report[1]["diagnosis"]
    assert found["basis"]["changed"]
    assert found["embeddings"]["relative_error"] < 1e-2  # saved in 16 bits
    assert found["verdict"]["kind"] == "degradation"
    assert all(row["cosine"] > 0.8 for row in found["blocks"])


def test_measures_of_evaluate_are_the_same_with_and_without_a_report(
    report: Any, rounded: Path, folders: dict[str, Path], corpus: Path
) -> None:
    plain = evaluated(rounded, folders["llama"], corpus, None)
    assert {"diagnosis", "report"} == set(report[1]) - set(plain)
    for key in set(plain) - {"seconds"}:
        assert report[1][key] == plain[key], key


def test_the_files_repeat(
    report: Any, rounded: Path, folders: dict[str, Path], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = report
    assert {path.name for path in folder.iterdir()} == FILES
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for _ in range(2):  # a report is replaced
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        evaluated(rounded, folders["llama"], corpus, folder)
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name for name in FILES if before[name] != after[name]} <= {"every_eval_ever.json"}
    assert after == before
    data = json.loads(after["diagnosis.json"])
    assert (data["kind"], data["format"]) == ("gyroquant diagnosis", 1)
    assert "seconds" not in data


def test_every_eval_ever_has_what_its_schema_requires(report: Any) -> None:
    record = json.loads((report[0] / "every_eval_ever.json").read_text())
    check(record, REQUIRED)
    assert set(record) <= set(REQUIRED) | OPTIONAL
    assert all(isinstance(value, str) for value in record["model_info"]["additional_details"].values())
    scores = {entry["evaluation_result_id"]: entry for entry in record["evaluation_results"]}
    found = scores["gyroquant.diagnosis.acceptance"]
    assert found["score_details"]["score"] == report[1]["diagnosis"]["acceptance"]["rate"]
    assert found["score_details"]["uncertainty"]["confidence_interval"]["confidence_level"] == 0.95
    assert scores["gyroquant.diagnosis.kl"]["score_details"]["score"] == report[1]["kl"]
    for entry in scores.values():
        config = entry["metric_config"]
        most = float("inf") if config["max_score"] == "Infinity" else config["max_score"]
        assert config["min_score"] <= entry["score_details"]["score"] <= most
    with pytest.raises(AssertionError, match=r"\.model_info\.id"):
        check(record | {"model_info": {"name": "a"}}, REQUIRED)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_loads_nothing_and_shows_what_was_measured(report: Any) -> None:
    text = (report[0] / "diagnosis.html").read_text()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.addresses == ["data:,"]
    assert "script" not in parsed.tags
    assert "url(" not in text
    assert parsed.tags.count("svg") == 4
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    blocks = len(report[1]["diagnosis"]["blocks"])
    for svg in charts:
        ElementTree.fromstring(svg)
    assert [svg.count("<circle") for svg in charts] == [2 * blocks] * 3 + [5 + 4]
    table = (report[0] / "diagnosis.md").read_text()
    for measure in measures(report[1]):
        assert measure.cells()[1] in text
        assert f"| {measure.name} | {measure.cells()[1]} |" in table


def test_names_are_text_and_numbers_that_are_not_finite_are_dashes(report: Any) -> None:
    data = json.loads((report[0] / "diagnosis.json").read_text())
    data["model"] = "<script>alert(1)</script>"
    data["diagnosis"]["blocks"][0] |= {"relative_error": float("inf"), "cosine": float("nan")}
    text = page(data)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "inf" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower()
    assert clean({"a": [float("nan"), 1.0, {"b": float("inf")}]}) == {"a": [None, 1.0, {"b": None}]}


def test_accuracies_in_tasks_are_in_every_file(report: Any, tmp_path: Path) -> None:
    scores = {
        "cloze": {"metric": "acc", "acc": 0.75, "interval": [0.5, 0.9], "items": 12, "source": "a", "sha256": "5e"},
        "mmlu": {"metric": "acc", "acc": 0.25, "interval": [0.2, 0.3]},
    }
    data = report[1] | {"tasks": scores, "harness": {"lm_eval": "1.2"}}
    scores["cloze"]["original"] = {"acc": 1.0}
    write_report(tmp_path, data)
    assert "| accuracy in cloze | 0.7500 | 0.5000 to 0.9000 | 1.0000 |" in (tmp_path / "diagnosis.md").read_text()
    assert "accuracy in mmlu" in (tmp_path / "diagnosis.html").read_text()
    record = json.loads((tmp_path / "every_eval_ever.json").read_text())
    check(record, REQUIRED)
    found = {entry["evaluation_result_id"]: entry for entry in record["evaluation_results"]}
    cloze, mmlu = (found[f"gyroquant.diagnosis.task_{name}"] for name in scores)
    assert cloze["source_data"]["dataset_name"] == "cloze"
    details = {"items": "12", "source": "a", "sha256": "5e", "lm_eval": "1.2"}
    assert cloze["source_data"]["additional_details"] == details
    assert cloze["score_details"]["uncertainty"]["confidence_interval"]["method"] == "Wilson score interval"
    assert "num_bootstrap_samples" not in cloze["score_details"]["uncertainty"]
    assert mmlu["score_details"]["score"] == 0.25
    assert task_measures(report[1]) == []


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-0.013, 0.03) == [-0.01, 0, 0.01, 0.02, 0.03]
    assert ticks(2, 2) == [2]
    ElementTree.fromstring(line_chart("a & b", "x", [0], [Series("<one>", [0.5]), Series("none", [None])]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": None}, "a report compares a model with its original: add --against MODEL"),
        ({"report_options": gq.ReportOptions(coverage=1.0)}, "coverage of the report is 1.0"),
        ({"report_options": gq.ReportOptions(prompts=0)}, "prompts of the report is 0"),
        ({"report": None}, "without a report: add --report DEST"),
        ({"report_options": gq.ReportOptions(steps=400)}, "32 tokens and 400 steps do not fit a model of 128"),
        ({"report_options": gq.ReportOptions(prompts=999)}, "it has 93 prompts of 32 tokens with 32 more"),
        ({"report_options": gq.ReportOptions(coverage=0.99)}, "it has 186 predicted tokens.* need 198"),
        ({"report_options": gq.ReportOptions(generations=[{"text": "w1"}])}, "entry 1 of the generations"),
        ({"report": "taken"}, "taken exists and is not a report"),
        ({"report": "taken/file.txt"}, "file.txt exists and is not a report"),
    ],
)
def test_what_cannot_be_a_report_is_refused_before_any_work(
    change: dict[str, Any],
    message: str,
    rounded: Path,
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file.txt").write_text("mine")

    def work(*_: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("gyroquant.api.compare_store", work)
    monkeypatch.setattr("gyroquant.evaluation.on_text.diagnose", work)
    arguments = {"against": folders["llama"], "report": tmp_path / "new", "report_options": OPTIONS} | change
    if isinstance(change.get("report"), str):
        arguments["report"] = tmp_path / change["report"]
    with pytest.raises(gq.InputError, match=message):
        gq.evaluate(rounded, corpus, window=32, windows=6, **arguments)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file.txt"]


def test_an_empty_folder_is_a_destination(
    rounded: Path, folders: dict[str, Path], tmp_path: Path, corpus: Path
) -> None:
    assert evaluated(rounded, folders["llama"], corpus, tmp_path)["report"] == str(tmp_path)
    assert (tmp_path / "diagnosis.json").exists()
