"""The themes of plots on a light and on a dark page.

Colours are distinct for colour-blind readers and have a contrast of 3:1 on their background.
"""

from __future__ import annotations

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# The first colour is for unrotated models: the baselines and the original.
_CATEGORIES = {
    "light": ["#667085", "#0068b3", "#cf5408", "#b8438a", "#00805c", "#8f6b00", "#4b3fa7", "#3d3d3d"],
    "dark": ["#98a2b3", "#57aeff", "#ff9447", "#f08cc4", "#38c99b", "#e0bd48", "#a99cff", "#e5e7eb"],
}
_RAMPS = {
    "light": ["#f4f4e4", "#c2e0c0", "#6fbfb3", "#2f8ba6", "#245a94", "#2c2a72", "#1d0f45"],
    "dark": ["#171c33", "#24407a", "#2a739b", "#3fa39a", "#87ca8c", "#d9e58b", "#fffbd0"],
}
_INK = {"light": ("#1d2433", "#566074", "#e4e7ec"), "dark": ("#e8ebf1", "#a4aebf", "#2c3443")}


def _config(theme: str) -> dict[str, Any]:
    ink, soft, line = _INK[theme]
    text = {
        "labelColor": soft,
        "titleColor": soft,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    }
    return {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": text
        | {"gridColor": line, "domainColor": line, "tickColor": line, "titlePadding": 10, "labelPadding": 6},
        "legend": text
        | {
            "labelLimit": 260,
            "symbolStrokeWidth": 2,
            "symbolOpacity": 1,
            "columnPadding": 18,
            "rowPadding": 4,
            "offset": 10,
            "layout": {"bottom": {"direction": "vertical", "anchor": "start", "margin": 8}},
        },
        "title": {"color": soft, "font": FONT, "fontSize": 12, "fontWeight": "normal", "offset": 12},
        "text": {"color": ink, "fontSize": 12, "font": FONT},
        "mark": {"aria": False},
        "range": {
            "category": _CATEGORIES[theme],
            "ramp": _RAMPS[theme],
            "heatmap": _RAMPS[theme],
            "symbol": ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"],
        },
        "style": {"front": {"color": soft, "strokeWidth": 1.5, "strokeDash": [5, 4]}},
    }


THEMES: dict[str, dict[str, Any]] = {theme: _config(theme) for theme in ("light", "dark")}


def categories() -> list[tuple[str, str]]:
    """The colours of categories, each for the light and for the dark page."""
    return list(zip(_CATEGORIES["light"], _CATEGORIES["dark"], strict=True))
