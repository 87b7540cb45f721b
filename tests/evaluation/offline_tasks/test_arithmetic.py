"""The value is right, the others are not, and only the question tells which is which."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.evaluation.offline_tasks import Draw
from gyroquant.evaluation.offline_tasks.arithmetic import make_arithmetic


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_python_finds_the_same_value(seed: int) -> None:
    for item in make_arithmetic(20, Draw(seed, "arithmetic")):
        expression, equals = item.question[:-2], item.question[-2:]
        value = eval(expression, {"__builtins__": {}})
        assert equals == " ="
        assert [int(choice) == value for choice in item.choices].count(True) == 1
        assert int(item.choices[item.answer]) == value
        assert eval(expression.replace("(", "").replace(")", ""), {"__builtins__": {}}) != value
        assert min(map(int, item.choices)) >= 0
        assert 1 <= expression.count("(") <= 2


def test_items_differ() -> None:
    questions = [item.question for item in make_arithmetic(500, Draw(0, "arithmetic"))]
    assert len(set(questions)) == 500


def test_the_choices_alone_do_not_tell_the_value() -> None:
    """Choices have equal steps, and the value is the smallest as often as any other."""
    ranks = Counter[int]()
    for item in make_arithmetic(2000, Draw(3, "arithmetic")):
        values = sorted(map(int, item.choices))
        assert len({after - before for before, after in pairwise(values)}) == 1
        ranks[values.index(int(item.choices[item.answer]))] += 1
    assert all(430 < ranks[rank] < 570 for rank in range(4))  # 3.6 standard deviations
