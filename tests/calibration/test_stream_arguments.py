"""Arguments of blocks that depend on the tokens, and blocks that return more than their hidden states."""

from __future__ import annotations

import pytest
import torch

from gyroquant.calibration.arguments import varying
from gyroquant.calibration.stream import Stream
from gyroquant.errors import UnsupportedModelError
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.base import ModuleStore


@pytest.mark.parametrize(
    "model_type", ["gemma4_text", "gemma3n_text", "deepseek_v4", "glm_moe_dsa", "bamba", "openai-gpt"]
)
def test_every_batch_has_its_own_arguments(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma gives blocks an embedding of each token, DeepSeek V4 the tokens; the others return tuples or lists.

    Gemma 3n and DeepSeek V4 have four residual streams.
    """
    monkeypatch.setattr("gyroquant.calibration.stream._TOKENS", 24)  # one sequence in a batch
    model = tiny_model(default_config(model_type))
    store, ids = ModuleStore(model), tiny_tokens(model, batch=3)
    stream = Stream(BlockRunner.of(store), ids, outer := store.read(store.graph.outer_params()))
    stream.run_all(store)
    logits = torch.stack([part for _, _, part in stream.logits(outer)])
    expected = model(input_ids=ids, use_cache=False).logits.detach()
    assert float((logits - expected).norm() / expected.norm()) < 1e-5


def test_chosen_sequences_have_their_own_arguments() -> None:
    model = tiny_model(default_config("gemma4_text"))
    store, ids = ModuleStore(model), tiny_tokens(model, batch=4)
    stream = Stream(BlockRunner.of(store), ids, store.read(store.graph.outer_params()))
    tensors = store.read(store.graph.block_params(0))
    assert stream.hidden is not None
    before = stream.hidden.clone()
    stream.run(0, tensors)
    one = stream.few(0, tensors, before[2:3], [2])
    assert torch.allclose(one[0], stream.hidden[2], atol=1e-5)
    other = stream.few(0, tensors, before[2:3], [1])
    assert not torch.allclose(other[0], stream.hidden[2], atol=1e-2)


def test_a_model_that_adds_positions_is_refused() -> None:
    """CPM-Ant puts 32 positions of a prompt before the text."""
    model = tiny_model(default_config("cpmant"))
    store, ids = ModuleStore(model), tiny_tokens(model)
    with pytest.raises(UnsupportedModelError, match="on 56 positions for 24 tokens"):
        Stream(BlockRunner.of(store), ids, store.read(store.graph.outer_params()))


def test_an_argument_that_cannot_be_kept_is_refused() -> None:
    first, second = torch.zeros(2), torch.ones(2)
    assert varying(((first,), {"a": first, "b": 1}), ((first,), {"a": second, "b": 1})).keys() == {"a"}
    with pytest.raises(UnsupportedModelError, match="argument a"):
        varying(((), {"a": (first,)}), ((), {"a": (second,)}))
