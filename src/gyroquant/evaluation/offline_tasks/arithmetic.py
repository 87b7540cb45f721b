"""Sums, differences and products with brackets: the value among near misses."""

from __future__ import annotations

from dataclasses import dataclass

from gyroquant.evaluation.offline_tasks.items import CHOICES, Draw, Item

_LARGEST = 200  # values are from 0 to this
_STEPS = (1, 2, 5, 10)
_GAP = 20  # if leaving out the brackets changes the value by at most this, that is the step between choices


@dataclass(frozen=True)
class _Sum:
    """An expression: a number, or two expressions and the sign between them."""

    value: int
    text: str
    flat: str

    @classmethod
    def of(cls, left: _Sum, sign: str, right: _Sum) -> _Sum:
        """Two expressions joined by `+`, `-` or `*`, each in brackets unless it is a number."""
        a, b = left.value, right.value
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        sides = [side.text if side.text.isdigit() else f"({side.text})" for side in (left, right)]
        return cls(value, f"{sides[0]} {sign} {sides[1]}", f"{left.flat} {sign} {right.flat}")


def make_arithmetic(count: int, draw: Draw) -> list[Item]:
    """`count` different items such as "(3 + 4) * 2 =", with three or four numbers from 1 to 9 and one or two brackets.

    Every expression has another value without its brackets, by the usual precedence. The four choices have equal
    steps, and the value is at any place among them with the same probability, so that nothing but the question tells
    which one is right. The step is often the difference that the brackets make. Then one of the wrong choices can be
    the value without brackets.
    """
    items: dict[str, Item] = {}
    while len(items) < count:
        terms = [
            _Sum(number, str(number), str(number)) for number in (draw.between(1, 9) for _ in range(draw.between(3, 4)))
        ]
        while len(terms) > 1:
            at = draw.below(len(terms) - 1)
            terms[at : at + 2] = [_Sum.of(terms[at], draw.choice("+-*"), terms[at + 1])]
        (whole,) = terms
        gap = abs(whole.value - _by_precedence(whole.flat))
        step = gap if 0 < gap <= _GAP and draw.below(2) else draw.choice(_STEPS)
        if gap and (CHOICES - 1) * step <= whole.value <= _LARGEST:
            first = whole.value - step * draw.below(CHOICES)
            values = [first + step * place for place in range(CHOICES)]
            wrong = [str(value) for value in values if value != whole.value]
            items.setdefault(whole.text, draw.item(f"{whole.text} =", str(whole.value), wrong))
    return list(items.values())


def _by_precedence(flat: str) -> int:
    """The value of numbers and signs without brackets: products first, then sums from left to right."""
    total, product, sign = 0, 1, 1
    for token in [*flat.split(), "+"]:
        if token.isdigit():
            product *= int(token)
        elif token in "+-":
            total, product, sign = total + sign * product, 1, 1 if token == "+" else -1
    return total


__all__ = ["make_arithmetic"]
