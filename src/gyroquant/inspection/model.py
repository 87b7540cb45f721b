"""Inspects a model: shape, sites, fitting recipes, outliers, and the cost of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gyroquant.calibration.text import bos_text, load_text, token_stream
from gyroquant.errors import GyroquantError, InputError
from gyroquant.evaluation.outliers import Outliers, measure_outliers
from gyroquant.inspection.dry_run import dry_run_job
from gyroquant.models.graph.sites import SITE_NAMES, find_sites
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.config_loading import read_json
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.planning import plan_all
from gyroquant.pipeline.resources import ResourceEstimate
from gyroquant.recipes.presets import preset_names
from gyroquant.recipes.schema import load_recipe
from gyroquant.system.progress import Progress

_SAMPLES, _LENGTH = 8, 512  # windows and tokens for the measurement of outliers


@dataclass
class Inspection:
    """The facts about a model: shape, sites, fitting recipes; with text, outliers; with a recipe, its cost."""

    store: WeightStore
    fits: dict[str, str] = field(default_factory=dict)
    """Recipe name -> the reason why the recipe does not fit; empty if it fits."""
    outliers: list[Outliers] = field(default_factory=list)
    observed: dict[str, Any] = field(default_factory=dict)
    """The text of the measurement of outliers: number of windows, their length in tokens, and their first tokens."""
    recipe: str | None = None
    prediction: ResourceEstimate | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    """For a model that gyroquant rounded: the errors of every layer, from its `gyroquant.json`."""

    @property
    def shape(self) -> dict[str, Any]:
        graph = self.store.graph
        return {
            "model_type": graph.config.model_type,
            "described_by": graph.architecture.name,
            "blocks": len(graph.blocks),
            "hidden": graph.hidden,
            "heads": graph.heads,
            "kv_heads": graph.kv_heads,
            "head_dim": graph.head_dim,
            "parameters": sum(prod(shape) for shape in self.store.shapes.values()),
            "tied": dict(graph.tied),
            "bits_per_weight": self.store.bits_per_weight(),
        }

    def sites(self) -> list[dict[str, Any]]:
        """Every site: the number of places, their orders, which maps it admits, and why a map cannot be fused there."""
        rows = []
        for name in SITE_NAMES:
            try:
                places = find_sites(self.store.graph, name)
            except GyroquantError:
                continue
            rows.append(
                {
                    "site": name,
                    "places": len(places),
                    "orders": sorted({site.n for site in places}),
                    "admits": places[0].admits,
                    "online": bool(places[0].hook_points),
                    "blocked": places[0].blocked,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.store.label,
            "source_quantization": self.store.source_quantization,
            **self.shape,
            "sites": self.sites(),
            "recipes": self.fits,
            "outliers": [asdict(row) for row in self.outliers],
            "observed": self.observed,
            "recipe": self.recipe,
            "prediction": None if self.prediction is None else self.prediction.to_dict(),
            "layers": self.layers,
        }


_LAYER = {"name", "weight_error", "output_error"}  # required keys of a layer in a manifest
_BOUND = ("bits", "decibels", "excess_bits")
_OLD_BOUND = "limit"  # the name of `rate_distortion` in manifests of the last release


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not set(layer) >= _LAYER or not isinstance(layer["name"], str):
        return False
    bound, numbers = layer.get("rate_distortion"), [layer["weight_error"]]
    if bound:
        numbers += [layer["output_error"], *map(bound.get, _BOUND)] if isinstance(bound, dict) else [None]
    return all(isinstance(number, (int, float)) for number in numbers)


def _renamed(layer: Any) -> Any:
    """A layer of a manifest under today's names."""
    if not isinstance(layer, dict) or _OLD_BOUND not in layer:
        return layer
    return {"rate_distortion" if key == _OLD_BOUND else key: value for key, value in layer.items()}


def read_layers(path: Path) -> list[dict[str, Any]]:
    """The layers in the manifest of a rounded model, which may be of the last release.

    Raises InputError if they are missing or damaged.
    """
    layers = read_json(path).get("layers")
    layers = [_renamed(layer) for layer in layers] if isinstance(layers, list) else None
    if layers is None or not all(_is_layer(layer) for layer in layers):
        raise InputError(f"{path} is not a manifest of gyroquant, or its layers are damaged; copy the folder again")
    return layers


def inspect_model(
    model: Any,
    recipe: str | None = None,
    changes: Iterable[str] = (),
    text: str | Path | None = None,
    *,
    effort: str | None = None,
    add_bos: bool = True,
    device: str = "cpu",
    dry_run: bool = False,
    offload: str | Path | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Inspects a model: its sites, and which recipes fit.

    - `text`: also measures outliers on this text.
    - `recipe`: also measures time and memory of this recipe, at an `effort` if it has several.
    - `changes`: changes of the recipes.
    - `add_bos`, `offload`: as for quantizing.
    - `dry_run`: only measures the recipe. For exact memory, this process should have done nothing else.
    """
    changes = list(changes)
    result = Inspection(open_model(model))
    if dry_run and recipe is None:
        raise InputError("a dry run measures a recipe: give --recipe")
    manifest = result.store.folder / "gyroquant.json" if isinstance(result.store, PackedStore) else None
    if manifest is not None and manifest.exists() and not dry_run:
        result.layers = read_layers(manifest)
    for name in () if dry_run else preset_names():
        try:
            plan_all(result.store.graph, load_recipe(name, changes))
            result.fits[name] = ""
        except GyroquantError as error:
            result.fits[name] = str(error)
    if recipe is not None:
        result.recipe = recipe
        with TemporaryDirectory() as scratch:
            loaded = load_recipe(recipe, changes, effort)
            job = prepare(model, Path(scratch) / "out", loaded, text, device=device, offload=offload)
            result.prediction = dry_run_job(job)
    if text is not None and not dry_run:
        tokenizer, length = result.store.tokenizer(), _LENGTH
        length = min(length, result.store.graph.max_positions or length)
        stream = token_stream(load_text(text), tokenizer, result.store.text_config.vocab_size, add_bos)
        batch = stream.sample(min(_SAMPLES, len(stream.windows(length).ids)), length, 0)
        result.outliers = measure_outliers(result.store, batch.ids, device, progress)
        result.observed = {"windows": len(batch.ids), "window": length, "bos": bos_text(batch.bos, tokenizer)}
    return result
