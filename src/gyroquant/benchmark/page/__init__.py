"""The page of a comparison: one HTML file that loads nothing else. Its plots can also be drawn for documents.

The plots are Vega-Lite specifications (https://vega.github.io/vega-lite/). The page embeds the code that draws them,
which comes with the extra ``gyroquant[report]``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from gyroquant.benchmark.diagnostics import ranges
from gyroquant.benchmark.page.charts import Spec, pareto, seeds
from gyroquant.benchmark.page.diagnostic_charts import layers, mass, outliers
from gyroquant.benchmark.page.sections import page
from gyroquant.benchmark.page.themes import THEMES
from gyroquant.errors import InputError

FORMAT = 1
_WIDTH = 680  # width of a plot in a document, in pixels
_MISSING = 'the page of a comparison needs vl-convert-python and Jinja2: pip install "gyroquant[report]"'


def plots(comparison: Mapping[str, Any]) -> dict[str, Spec]:
    """The plots that have data, by name: pareto, pareto_bits, layers, outliers, mass, seeds.

    `pareto` is over bytes of all weights, `pareto_bits` over true bits of the layers.

    Each is a Vega-Lite specification that holds its data. Its `params` select the text, budget, site or recipe. By
    default it shows the first of each.
    """
    _check(comparison)
    makers: dict[str, Callable[[Mapping[str, Any]], Spec | None]] = {
        "pareto": pareto,
        "pareto_bits": partial(pareto, view="bits"),
        "layers": layers,
        "outliers": outliers,
        "mass": mass,
        "seeds": seeds,
    }
    specs = {name: make(comparison) for name, make in makers.items()}
    return {name: _clean(spec) for name, spec in specs.items() if spec is not None}


def svg(spec: Spec, theme: str = "light") -> str:
    """A plot as an SVG file, drawn without a browser. Raises InputError without the extra `report`."""
    try:
        import vl_convert
    except ImportError as error:
        raise InputError(_MISSING) from error
    width = _WIDTH if spec.get("width") == "container" else spec.get("width")
    return str(vl_convert.vegalite_to_svg({**spec, "width": width}, config=THEMES[theme]))


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """Writes the page of a comparison. `comparison` is the content of its ``comparison.json``.

    Raises InputError for a comparison of another format, if the extra `report` is missing, or if `path` cannot be
    written.
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
    specs = plots(comparison)
    data = {"plots": specs, "themes": THEMES, "ranges": _clean(ranges(comparison))}
    text = template.render(
        page=page(comparison, specs),
        plots=bool(specs),
        css=Markup((files / "page.css").read_text(encoding="utf-8")),
        script=Markup((files / "page.js").read_text(encoding="utf-8")),
        bundle=Markup(_bundle()) if specs else "",
        data=Markup(_embedded(data)),
    )
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"the page {path} cannot be written: {error}") from error


def _check(comparison: Mapping[str, Any]) -> None:
    version = comparison.get("format")
    if version != FORMAT:
        raise InputError(
            f"this comparison has format {version!r}, not {FORMAT}: make it again with this version of gyroquant"
        )


@lru_cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that loads nothing."""
    try:
        import vl_convert
    except ImportError as error:
        raise InputError(_MISSING) from error
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _embedded(data: Any) -> str:
    """JSON that is safe inside an HTML element: it holds none of the characters < > &."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(value: Any) -> Any:
    """A specification without Unicode line separators, which its expressions cannot quote, and with None for numbers
    that are not finite, which JSON does not have.
    """
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return value.replace("\u2028", " ").replace("\u2029", " ")
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["plots", "svg", "write_page"]
