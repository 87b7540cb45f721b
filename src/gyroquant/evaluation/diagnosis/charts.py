"""Line charts as SVG that needs no script, in the colours of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 34, 44


@dataclass(frozen=True)
class Series:
    """One line: its name, and a value for every x, or None where there is none."""

    name: str
    values: Sequence[float | None]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers from low to high, in equal steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scales:
    """Where values are in the drawing, in pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)


def line_chart(
    title: str,
    x_title: str,
    x: Sequence[float],
    series: Sequence[Series],
    y_range: tuple[float | None, float | None] = (None, None),
    mark: float | None = None,
) -> str:
    """An SVG element with one line for each series over x.

    `y_range` fixes the ends of the y axis; None takes them from the data. `mark` draws a vertical line at this x.
    Values that are not finite are left out. Every point has its numbers as a tooltip.
    """
    drawn = [[_finite(value) for value in line.values] for line in series]
    scales = _Scales(_span(x, (None, None)), _span([v for line in drawn for v in line if v is not None], y_range))
    parts = [_axes(scales, x_title)]
    if mark is not None:
        place = scales.x(mark)
        parts.append(f'<line class="mark" x1="{place}" x2="{place}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    for number, (line, values) in enumerate(zip(series, drawn, strict=True)):
        points = [(scales.x(a), scales.y(b), a, b) for a, b in zip(x, values, strict=True) if b is not None]
        path = " ".join(f"{a},{b}" for a, b, _, _ in points)
        parts.append(f'<g class="series-{number}"><polyline points="{path}"/>')
        parts += [
            f'<circle cx="{a}" cy="{b}" r="3"><title>{escape(line.name)}, {escape(x_title)} {at:g}: {value:.4g}'
            "</title></circle>"
            for a, b, at, value in points
        ]
        parts.append(f'</g><text class="series-{number}" x="{_LEFT + 150 * number}" y="18">{escape(line.name)}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _span(values: Sequence[float], ends: tuple[float | None, float | None]) -> tuple[float, float]:
    low = ends[0] if ends[0] is not None else min(values, default=0.0)
    high = ends[1] if ends[1] is not None else max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _axes(scales: _Scales, x_title: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ticks(*scales.y_range):
        place = scales.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text class="axis" x="{_LEFT - 8}" y="{place + 4}" text-anchor="end">{value:g}</text>')
    for value in ticks(*scales.x_range):
        if value == int(value):
            place = scales.x(value)
            parts.append(f'<text class="axis" x="{place}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    return "".join(parts)
