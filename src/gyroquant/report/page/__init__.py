"""The page of a comparison: one HTML file that needs nothing but itself, and its plots for documents.

The plots are Vega-Lite specifications (https://vega.github.io/vega-lite/). The page embeds what
draws them; extra ``gyroquant[report]``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.report.comparison_inside import ranges
from gyroquant.report.page.charts import Spec, pareto, seeds
from gyroquant.report.page.charts_inside import layers, mass, outliers
from gyroquant.report.page.sections import page
from gyroquant.report.page.themes import THEMES

FORMAT = 1
_WIDTH = 680  # of a plot in a document, in pixels
_MISSING = 'the page of a comparison needs vl-convert-python and Jinja2: pip install "gyroquant[report]"'


def plots(comparison: Mapping[str, Any]) -> dict[str, Spec]:
    """The plots that there is something to draw for, by name: pareto, layers, outliers, mass, seeds.

    Each is a Vega-Lite specification that holds its data. Its `params` choose what it shows: another text, budget,
    site or recipe than the first.
    """
    _check(comparison)
    made = {"pareto": pareto, "layers": layers, "outliers": outliers, "mass": mass, "seeds": seeds}
    found = {name: make(comparison) for name, make in made.items()}
    return {name: _clean(spec) for name, spec in found.items() if spec is not None}


def svg(spec: Spec, theme: str = "light") -> str:
    """A plot as an SVG file, drawn without a browser. Raises InputError without the extra `report`."""
    try:
        import vl_convert
    except ImportError as error:
        raise InputError(_MISSING) from error
    width = _WIDTH if spec.get("width") == "container" else spec.get("width")
    return str(vl_convert.vegalite_to_svg({**spec, "width": width}, config=THEMES[theme]))


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """Writes the page of a comparison, the content of its ``comparison.json``.

    Raises InputError for a comparison of another format, without the extra `report`, and where it cannot be written.
    """
    _check(comparison)
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise InputError(_MISSING) from error
    files = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    drawn = plots(comparison)
    data = {"plots": drawn, "themes": THEMES, "ranges": _clean(ranges(comparison))}
    text = template.render(
        page=page(comparison, drawn),
        plots=bool(drawn),
        css=Markup((files / "page.css").read_text(encoding="utf-8")),
        script=Markup((files / "page.js").read_text(encoding="utf-8")),
        bundle=Markup(_bundle()) if drawn else "",
        data=Markup(_embedded(data)),
    )
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"the page {path} cannot be written: {error}") from error


def _check(comparison: Mapping[str, Any]) -> None:
    found = comparison.get("format")
    if found != FORMAT:
        raise InputError(
            f"this comparison is of format {found!r}, not {FORMAT}: make it again by this version of gyroquant"
        )


@lru_cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that asks nobody for anything."""
    try:
        import vl_convert
    except ImportError as error:
        raise InputError(_MISSING) from error
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _embedded(data: Any) -> str:
    """JSON as it can stand in a page: nothing in it ends the element, nor is anything but JSON."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(value: Any) -> Any:
    """A specification without what its expressions cannot quote, separators of lines, and what JSON has no word for."""
    if isinstance(value, Mapping):
        return {_clean(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    if isinstance(value, str):
        return value.replace("\u2028", " ").replace("\u2029", " ")
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["plots", "svg", "write_page"]
