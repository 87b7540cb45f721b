"""Looking at a model before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gyroquant.calibration.text import bos_text, load_text, token_stream
from gyroquant.errors import GyroquantError, InputError
from gyroquant.estimate import Prediction
from gyroquant.evaluation.outliers import Outliers, measure_outliers
from gyroquant.job import plan_all, prepare
from gyroquant.models.outside import read_json
from gyroquant.models.packed import PackedStore
from gyroquant.models.sites import SITE_NAMES, find_sites
from gyroquant.models.source import open_model
from gyroquant.models.store import WeightStore
from gyroquant.predict import predict
from gyroquant.presets import preset_names
from gyroquant.progress import Stages
from gyroquant.recipe import load_recipe

_SAMPLES, _LENGTH = 8, 512  # text that outliers are measured on


@dataclass
class Inspection:
    """What is known of a model: shape, sites, fitting recipes and, with text, outliers and a prediction."""

    store: WeightStore
    fits: dict[str, str] = field(default_factory=dict)
    """Recipe name -> why it does not fit; empty when it does."""
    outliers: list[Outliers] = field(default_factory=list)
    observed: dict[str, Any] = field(default_factory=dict)
    """The text that outliers were measured on: how many windows of how many tokens, and what each begins with."""
    recipe: str | None = None
    prediction: Prediction | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Of a model that gyroquant rounded: every layer's errors and limit, as in its `gyroquant.json`."""

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
            "parameters": sum(int(torch.Size(shape).numel()) for shape in self.store.shapes.values()),
            "tied": dict(graph.tied),
            "bits_per_weight": self.store.bits_per_weight(),
        }

    def sites(self) -> list[dict[str, Any]]:
        """Every site: how many places, their orders, whether a map can be fused, and why not."""
        rows = []
        for name in SITE_NAMES:
            try:
                found = find_sites(self.store.graph, name)
            except GyroquantError:
                continue
            rows.append(
                {
                    "site": name,
                    "places": len(found),
                    "orders": sorted({site.n for site in found}),
                    "admits": found[0].admits,
                    "online": bool(found[0].insertions),
                    "blocked": found[0].blocked,
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


_LAYER = {"name", "weight_error", "output_error"}  # what a manifest says of a layer, at the least
_LIMIT = ("bits", "decibels", "excess_bits")


def _is_layer(one: Any) -> bool:
    if not isinstance(one, dict) or not set(one) >= _LAYER or not isinstance(one["name"], str):
        return False
    limit, numbers = one.get("limit"), [one["weight_error"]]
    if limit:
        numbers += [one["output_error"], *(limit.get(key) for key in _LIMIT)] if isinstance(limit, dict) else [None]
    return all(isinstance(number, (int, float)) for number in numbers)


def read_layers(path: Path) -> list[dict[str, Any]]:
    """The layers in the manifest of a rounded model. Raises InputError for a manifest that is none, or damaged."""
    layers = read_json(path).get("layers")
    if not isinstance(layers, list) or not all(_is_layer(one) for one in layers):
        raise InputError(f"{path} is no manifest that gyroquant wrote: its layers are damaged; copy the folder again")
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
    progress: Stages | None = None,
) -> Inspection:
    """Looks at a model: its sites and which recipes fit; with `text` its outliers; with `recipe`, at an `effort` if it
    has several, what that takes. `add_bos` and `offload` are as for quantizing.

    With `dry_run` only the last of these, in a process that has done nothing else: what `quantize` would take.
    """
    changes = list(changes)
    result = Inspection(open_model(model))
    if dry_run and recipe is None:
        raise InputError("a dry run is one of a recipe: give --recipe")
    manifest = result.store.folder / "gyroquant.json" if isinstance(result.store, PackedStore) else None
    if manifest is not None and manifest.exists() and not dry_run:
        result.layers = read_layers(manifest)
    for name in () if dry_run else preset_names():
        try:
            made = load_recipe(name, changes)
            plan_all(result.store.graph, made)
            result.fits[name] = ""
        except GyroquantError as error:
            result.fits[name] = str(error)
    if recipe is not None:
        result.recipe = recipe
        with TemporaryDirectory() as scratch:
            wanted = load_recipe(recipe, changes, effort)
            job = prepare(model, Path(scratch) / "out", wanted, text, device=device, offload=offload)
            result.prediction = predict(job)
    if text is not None and not dry_run:
        tokenizer, length = result.store.tokenizer(), _LENGTH
        length = min(length, getattr(result.store.text_config, "max_position_embeddings", None) or length)
        stream = token_stream(load_text(text), tokenizer, result.store.text_config.vocab_size, add_bos)
        batch = stream.sample(min(_SAMPLES, len(stream.windows(length).ids)), length, 0)
        result.outliers = measure_outliers(result.store, batch.ids, device, progress)
        result.observed = {"windows": len(batch.ids), "window": length, "bos": bos_text(batch.bos, tokenizer)}
    return result
