"""Inspects a model: shape, sites, fitting recipes, outliers, and the cost of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gyroquant.calibration.text import bos_text, load_text, token_stream
from gyroquant.errors import GyroquantError, InputError
from gyroquant.evaluation.hadamard_advice import HadamardAdvice
from gyroquant.evaluation.outliers import Outliers, measure_outliers
from gyroquant.inspection.dry_run import dry_run_job
from gyroquant.inspection.expected_size import expected_size
from gyroquant.models.deriving.description_file import write_description
from gyroquant.models.graph.sites import SITE_NAMES, Site, find_sites
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.config_loading import read_json
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.models.stores.weight_bytes import sizes
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.planning import plan_all
from gyroquant.pipeline.resources import ResourceEstimate
from gyroquant.recipes.presets import preset_names
from gyroquant.recipes.schema import load_recipe
from gyroquant.system.progress import Progress

_SAMPLES, _LENGTH = 8, 512  # windows and tokens for the measurement of outliers
_ADVICE = "rtn"  # the recipe whose grids the advice on Hadamard matrices is for, if none is given


@dataclass
class Inspection:
    """The facts about a model: shape, sites, fitting recipes; with text, outliers; with a recipe, its cost."""

    store: WeightStore
    fits: dict[str, str] = field(default_factory=dict)
    """Recipe name -> the reason why the recipe does not fit; empty if it fits."""
    outliers: list[Outliers] = field(default_factory=list)
    observed: dict[str, Any] = field(default_factory=dict)
    """The text of the measurement of outliers: number of windows, their length in tokens, and their first tokens."""
    advice: HadamardAdvice | None = None
    """With text: whether a Hadamard matrix on its inputs lowers the error of each layer."""
    recipe: str | None = None
    prediction: ResourceEstimate | None = None
    expected: dict[str, Any] | None = None
    """The expected size of the recipe's result: `per_weight`, `whole_model` and `bytes`, as in a manifest."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """For a model that gyroquant rounded: the errors of every layer, from its `gyroquant.json`."""
    effective_bits: float | None = None
    """For a model that gyroquant rounded: its effective bits per weight, from its `gyroquant.json`."""
    saved: str | None = None
    """The file that holds the derived description, if it was saved."""

    @property
    def shape(self) -> dict[str, Any]:
        graph = self.store.graph
        return {
            "model_type": graph.config.model_type,
            "described_by": graph.architecture.name,
            "derived": self.store.derivation is not None,
            "level": self.level,
            "blocks": len(graph.blocks),
            "hidden": graph.hidden,
            "heads": graph.heads,
            "kv_heads": graph.kv_heads,
            "head_dim": graph.head_dim,
            "parameters": sum(prod(shape) for shape in self.store.shapes.values()),
            "tied": dict(graph.tied),
            "bits_per_weight": self.store.bits_per_weight(),
            "effective_bits_per_weight": self.effective_bits,
            **self.sizes,
        }

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Bits per weight of the whole model, and the bytes of its parts, as they are stored."""
        return sizes(self.store)

    @property
    def level(self) -> str:
        """What R1 can do on this model: `fused`, `online`, or `unrotated` if it can do neither."""
        if not find_sites(self.store.graph, "R1")[0].blocked:
            return "fused"
        return "online" if self._online("R1") else "unrotated"

    def _online(self, name: str) -> list[Site]:
        """The sites of a name at which a map can run online. Empty if there are none."""
        try:
            places = find_sites(self.store.graph, name, online=True)
        except GyroquantError:
            return []
        return [site for site in places if site.hook_points or site.inverse_at]

    def sites(self) -> list[dict[str, Any]]:
        """Every site of the model, as a dictionary.

        - places, orders: the number of places and the sizes of their maps.
        - admits, blocked: the maps that can be fused, and the reason if none can.
        - partly_blocked: at how many places none can, and the reason, if there are others.
        - online, online_unasked: whether a map can run online, and whether it does so without an explicit `online`.
        - admits_online: the maps that can run online.
        - proofs, not_proven: for a derived description, the relative errors of the logits of the tiny model, and the
          reasons why others were not proven; by the kind of map.
        """
        rows = []
        for name in SITE_NAMES:
            try:
                places = find_sites(self.store.graph, name)
            except GyroquantError:
                continue
            online = self._online(name)
            blocked = [site.blocked for site in places if site.blocked]
            whole = len(blocked) == len(places)
            partly = f"at {len(blocked)} of {len(places)} places: {blocked[0]}" if blocked and not whole else ""
            rows.append(
                {
                    "site": name,
                    "places": len(places),
                    "orders": sorted({site.n for site in places}),
                    "admits": next((site.admits for site in places if not site.blocked), places[0].admits),
                    "online": bool(online),
                    "online_unasked": places[0].online_unasked,
                    "admits_online": online[0].admits_online if online else "nothing",
                    "blocked": blocked[0] if whole else "",
                    "partly_blocked": partly,
                    **self._proven(name),
                }
            )
        return rows

    def _proven(self, name: str) -> dict[str, Any]:
        """The proofs of one site on the tiny model, and the reasons why others are missing."""
        derivation = self.store.derivation
        if derivation is None:
            return {"proofs": {}, "not_proven": {}}

        def of_site(found: Mapping[str, Any]) -> dict[str, Any]:
            return {label: value for label, value in found.items() if label.split(" ", 1)[0] == name}

        return {"proofs": of_site(derivation.proofs), "not_proven": of_site(derivation.problems)}

    def missing_sites(self) -> dict[str, str]:
        """The sites that the model does not have, by name, with the reason."""
        missing = {}
        for name in SITE_NAMES:
            try:
                find_sites(self.store.graph, name)
            except GyroquantError as error:
                reason = self._proven(name)["not_proven"].get(name, str(error))
                missing[name] = "nothing in the description matches it" if reason == str(error) else reason
        return missing

    def entries(self) -> list[dict[str, Any]]:
        """Every entry of a derived description: name, kind, reads, writes, and how that is known.

        Entries outside the blocks have full names, those of the decoder alone. Empty if nothing was derived.
        """
        if self.store.derivation is None:
            return []
        architecture = self.store.derivation.architecture
        return [
            {
                "name": entry.name,
                "in_block": parts is architecture.block,
                "kind": type(entry).__name__,
                "reads": getattr(entry, "reads", None),
                "writes": getattr(entry, "writes", None),
                "fact": architecture.facts.get(entry.name, ""),
            }
            for parts in (architecture.block, architecture.outer)
            for entry in parts
            if not isinstance(entry, tuple)
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.store.label,
            "source_quantization": self.store.source_quantization,
            **self.shape,
            "sites": self.sites(),
            "missing_sites": self.missing_sites(),
            "entries": self.entries(),
            "saved": self.saved,
            "recipes": self.fits,
            "outliers": [asdict(row) for row in self.outliers],
            "observed": self.observed,
            "hadamard": None if self.advice is None else self.advice.to_dict(),
            "recipe": self.recipe,
            "prediction": None if self.prediction is None else self.prediction.to_dict(),
            "expected": self.expected,
            "layers": self.layers,
        }


_LAYER = {"name", "weight_error", "output_error"}  # required keys of a layer in a manifest
_BOUND = ("bits", "decibels", "excess_bits")
_OLD_BOUND = "limit"  # the name of `rate_distortion` in manifests of the last release
_OLD_WHOLE = "whole_model_per_weight"  # the name of `whole_model`


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not set(layer) >= _LAYER or not isinstance(layer["name"], str):
        return False
    bound, numbers = layer.get("rate_distortion"), [layer["weight_error"]]
    if bound:
        numbers += [layer["output_error"], *map(bound.get, _BOUND)] if isinstance(bound, dict) else [None]
    numbers.append(layer.get("code_entropy", 0))  # manifests of the last release do not have it
    return all(isinstance(number, (int, float)) for number in numbers)


def _renamed(layer: Any) -> Any:
    """A layer of a manifest under today's names."""
    if not isinstance(layer, dict) or _OLD_BOUND not in layer:
        return layer
    return {"rate_distortion" if key == _OLD_BOUND else key: value for key, value in layer.items()}


