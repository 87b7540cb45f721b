"""Architectural fuzzing (arXiv 2605.25203, section on Laguna): proves every method at every site of a tiny random model
of an architecture. It finds errors in the description of the architecture without a real model.

It also works on architectures without a hand-written description. Then it takes the one that is derived from the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.errors import GyroquantError, InputError, ProofError, UnsupportedModelError
from gyroquant.methods import Method
from gyroquant.models.deriving.tiny import causal_model_types, default_config, tiny_model, tiny_tokens
from gyroquant.models.deriving.tiny import tiny_config as shrunk
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import SITE_NAMES
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.folds import plan_folds
from gyroquant.recipes.schema import load_recipe
from gyroquant.system.progress import Progress

THRESHOLD = 5e-6


@dataclass(frozen=True)
class Finding:
    """The result of one method at one site: the `error` of the proof, the reason why it was `refused`, or a `fault`."""

    site: str
    method: str
    error: float | None = None
    refused: str = ""
    fault: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.fault)


@dataclass
class Report:
    """All findings on one architecture. `described_by` is empty, and `problem` says why, if it cannot be described.

    `known` is False if the description is derived from the model.
    """

    model_type: str
    described_by: str = ""
    known: bool = True
    problem: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def worst(self) -> float | None:
        errors = [f.error for f in self.findings if f.error is not None]
        return max(errors, default=None)

    @property
    def wrong(self) -> list[Finding]:
        return [f for f in self.findings if f.wrong]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"worst": self.worst}


def tiny_config(target: str | Path) -> Any:
    """A small configuration for a model type, the name of a class, or a configuration file or folder.

    Raises InputError if transformers has no such causal language model, or if its configuration cannot be made small.
    """
    path, given = Path(target), dict[str, Any]()
    path = path / "config.json" if path.is_dir() else path
    name = str(target)
    if path.suffix == ".json":
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            name = given["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a configuration with a model_type: {error}") from error
    classes = {cls: kind for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(cls, str)}
    name = classes.get(name, name)
    for kind in causal_model_types():
        if type_name(kind) == name:
            name = kind
    if name not in causal_model_types():
        raise InputError(f"transformers has no causal language model {target}: give a model type, such as qwen3")
    try:
        config = default_config(name) if not given else CONFIG_MAPPING[name].from_dict(given)
        return shrunk(config)
    except Exception as error:
        raise InputError(f"a small {name} cannot be configured: {type(error).__name__}: {error}") from error


def type_name(model_type: str) -> str:
    """The name of the configuration class of a model type."""
    return str(CONFIG_MAPPING[model_type].__name__)


def fuzz(target: str | Path, methods: Iterable[str] | None = None, progress: Progress | None = None) -> Report:
    """Tries every method, or those in `methods`, at every site of a tiny random model of an architecture."""
    config = tiny_config(target)
    report = Report(config.model_type)
    try:
        model = tiny_model(config)
    except UnsupportedModelError as error:
        raise InputError(str(error)) from error
    store = ModuleStore(model)
    try:
        report.known = store.derivation is None
        _ = store.graph
    except UnsupportedModelError as error:
        report.problem, report.known = str(error), False
        return report
    report.described_by = store.graph.architecture.name
    ids = tiny_tokens(model)
    names = [name for name in Method.registry if methods is None or name in set(methods)]
    cases = [(site, name, online) for site in SITE_NAMES for name in names for online in (None, True)]
    with evaluating(model), (progress or Progress()).stage(config.model_type, len(cases)) as advance:
        for site, name, online in cases:
            finding = _try(store, site, name, online, ids)
            if finding is not None:
                report.findings.append(finding)
            advance()
    return report


def _try(store: ModuleStore, site: str, name: str, online: bool | None, ids: Tensor) -> Finding | None:
    try:
        Method.registry[name](method=name)
    except ValidationError:
        return None  # the method has a required option, such as a file
    label = f"{site} online" if online else site
    step: Mapping[str, Any] = {"method": name} | ({"online": True} if online else {})
    recipe = load_recipe({"transform": {site: step}, "weights": {"bits": 8, "group_size": 16}})
    try:
        plan = plan_folds(store.graph, recipe, _measurer(store, ids))
        if online and not plan.online:
            return None
        proof = prove(store, plan, BlockRunner.of(store), ids, THRESHOLD)
        return Finding(label, name, max(proof.relative_logit_error, proof.worst_block_error))
    except ProofError as error:
        return Finding(label, name, fault=str(error))
    except GyroquantError as error:
        return Finding(label, name, refused=str(error))
    except Exception as error:
        return Finding(label, name, fault=f"{type(error).__name__}: {error}")


def _measurer(store: ModuleStore, ids: Tensor) -> Callable[[FoldPlan, list[SiteMeasurement]], None]:
    def measure_sites(plan: FoldPlan, sites: list[SiteMeasurement]) -> None:
        measure(store, plan, sites, ids)

    return measure_sites
