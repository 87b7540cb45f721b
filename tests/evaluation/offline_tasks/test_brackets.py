"""One order closes what is open, and the others do not."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.evaluation.offline_tasks import Draw
from gyroquant.evaluation.offline_tasks.brackets import make_brackets


def closes(text: str) -> bool:
    """Whether signs nest and are all closed. A quote closes if the innermost open sign is the same quote."""
    opened: list[str] = []
    for sign in text.split():
        if opened and opened[-1] + sign in ("()", "[]", "{}", "<>", '""', "''"):
            opened.pop()
        elif sign in "([{<\"'":
            opened.append(sign)
        else:
            return False
    return not opened


def test_the_checker_knows_what_closes() -> None:
    assert closes("( [ ] { \" ' ' \" } )")
    assert not any(map(closes, ["( [ ) ]", "(", ")", "\" ' \" '"]))


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_exactly_the_answer_closes_everything(seed: int) -> None:
    items = make_brackets(20, Draw(seed, "brackets"))
    assert len({item.question for item in items}) == 20
    for item in items:
        assert [closes(f"{item.question} {choice}") for choice in item.choices] == [
            place == item.answer for place in range(4)
        ]
        assert len({tuple(sorted(choice.split())) for choice in item.choices}) == 1
