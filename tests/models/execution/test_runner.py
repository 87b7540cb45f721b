"""A model run in pieces gives the logits of the model run whole, bit for bit."""

import pytest
import tiny_models
import torch

from gyroquant.models.execution.runner import BlockRunner, build_skeleton
from gyroquant.models.stores.source import open_model


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_pieces_equal_the_whole(name: str) -> None:
    model = tiny_models.build(name)
    ids = tiny_models.tokens(model)
    store = open_model(model)
    graph = store.graph
    runner = BlockRunner(build_skeleton(model.config), graph)
    outer = store.read(graph.outer_params())
    hidden, calls = runner.begin(ids, outer)
    for i, call in enumerate(calls):
        hidden = runner.run(i, store.read(graph.block_params(i)), hidden, call)
    with torch.no_grad():
        assert torch.equal(runner.finish(hidden, outer), model(ids).logits)


def test_a_skeleton_has_buffers_but_no_weights() -> None:
    skeleton = build_skeleton(tiny_models.CONFIGS["gemma3"]())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    real = tiny_models.build("gemma3")
    for name, buffer in real.named_buffers():
        assert torch.equal(buffer, skeleton.get_buffer(name)), name
