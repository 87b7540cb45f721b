"""Architectural fuzzing (arXiv 2605.25203, section on Laguna): proves every method at every site of a tiny random model
of an architecture. It finds errors in the description of the architecture without a real model.

It also works on architectures without a description. Then it takes the first description that claims all parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.errors import GyroquantError, InputError, ProofError, UnsupportedModelError
from gyroquant.methods import Method
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.model_graph import build_graph
from gyroquant.models.graph.sites import SITE_NAMES
from gyroquant.models.graph.spec import architectures, model_types
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.folds import plan_folds
from gyroquant.recipes.schema import load_recipe
from gyroquant.system.progress import Progress

THRESHOLD = 5e-6
_SMALL: dict[str, int] = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 64)
_SMALL |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "expert_ffn_hidden_size"), 96)
_SMALL |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
_SMALL |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4)
_SMALL |= dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_experts_per_tok"), 2)
_SMALL |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
_SMALL |= dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128)
_SMALL |= dict.fromkeys(("head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank", "query_pre_attn_scalar"), 16)
_SMALL |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "sliding_window"), 8)
_SMALL |= {"vocab_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
_SMALL |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0}
_SMALL |= {"bos_token_id": 1, "eos_token_id": 2}


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
    """All findings on one architecture. `described_by` is empty if no description claims all its parameters."""

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


def causal_model_types() -> list[str]:
    """Every model type of transformers that has a causal language model."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


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
    kind = CONFIG_MAPPING[name]
    try:
        defaults = kind().to_dict()
        kept = {key: value for key, value in given.items() if isinstance(value, bool | str) and key in defaults}
        small = {key: value for key, value in _SMALL.items() if key in defaults}
        return kind(**kept | small)
    except Exception as error:
        raise InputError(f"a small {name} cannot be configured: {type(error).__name__}: {error}") from error


def type_name(model_type: str) -> str:
    """The name of the configuration class of a model type."""
    return str(CONFIG_MAPPING[model_type].__name__)


@torch.no_grad()
def random_model(config: Any, seed: int = 0) -> nn.Module:
    """A model with random weights, gains and biases. With ones and zeros, the proof would not notice a missing gain."""
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"a tiny {config.model_type} cannot be built: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


def described(model: Any) -> tuple[ModuleStore, bool]:
    """A store of the model with a description that claims all its parameters, and whether it is the model's own.

    Raises UnsupportedModelError if there is no such description.
    """
    store = ModuleStore(model)
    if model.config.model_type in model_types():
        _ = store.graph
        return store, True
    for architecture in architectures():
        try:
            graph = build_graph(model.config, store.shapes, store.tied, architecture)
        except (GyroquantError, AttributeError, RuntimeError):
            continue
        store.__dict__["graph"] = graph
        return store, False
    raise UnsupportedModelError(
        f"{model.config.model_type} has no description, and no description of another family claims all parameters: "
        "write one, see docs/extend.md"
    )


def fuzz(target: str | Path, methods: Iterable[str] | None = None, progress: Progress | None = None) -> Report:
    """Tries every method, or those in `methods`, at every site of a tiny random model of an architecture."""
    config = tiny_config(target)
    report = Report(config.model_type)
    model = random_model(config)
    try:
        store, report.known = described(model)
    except UnsupportedModelError as error:
        report.problem, report.known = str(error), False
        return report
    report.described_by = store.graph.architecture.name
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
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
