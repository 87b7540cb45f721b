"""Derived descriptions agree with the hand-written ones, and describe families and classes that no file describes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from deriving_examples import CustomModel, custom_config
from selection import some
from torch import nn

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.deriving.derive import Derivation, derive, derived
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.graph.model_graph import ModelGraph, build_graph
from gyroquant.models.graph.sites import Structure, find_sites
from gyroquant.models.stores.base import ModuleStore

FUSED: list[tuple[str, Structure]] = [
    ("R1", "orthogonal"),
    ("R2", "orthogonal"),
    ("R4", "permutation"),
    ("R4", "diagonal"),
    ("attn_in", "diagonal"),
    ("mlp_in", "diagonal"),
    ("qk", "pairs"),
]
ONLINE = ["R1", "attn_out", "R3", "R4", "linear"]


def graph_of(store: ModuleStore, derivation: Derivation) -> ModelGraph:
    return build_graph(store.config, store.shapes, store.tied, derivation.architecture)


def ports(graph: ModelGraph, name: str, structure: Structure, online: bool) -> Any:
    """What a site is: the parameters that write and read it, and where it runs. None if no map can be folded there."""
    try:
        sites = find_sites(graph, name, online, structure)
    except UnsupportedModelError:
        return None
    if online:
        return {(site.n, site.hook_points) for site in sites}
    if all(site.blocked for site in sites):
        return None
    return {
        (
            site.n,
            frozenset((port.param, port.axis, _rows(port.rows)) for port in site.writers),
            frozenset((port.param, port.axis, _rows(port.rows)) for port in site.readers),
        )
        for site in sites
    }


def _rows(rows: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if rows is None else tuple(rows.tolist())


@pytest.mark.parametrize("name", some(tiny_models.CONFIGS))
def test_every_written_description_is_also_derived(name: str) -> None:
    model = tiny_models.build(name)
    store = ModuleStore(model)
    graph = graph_of(store, derive(model, tiny_models.tokens(model)))
    for site, structure in FUSED:
        expected = ports(store.graph, site, structure, online=False)
        found = ports(graph, site, structure, online=False)
        assert found == expected, (site, structure)
    for site in ONLINE:
        assert ports(graph, site, "orthogonal", online=True) == ports(store.graph, site, "orthogonal", online=True), (
            site
        )


@pytest.mark.parametrize(
    ("model_type", "level", "sites"),
    [
        ("qwen3_5_text", "fused", {"R4", "R4 permutation", "R4 diagonal", "linear"}),  # gated linear attention
        ("gpt_oss", "fused", {"R2", "R3", "R4", "qk", "linear"}),  # interleaved experts with biases, sinks
        ("deepseek_v3", "fused", {"R2", "R4", "linear"}),  # latents of attention
        ("deepseek_v4", "fused", {"R4", "linear"}),  # four residual streams
        ("nemotron_h", "fused", {"R2", "R3", "R4", "qk", "linear"}),  # one mixer of three kinds in each block
        ("falcon_h1", "fused", {"R2", "R3", "R4", "linear"}),  # Mamba and attention side by side
        ("jetmoe", "fused", {"linear"}),  # vectors that are added to the residual stream
        ("olmo", "fused", {"R2", "R3", "R4", "linear"}),  # norms without parameters
        ("gemma4_text", "online", {"R3", "R4", "linear"}),  # norms after attention and feed-forward network
        ("gemma3n_text", "online", {"R3", "linear"}),
        ("rwkv", "unrotated", {"linear"}),
    ],
)
def test_families_without_a_description(model_type: str, level: str, sites: set[str]) -> None:
    model = tiny_model(default_config(model_type))
    derivation = derive(model, tiny_tokens(model))
    assert derivation.level == level
    assert sites <= set(derivation.proofs)
    assert max(derivation.proofs.values()) < 5e-5  # of Qwen3.5: its recurrence amplifies the last digits


def test_r2_is_withdrawn_where_a_gate_multiplies_the_heads() -> None:
    model = tiny_model(default_config("qwen3_5_text"))
    derivation = derive(model, tiny_tokens(model))
    assert "R2" not in derivation.proofs
    with pytest.raises(UnsupportedModelError, match="no site R2"):
        find_sites(graph_of(ModuleStore(model), derivation), "R2")


def test_a_class_that_transformers_does_not_have() -> None:
    """Sandwich norms, a gate on attention, shared experts and odd names, and not a line about them in the package."""
    derivation = derived(custom_config(), CustomModel._from_config)
    assert derivation.level == "online"
    assert {"R1 online", "R4", "R4 permutation", "linear"} <= set(derivation.proofs)
    assert "a norm" in derivation.problems["R1"] or "gain" in derivation.problems["R1"]
    plain = derived(custom_config(sandwich=False), CustomModel._from_config)
    assert plain.level == "fused"


def test_a_fold_that_would_change_the_model_is_not_offered() -> None:
    """A model that multiplies its residual stream by a vector: every port is found, but a rotation is not exact."""

    class Scaled(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.scale = block, nn.Parameter(torch.linspace(0.5, 2, 64))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = self.block(*args, **kwargs) * self.scale
            return out

    model = tiny_model(default_config("llama"))
    layers = model.model.layers
    for i in range(len(layers)):
        layers[i] = Scaled(layers[i])
    derivation = derive(model, tiny_tokens(model))
    assert derivation.level == "online"
    assert "changed the logits" in derivation.problems["R1"]


def test_blocks_that_share_parameters_are_refused() -> None:
    model = tiny_model(default_config("llama"))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match="share parameters"):
        derive(model, tiny_tokens(model))


def test_a_derivation_is_made_once_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    config = default_config("gemma")
    first = derived(config)
    assert torch.rand(1) == expected
    monkeypatch.setattr("gyroquant.models.deriving.derive.derive", lambda *_: pytest.fail("derived again"))
    assert derived(default_config("gemma")) is first
