"""Descriptions claim every parameter, exactly once each, and refuse what they do not know."""

import pytest
import tiny
import transformers

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.graph import build_graph
from gyroquant.models.sites import find_sites
from gyroquant.models.source import open_model
from gyroquant.models.spec import architecture_of, model_types, register


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_parameter_is_claimed_once(name: str) -> None:
    store = open_model(tiny.build(name))
    graph = store.graph
    claimed = [p for i in range(len(graph.blocks)) for p in graph.block_params(i)] + list(graph.outer_params())
    assert sorted(claimed) == sorted(store.shapes)


def test_every_described_model_type_has_a_tiny_model() -> None:
    configs = (tiny.CONFIGS | tiny.WRAPPERS).values()
    assert {config().get_text_config().model_type for config in configs} == set(model_types())


def test_an_unclaimed_parameter_is_an_error_that_names_it() -> None:
    store = open_model(tiny.build("llama"))
    shapes = dict(store.shapes) | {"model.layers.0.mlp.mystery.weight": (4, 4)}
    with pytest.raises(UnsupportedModelError, match=r"claims no parameter named model.layers.0.mlp.mystery.weight"):
        build_graph(store.config, shapes)


def test_a_missing_parameter_is_an_error_that_names_it() -> None:
    store = open_model(tiny.build("llama"))
    shapes = {name: shape for name, shape in store.shapes.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(UnsupportedModelError, match=r"block 1 has no parameter for model.layers.1.mlp.up_proj"):
        build_graph(store.config, shapes)


def test_a_missing_block_is_an_error() -> None:
    store = open_model(tiny.build("llama"))
    shapes = {name: shape for name, shape in store.shapes.items() if "layers.0." not in name}
    with pytest.raises(UnsupportedModelError, match="without gaps"):
        build_graph(store.config, shapes)


def test_an_unknown_architecture_is_an_error_that_lists_the_known() -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not described; described are arcee, cohere, "):
        architecture_of(config)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("opt", {"do_layer_norm_before": False}, "inside the residual stream"),
        ("opt", {"word_embed_proj_dim": 32}, "projected"),
        ("opt", {"layer_norm_elementwise_affine": False}, "no gain"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_variants_that_are_not_described_are_refused(name: str, changes: dict[str, object], why: str) -> None:
    config = tiny.CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=why):
        architecture_of(config)


def test_a_model_type_cannot_be_described_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        register(architecture_of(tiny.CONFIGS["llama"]()))


def test_orders_of_sites() -> None:
    graph = open_model(tiny.build("qwen2_moe")).graph
    assert [site.n for site in find_sites(graph, "R1")] == [64]
    assert [site.n for site in find_sites(graph, "R2")] == [16, 16]
    assert sorted(site.n for site in find_sites(graph, "R4")) == [48, 80, 96]  # experts, shared expert, dense layer
    assert len(find_sites(graph, "linear")) == 9 + 7


def test_experts_may_be_listed() -> None:
    """Other versions of the same families list their experts as modules: same sites, one a module."""
    store = open_model(tiny.build("qwen3_moe"))
    shapes = {name: shape for name, shape in store.shapes.items() if ".experts." not in name}
    for layer in range(2):
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            shapes |= {prefix + "gate_proj.weight": (48, 64), prefix + "up_proj.weight": (48, 64)}
            shapes[prefix + "down_proj.weight"] = (64, 48)
    graph = build_graph(store.config, shapes)
    places = find_sites(graph, "R4")
    assert len(places) == 8
    assert places[5].label == "R4 of block 1 (expert1)"
    assert {port.param for port in places[0].writers} == {
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
    }
