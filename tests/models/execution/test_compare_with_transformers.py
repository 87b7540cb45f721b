"""A model is held against transformers before anything else, block by block, and the first difference is named."""

from pathlib import Path

import pytest
import tiny_models
import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.execution.compare_with_transformers import compare_with_transformers
from gyroquant.models.stores.base import CheckpointStore, ModuleStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.transform import transform


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_architecture_is_read_as_transformers_reads_it(name: str, folders: dict[str, Path]) -> None:
    found = compare_with_transformers(open_model(folders[name]))
    assert found.tokens > 0
    assert max(found.error, found.logit_error) < 1e-6


@pytest.mark.parametrize(
    ("param", "place"), [("model.layers.1.mlp.up_proj.weight", "block 1"), ("lm_head", "the head")]
)
def test_the_first_block_that_is_read_otherwise_is_named(
    param: str, place: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = open_model(folders["llama"]), CheckpointStore.read

    def wrong(self: CheckpointStore, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: value * 1.01 if name.startswith(param) else value for name, value in read(self, names).items()}

    monkeypatch.setattr(CheckpointStore, "read", wrong)
    with pytest.raises(UnsupportedModelError, match=f"first difference is in .*{place}"):
        compare_with_transformers(store)


def test_a_model_in_memory_that_does_not_run_its_blocks_alike_is_refused_untouched() -> None:
    model = tiny_models.build("llama")
    assert compare_with_transformers(ModuleStore(model)).error == 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    block, calls = model.model.layers[1], []
    forward = block.forward

    def changing(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return forward(*args, **kwargs) * (1.2 if len(calls) == 1 else 1.0)

    block.forward = changing
    with pytest.raises(UnsupportedModelError, match="the first difference is in block 1"):
        transform(model, "quarot", torch.randint(3, 90, (2, 24)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_token_with_a_meaning_of_its_own_is_used() -> None:
    model = tiny_models.build("llama")
    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    compare_with_transformers(ModuleStore(model))
    assert not {0, 1, 2} & set(seen[0].flatten().tolist())
