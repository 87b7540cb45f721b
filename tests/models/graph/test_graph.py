"""Descriptions claim every parameter, exactly once each, and refuse what they do not know."""

from dataclasses import replace

import pytest
import tiny_models
import torch
import transformers

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.deriving.tiny import default_config, tiny_model
from gyroquant.models.graph.model_graph import build_graph
from gyroquant.models.graph.sites import SITE_NAMES, SITE_OF_BASIS, SITES, find_sites
from gyroquant.models.graph.spec import ARCHITECTURES, architecture_of, model_types, register
from gyroquant.models.stores.source import open_model


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_parameter_is_claimed_once(name: str) -> None:
    store = open_model(tiny_models.build(name))
    graph = store.graph
    assert sorted(name for group in graph.params for name in group) == sorted(store.shapes)


def test_every_described_model_type_has_a_tiny_model() -> None:
    configs = (tiny_models.CONFIGS | tiny_models.WRAPPERS).values()
    assert {config().get_text_config().model_type for config in configs} == set(model_types())


def test_an_unclaimed_parameter_is_an_error_that_names_it() -> None:
    store = open_model(tiny_models.build("llama"))
    shapes = dict(store.shapes) | {"model.layers.0.mlp.mystery.weight": (4, 4)}
    with pytest.raises(UnsupportedModelError, match=r"claims no parameter named model.layers.0.mlp.mystery.weight"):
        build_graph(store.config, shapes)


def test_a_missing_parameter_is_an_error_that_names_it() -> None:
    store = open_model(tiny_models.build("llama"))
    shapes = {name: shape for name, shape in store.shapes.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(UnsupportedModelError, match=r"block 1 has no parameter for model.layers.1.mlp.up_proj"):
        build_graph(store.config, shapes)


def test_a_missing_block_is_an_error() -> None:
    store = open_model(tiny_models.build("llama"))
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
        ("opt", {"layer_norm_elementwise_affine": False}, "do not have a gain"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_variants_that_are_not_described_are_refused(name: str, changes: dict[str, object], why: str) -> None:
    config = tiny_models.CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=why):
        architecture_of(config)


def test_a_model_type_cannot_be_described_twice() -> None:
    llama = architecture_of(tiny_models.CONFIGS["llama"]())
    with ARCHITECTURES.restored(), pytest.raises(InputError, match="two architectures are called 'llama'"):
        register(replace(llama, name="another"))
    assert register(llama) is llama  # the same one again is no contradiction


def test_orders_of_sites() -> None:
    graph = open_model(tiny_models.build("qwen2_moe")).graph
    assert [site.n for site in find_sites(graph, "R1")] == [64]
    assert [site.n for site in find_sites(graph, "R2")] == [16, 16]
    assert sorted(site.n for site in find_sites(graph, "R4")) == [48, 80, 96]  # experts, shared expert, dense layer
    assert len(find_sites(graph, "linear")) == 9 + 7


def test_experts_may_be_listed() -> None:
    """Other versions of the same families list their experts as modules: same sites, one a module."""
    store = open_model(tiny_models.build("qwen3_moe"))
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


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen3_moe", "gpt_neox"])
def test_layers_are_found_by_weight_and_seen_as_matrices(name: str) -> None:
    store = open_model(tiny_models.build(name))
    graph = store.graph
    assert graph.groups == (*graph.blocks, graph.outer)
    assert [graph.op(op.weight) for op in graph.linears] == list(graph.linears)
    for op in graph.block_linears:
        weight = store.read([op.weight])[op.weight]
        matrix = op.to_matrix(weight)
        assert tuple(matrix.shape) == op.matrix_shape
        assert op.numel == weight.numel() == matrix.numel()
        assert torch.equal(op.to_param(matrix), weight)
        assert torch.equal(matrix[0], weight[:, 0] if op.entry.transposed else weight.reshape(-1, op.in_features)[0])
    norm = graph.blocks[0].norms[0].gain
    assert graph.find_op(norm) is None
    with pytest.raises(KeyError):
        graph.op(norm)


def test_what_belongs_to_a_block_is_told_by_its_number() -> None:
    graph = open_model(tiny_models.build("llama")).graph
    assert graph.block_of("model.layers.1.mlp.up_proj") == 1
    assert graph.block_of("model.layers.10") == 10
    assert graph.block_of("model.norm") is None
    assert graph.block_of("model.layers") is None
    for index, group in enumerate(graph.blocks):
        assert tuple(graph.in_block(index, graph.linears)) == group.linears
    assert tuple(graph.around_blocks(graph.linears)) == graph.outer.linears


def test_facts_of_the_configuration() -> None:
    granite = open_model(tiny_models.build("granite")).graph
    assert (granite.residual_multiplier, granite.max_positions) == (0.4, 128)
    assert open_model(tiny_models.build("llama")).graph.residual_multiplier == 1.0


def test_kinds_of_sites_agree_with_each_other() -> None:
    for number, (name, kind) in enumerate(SITES.items()):
        assert kind.name == name
        assert kind.lies_in(name)
        assert set(kind.inside) <= set(SITE_NAMES[:number])  # what lies inside a basis is folded after it
    assert SITES["attn_in"].lies_in("R1")
    assert not SITES["R1"].lies_in("attn_in")
    assert [name for name, kind in SITES.items() if kind.online_unasked] == [
        "attn_out",
        "R3",
        "R4",
        "embeddings",
        "linear",
    ]
    assert SITE_OF_BASIS["act"] == "R4"


@pytest.mark.parametrize("name", SITE_NAMES)
def test_every_site_says_of_which_kind_it_is(name: str) -> None:
    model = tiny_models.build("llama") if name != "latent" else tiny_model(default_config("youtu"))
    graph = open_model(model).graph
    for online in (False, True):
        for site in find_sites(graph, name, online):
            assert site.kind is SITES[name]
    assert all(
        site.online_unasked == (name in ("attn_out", "R3", "R4", "embeddings", "linear"))
        for site in find_sites(graph, name)
    )
