"""Observers see what the linear layers see, accumulate it exactly, and leave nothing behind."""

from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant import maps
from gyroquant.calibration.observers import GuidedSecondMoments, Moments, SecondMoments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.source import open_model


@given(st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_gram_is_the_sum_of_outer_products(n: int, batches: list[int]) -> None:
    rows = [torch.randn(count, n) for count in batches]
    gram = SecondMoments(n)
    for part in rows:
        gram(part)
    x = torch.cat(rows)
    assert gram.count == len(x)
    assert torch.allclose(gram.second_moments, x.T @ x, atol=1e-4)
    assert torch.equal(gram.second_moments, gram.second_moments.T)


def test_guided_second_moments_weight_the_tokens_of_every_group_once_a_pass() -> None:
    x, weights = torch.randn(12, 5), {"q": torch.rand(2, 12), "k": torch.rand(1, 12)}
    guided = GuidedSecondMoments(5, weights)
    for _ in range(2):  # two passes over all tokens
        for part in x.split([7, 5]):
            guided(part)
    torch.testing.assert_close(guided.second_moments, 2 * x.T @ x)
    for name, groups in weights.items():
        for moments, tokens in zip(guided.parts[name], groups, strict=True):
            torch.testing.assert_close(moments.second_moments, 2 * x.T @ (tokens[:, None] * x))


def test_moments_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian, flat, spike = Moments(512), Moments(512), Moments(512)
    for _ in range(4):
        gaussian(torch.randn(256, 512, generator=generator))
        flat(torch.randint(0, 2, (256, 512), generator=generator) * 2.0 - 1)
    spike(torch.eye(512)[:3])
    assert gaussian.kurtosis == pytest.approx(3, abs=0.05)
    assert gaussian.rms == pytest.approx(1, abs=0.01)
    assert flat.kurtosis == pytest.approx(1)
    assert flat.max_over_rms == pytest.approx(1)
    assert spike.max_over_rms == pytest.approx(512**0.5, rel=1e-4)
    assert spike.channel_max.sum() == 3


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "gemma2", "cohere2"])
def test_every_linear_layer_is_covered_by_its_basis(name: str) -> None:
    model = tiny_models.build(name)
    store = open_model(model)
    graph, ids = store.graph, tiny_models.tokens(model)
    seen: dict[str, torch.Tensor] = {}
    for op in graph.blocks[0].linears:
        model.get_submodule(op.module).register_forward_pre_hook(
            lambda module, args, op=op: seen.__setitem__(op.module, args[0].reshape(-1, op.in_features))
        )
    stream = Stream(BlockRunner(model, graph), ids, store.read(graph.outer_params()))
    with observing(model, graph.blocks[0], [], SecondMoments) as observed:
        stream.run(0, store.read(graph.block_params(0)), keep=False)
    for op in graph.blocks[0].linears:
        gram = observed[op.entry.reads, None]
        assert gram.count == ids.numel()
        assert torch.allclose(gram.second_moments, seen[op.module].T @ seen[op.module], rtol=1e-3, atol=1e-3)


def test_experts_are_observed_one_by_one() -> None:
    model = tiny_models.build("qwen2_moe")
    store = open_model(model)
    graph, ids = store.graph, tiny_models.tokens(model, batch=4)
    stream = Stream(BlockRunner(model, graph), ids, store.read(graph.outer_params()))
    with observing(model, graph.blocks[0], [], SecondMoments) as observed:
        stream.run(0, store.read(graph.block_params(0)), keep=False)
    experts = "model.layers.0.mlp.experts."
    routed = [
        observed[experts + "gate_up_proj", e].count for e in range(4) if (experts + "gate_up_proj", e) in observed
    ]
    assert sum(routed) == 2 * ids.numel()  # two experts a token
    assert observed[experts + "down_proj", 0].second_moments.shape == (48, 48)
    assert observed["shared.act", None].count == ids.numel()
    assert ("fixed", None) not in observed
    before = model(ids).logits
    assert model.config._experts_implementation != "gyroquant"
    assert torch.equal(model(ids).logits, before)


def test_online_maps_come_before_observers() -> None:
    model = tiny_models.build("llama")
    store = open_model(model)
    plan = FoldPlan(store.graph)
    for site in find_sites(store.graph, "R4"):
        plan.add(site, maps.hadamard(site.n))
    stream = Stream(BlockRunner(model, store.graph), tiny_models.tokens(model), store.read(store.graph.outer_params()))
    tensors, group, online = store.read(store.graph.block_params(0)), store.graph.blocks[0], plan.online_in(0)
    with observing(model, group, [], SecondMoments) as plain:
        stream.run(0, tensors, keep=False)
    with attached(model, online), observing(model, group, online, SecondMoments) as rotated:
        stream.run(0, tensors, keep=False)
    h = maps.hadamard(96).dense(torch.float32)
    weight = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(
        rotated[weight, None].second_moments, h.T @ plain["act", None].second_moments @ h, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "cohere2"])
def test_a_block_need_not_run_on_behind_what_is_observed(name: str) -> None:
    model = tiny_models.build(name)
    store = open_model(model)
    group, tensors = store.graph.blocks[0], store.read(store.graph.block_params(0))
    stream = Stream(BlockRunner(model, store.graph), tiny_models.tokens(model), store.read(store.graph.outer_params()))
    calls: list[str] = []
    for op in group.linears:
        model.get_submodule(op.module).register_forward_hook(lambda *_, op=op: calls.append(op.entry.reads))
    found, ran = {}, {}
    first = group.linears[0].entry.reads
    for stop in (False, True):
        with observing(model, group, [], SecondMoments, {first}, partial(bool, stop)) as observed:
            stream.observe(0, tensors)
        found[stop], ran[stop] = observed[first, None], calls.copy()
        calls.clear()
    assert torch.equal(found[True].second_moments, found[False].second_moments)
    assert found[True].count == found[False].count > 0
    assert not ran[True]
    assert set(ran[False]) > {first}
    with observing(model, group, [], SecondMoments, stop=lambda: True) as observed:  # several inputs
        stream.observe(0, tensors)
    assert {key for key, _ in observed} == {
        op.entry.reads if not op.entry.stacked else op.weight for op in group.linears if op.entry.quantize
    }


def test_hidden_states_may_lie_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gyroquant.calibration.stream._TOKENS", 96)  # batches of four, and a last one of two
    model = tiny_models.build("llama")
    store = open_model(model)
    ids = tiny_models.tokens(model, batch=6)
    streams = [
        Stream(BlockRunner(model, store.graph), ids, store.read(store.graph.outer_params()), offload=place)
        for place in (None, tmp_path)
    ]
    for stream in streams:
        for i in range(2):
            stream.run(i, store.read(store.graph.block_params(i)))
    assert streams[0].hidden is not None
    assert torch.equal(streams[0].hidden, streams[1].hidden)
    outer = store.read(store.graph.outer_params())
    with torch.no_grad():
        logits = model(ids).logits
        for number, start, piece in streams[1].logits(outer):
            assert torch.allclose(piece, logits[number, start : start + len(piece)], atol=1e-5)
