"""The table of tasks has every number that decides, and leaves out what was not measured."""

from __future__ import annotations

from rich.table import Table

from gyroquant.evaluation.tasks import TaskScore, together
from gyroquant.report.task_table import task_table

RIGHT, OTHER = (1.0,) * 15 + (0.0,) * 5, (1.0,) * 10 + (0.0,) * 10


def score(right: tuple[float, ...], **more: object) -> TaskScore:
    facts = {
        "acc": sum(right) / 20,
        "stderr": 0.1,
        "interval": [0.2, 0.8],
        "chance": 0.25,
        "items": 20,
        "items_asked": 20,
    }
    return TaskScore({**facts, "acc_bytes": 0.5, **more}, right)


def cells(shown: Table) -> list[list[str]]:
    """The heading and the rows of a table."""
    columns = [[str(column.header), *map(str, column.cells)] for column in shown.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_a_model_alone_has_its_accuracy() -> None:
    heading, row = cells(task_table({"tasks": {"cloze": score(RIGHT, items_asked=200).facts}, "tasks_together": None}))
    assert heading == ["task", "items", "chance", "accuracy", "95 % interval", "by bytes"]
    assert row == ["cloze", "20 of 200", "25.0", "75.0", "20.0 to 80.0", "50.0"]


def test_two_models_have_their_difference_and_p() -> None:
    ours, theirs = score(RIGHT), score(OTHER)
    both, original = together([ours, ours]), together([theirs, theirs])
    assert both is not None
    assert original is not None
    group = TaskScore({"acc": 0.3, "stderr": 0.1, "interval": [0.1, 0.5]})
    tasks = {"cloze": ours.against(theirs), "mmlu": group.against(group)}
    _, cloze, mmlu, whole = cells(task_table({"tasks": tasks, "tasks_together": both.against(original)}))
    assert cloze[6:8] == ["50.0", "+25.0"]
    assert cloze[9] == "0.062"  # 2 / 2^5
    assert mmlu == ["mmlu", "-", "-", "30.0", "10.0 to 50.0", "-", "30.0", "-", "-", "-"]
    assert (whole[0], whole[1], whole[9]) == ("together", "40", "0.002")
