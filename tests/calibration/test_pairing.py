"""What the unrounded model would have seen, next to what the rounded one sees: paired token by token, or not at all."""

from pathlib import Path

import listed_experts
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gyroquant.calibration.observers import PairedForward, PairedSecondMoments, SecondMoments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.source import open_model

NOTHING = torch.empty(0)


def feed(observer: PairedSecondMoments, original: Tensor | None, other: Tensor | None, tokens: int) -> None:
    """One batch in which either model sends the observer some tokens, or None."""
    pair = (original, other)
    for turn, x in zip(observer.pairing.turns(NOTHING, NOTHING, tokens), pair, strict=True):
        assert turn is NOTHING
        if x is not None:
            observer(x)


@given(st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_drift_is_the_sum_of_products(n: int, batches: list[int]) -> None:
    pairs = [(torch.randn(count, n), torch.randn(count, n)) for count in batches]
    observer, plain = PairedSecondMoments(n, PairedForward()), SecondMoments(n)
    for x0, x in pairs:
        feed(observer, x0, x, len(x))
        plain(x)
    x0, x = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert observer.input_error_cross is not None
    assert torch.allclose(observer.input_error_cross, (x0 - x).T @ x, atol=1e-4)
    assert observer.input_error_second_moments is None
    wide = PairedSecondMoments(n, PairedForward(input_error_second_moments=True))
    for one, other in pairs:
        feed(wide, one, other, len(other))
    assert wide.input_error_second_moments is not None
    assert torch.allclose(wide.input_error_second_moments, (x0 - x).T @ (x0 - x), atol=1e-4)
    assert torch.equal(wide.input_error_cross, observer.input_error_cross)
    assert torch.equal(observer.second_moments, plain.second_moments)
    assert observer.count == plain.count == sum(batches)


def test_tokens_without_a_partner_do_not_drift() -> None:
    n = 5
    x0, x, more = torch.randn(6, n), torch.randn(6, n), torch.randn(4, n)
    observer = PairedSecondMoments(n, PairedForward())
    feed(observer, x0, more, 6)  # an expert that gets other tokens
    feed(observer, more, x, 6)
    feed(observer, more, more, 6)  # as many, which need not be the same
    feed(observer, x0, None, 6)  # all of them here, none there
    feed(observer, None, x, 6)  # must not meet the tokens of the batch before
    assert observer.input_error_cross is None
    assert observer.count == 4 + 6 + 4 + 6
    assert not observer.pairing.waiting
    feed(observer, x0, x, 6)
    assert torch.allclose(observer.input_error_cross, (x0 - x).T @ x, atol=1e-5)


class Pair:
    """A tiny model with a paired stream whose second block is about to be observed, the first block being damaged."""

    def __init__(self, model: nn.Module, offload: Path | None = None, batch: int = 6, damage: float = 0.05):
        self.model, self.store = model, open_model(model)
        self.graph = self.store.graph
        self.runner, self.ids = BlockRunner(model, self.graph), tiny_models.tokens(model, batch=batch)
        self.outer = self.store.read(self.graph.outer_params())
        self.stream = Stream(self.runner, self.ids, self.outer, offload=offload, pairing=PairedForward())
        self.first = self.observe(0)
        self.damaged = self.tensors(0)
        for name, tensor in self.damaged.items():
            if tensor.dim() > 1 and "mlp.gate.weight" not in name:
                generator = torch.Generator().manual_seed(len(name))
                self.damaged[name] = tensor + damage * tensor.std() * torch.randn(tensor.shape, generator=generator)
        self.stream.run(0, self.damaged)

    def tensors(self, index: int) -> dict[str, Tensor]:
        return dict(self.store.read(self.graph.block_params(index)))

    def observe(self, index: int) -> dict:
        with observing(self.model, self.graph.blocks[index], [], self.stream.observer) as observed:
            self.stream.observe(index, self.tensors(index))
        return observed

    def inputs(self, first: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of the second block's linear layers when the first has these weights, by what they read."""
        stream, seen = Stream(self.runner, self.ids, self.outer), {}
        stream.run(0, first)
        for op in self.graph.blocks[1].linears:
            if not op.entry.stacked:
                self.model.get_submodule(op.module).register_forward_pre_hook(
                    lambda module, args, op=op: seen.setdefault(op.entry.reads, []).append(args[0].flatten(0, -2))
                )
        stream.run(1, self.tensors(1), keep=False)
        return {reads: torch.cat(parts[:: len(parts) // len(stream._batches())]) for reads, parts in seen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "gemma2"])
def test_paired_inputs_are_those_of_either_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gyroquant.calibration.stream._TOKENS", 96)  # batches of four, and a last one of two
    pair = Pair(tiny_models.build(name))
    for gram in pair.first.values():
        assert not gram.input_error_cross.any()  # the first block reads the same embeddings in both
    plain = Stream(pair.runner, pair.ids, pair.outer)
    plain.run(0, pair.tensors(0))
    assert torch.equal(pair.stream.original, plain.hidden)
    second = pair.observe(1)
    x0, x = pair.inputs(pair.tensors(0)), pair.inputs(pair.damaged)
    for reads in {op.entry.reads for op in pair.graph.blocks[1].linears}:
        gram = second[reads, None]
        scale = float(gram.second_moments.diagonal().max())
        assert torch.allclose(gram.second_moments, x[reads].T @ x[reads], atol=1e-5 * scale)
        assert torch.allclose(gram.input_error_cross, (x0[reads] - x[reads]).T @ x[reads], atol=1e-5 * scale)
        assert float(gram.input_error_cross.abs().max()) > 1e-3 * scale


@pytest.mark.parametrize("model", ["stacked", "listed"])
def test_inputs_of_experts_are_not_paired(model: str) -> None:
    pair = Pair(
        tiny_models.build("qwen2_moe", mlp_only_layers=[]) if model == "stacked" else listed_experts.build("qwen3_moe")
    )
    observed = pair.observe(1)
    experts = {key for key in observed if "expert" in key[0]}
    assert len(experts) >= 4
    for key, gram in observed.items():
        assert (gram.input_error_cross is None) == (key in experts), key


def test_the_head_is_paired_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gyroquant.calibration.stream._HEAD_TOKENS", 10)
    pair = Pair(tiny_models.build("llama"))
    pair.observe(1)
    pair.stream.run(1, pair.tensors(1))
    with observing(pair.model, pair.graph.outer, [], pair.stream.observer) as observed:
        pair.stream.observe_head(pair.outer)
    with torch.no_grad():
        norm = pair.model.model.norm
        x0, x = (norm(h).flatten(0, 1) for h in (pair.stream.original, pair.stream.hidden))
    (gram,) = observed.values()
    assert torch.allclose(gram.second_moments, x.T @ x, rtol=1e-3, atol=1e-3)
    assert torch.allclose(gram.input_error_cross, (x0 - x).T @ x, rtol=1e-3, atol=1e-3)


def test_either_model_has_its_own_file(tmp_path: Path) -> None:
    memory, disk = Pair(tiny_models.build("llama")).stream, Pair(tiny_models.build("llama"), tmp_path).stream
    assert torch.equal(memory.hidden, disk.hidden)
    assert torch.equal(memory.original, disk.original)
    assert not torch.equal(disk.hidden, disk.original)
    assert len({state.resolve() if isinstance(state, Path) else state for state in disk.states}) == 2
    assert not list(tmp_path.iterdir())
