"""Items are well formed, their digest is of all that counts, and draws are fair and repeat."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.evaluation.offline_tasks import Draw, Item, ItemSet

ITEM = Item("1 + 1 =", ("2", "3"), 0)
SET = ItemSet("sums", "generated", (ITEM, Item("2 + 2 =", ("3", "4", "5", "6"), 1)), 2)


@pytest.mark.parametrize(("choices", "answer"), [(("a", "a"), 0), (("a", "b"), 2), (("a", "b"), -1)])
def test_an_item_has_distinct_choices_and_one_of_them_is_right(choices: tuple[str, ...], answer: int) -> None:
    with pytest.raises(ValueError, match="are not an item"):
        Item("?", choices, answer)


def test_chance_is_that_of_random_answers() -> None:
    assert SET.chance == (1 / 2 + 1 / 4) / 2


def test_items_survive_json() -> None:
    again = ItemSet.from_dict(json.loads(json.dumps(SET.to_dict())))
    assert again == SET
    assert again.sha256 == SET.sha256


def test_the_digest_is_of_what_a_model_sees() -> None:
    others = [
        replace(SET, name="other"),
        replace(SET, delimiter="\n"),
        replace(SET, items=SET.items[::-1]),
        replace(SET, items=(replace(ITEM, question="1 + 1 ="), replace(SET.items[1], answer=2))),
    ]
    assert len({SET.sha256, *(other.sha256 for other in others)}) == 5
    assert replace(SET, source="elsewhere", asked=9).sha256 == SET.sha256


@given(st.integers(0, 2**40), st.lists(st.integers(), max_size=9))
@settings(max_examples=30)
def test_draws_repeat_and_keep_all_values(seed: int, values: list[int]) -> None:
    first, second = Draw(seed, "a"), Draw(seed, "a")
    assert first.shuffled(values) == second.shuffled(values)
    assert sorted(first.shuffled(values)) == sorted(values)
    assert 3 <= first.between(3, 5) <= 5


def test_the_first_draws_of_a_seed_are_fixed() -> None:
    """A change here changes the items of everyone, and with them the results."""
    assert [Draw(0, "cloze").below(1000) for _ in range(2)] == [893, 893]
    assert Draw(0, "cloze").below(1000) != Draw(0, "code").below(1000)


def test_the_right_choice_is_anywhere() -> None:
    draw = Draw(1, "places")
    places = Counter(draw.item("?", "right", ["a", "b", "c"]).answer for _ in range(4000))
    assert all(900 < places[place] < 1100 for place in range(4))  # 3.6 standard deviations