def bits_of(manifest: Mapping[str, Any]) -> tuple[float, dict[str, int] | None]:
    """Bits per weight of the whole model, and bytes by part, from a manifest.

    A manifest of the last release has other names, and no bytes.
    """
    bits = manifest["bits"]
    return bits["whole_model"] if "whole_model" in bits else bits[_OLD_WHOLE], bits.get("bytes")


def read_layers(path: Path) -> list[dict[str, Any]]:
    """The layers in the manifest of a rounded model, which may be of the last release.

    Raises InputError if they are missing or damaged.
    """
    layers = read_json(path).get("layers")
    layers = [_renamed(layer) for layer in layers] if isinstance(layers, list) else None
    if layers is None or not all(_is_layer(layer) for layer in layers):
        raise InputError(f"{path} is not a manifest of gyroquant, or its layers are damaged; copy the folder again")
    return layers


def effective_bits(path: Path) -> float | None:
    """The effective bits per weight in the manifest of a rounded model. None if it has none, as in the last release.

    Raises InputError if they are damaged.
    """
    bits = read_json(path).get("bits")
    found = bits.get("effective") if isinstance(bits, dict) else None
    if not isinstance(found, (int, float, type(None))):
        raise InputError(f"{path} is damaged: bits.effective is {found!r:.40}, not a number; copy the folder again")
    return found


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
    sites: bool = False,
    save: str | Path | None = None,
    offload: str | Path | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Inspects a model: its sites, and which recipes fit.

    - `text`: also measures outliers on this text, and whether a Hadamard matrix helps each layer, on the grids of the
      recipe (default `rtn`, with the changes).
    - `recipe`: also measures time and memory of this recipe, at an `effort` if it has several.
    - `changes`: changes of the recipes.
    - `add_bos`, `offload`: as for quantizing.
    - `dry_run`: only measures the recipe. For exact memory, this process should have done nothing else.
    - `sites`: only finds the sites: no recipes are compared, and no layers are read.
    - `save`: writes the derived description to this new Python file. Goes with `sites`.

    Raises InputError if the options contradict each other, or if the description cannot be saved.
    """
    changes = list(changes)
    _check_options(sites, save, bool(dry_run or recipe or effort or text or changes or offload))
    result = Inspection(open_model(model))
    if sites:
        if save is not None:
            result.saved = str(_save(result.store, Path(save)))
        return result
    if dry_run and recipe is None:
        raise InputError("a dry run measures a recipe: give --recipe")
    manifest = result.store.folder / "gyroquant.json" if isinstance(result.store, PackedStore) else None
    if manifest is not None and manifest.exists() and not dry_run:
        result.layers = read_layers(manifest)
        result.effective_bits = effective_bits(manifest)
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
            result.expected = expected_size(Job.begin(job.spec))
    if text is not None and not dry_run:
        tokenizer, length = result.store.tokenizer(), _LENGTH
        length = min(length, result.store.graph.max_positions or length)
        stream = token_stream(load_text(text), tokenizer, result.store.text_config.vocab_size, add_bos)
        batch = stream.sample(min(_SAMPLES, len(stream.windows(length).ids)), length, 0)
        weights = load_recipe(recipe or _ADVICE, changes, effort)
        result.advice = HadamardAdvice(result.store.graph, weights.weights.grid, weights.activations)
        result.outliers = measure_outliers(result.store, batch.ids, device, progress, advice=result.advice)
        result.observed = {"windows": len(batch.ids), "window": length, "bos": bos_text(batch.bos, tokenizer)}
    return result


def _check_options(sites: bool, save: str | Path | None, others: bool) -> None:
    """Raises InputError if options of `inspect` contradict each other, or if the file to save exists.

    `others`: whether there are options that `sites` does not use.
    """
    if sites and others:
        raise InputError(
            "--sites shows only the sites: leave out the options of recipes and text, or leave out --sites"
        )
    if save is not None and not sites:
        raise InputError("--save saves the description that --sites shows: give --sites too")
    if save is not None and Path(save).exists():
        raise InputError(f"{save} exists already: give a new name, or remove the file")


def _save(store: WeightStore, path: Path) -> Path:
    """Writes the derived description of a model. Raises InputError if a hand-written one describes it."""
    described_by = store.graph.architecture.name
    if store.derivation is None:
        raise InputError(
            f"{store.label} is described by hand already ({described_by}), so there is no derived "
            "description to save: leave out --save"
        )
    write_description(store.derivation, path)
    return path
