"""Tasks are scored by lm-evaluation-harness on the deployed model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.evaluation.tasks import check_tasks, score_tasks

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_missing_harness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(gq.InputError, match=r"pip install 'gyroquant\[tasks\]'"):
        check_tasks(["hellaswag"])


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of ten questions: which word a tiny model would write."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    lines = []
    for i in range(10):
        ids = torch.tensor([[1, 3 + i, 20 + i]])
        order = model(ids).logits[0, -1, 3:].argsort(descending=True) + 3
        right, wrong = (tokenizer.decode([int(order[k])]) for k in (0, 40))
        question = f"w{i} w{17 + i}"
        lines.append({"question": question, "choices": [wrong, right], "label": int(i < 7)})
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "words.jsonl"))
    return tmp_path


def test_a_task_is_scored(words: Path) -> None:
    found = score_tasks(tiny_models.build("llama"), tiny_models.tokenizer(), ["words"], include=words)
    assert found["words"]["acc"] == pytest.approx(0.7)
    assert 0 < found["words"]["stderr"] < 0.5
    limited = score_tasks(tiny_models.build("llama"), tiny_models.tokenizer(), ["words"], include=words, limit=5)
    assert limited["words"]["acc"] == 1.0


def test_an_unknown_task_is_told(words: Path) -> None:
    with pytest.raises(gq.InputError, match="has no task 'nonsense'"):
        check_tasks(["nonsense"], words)
