"""Checkpoints as people have them: ties as they are stored, names of trainers, parts that the model runs without."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gyroquant.errors import InputError
from gyroquant.models.execution.compare_with_transformers import compare_with_transformers
from gyroquant.models.stores.source import open_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def changed(tmp_path: Path, folders: dict[str, Path]) -> Callable[..., Path]:
    def make(name: str, change: Callable[[Tensors], Tensors | None], **config: object) -> Path:
        folder = Path(shutil.copytree(folders[name], tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        tensors = change(tensors) or tensors
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make


def test_a_stored_head_that_differs_from_the_embedding_is_a_head_of_its_own(changed: Callable[..., Path]) -> None:
    folder = changed("llama_tied", lambda t: t.update({HEAD: t[EMBEDDING] + 1}))
    store = open_model(folder)
    assert dict(store.tied) == {}
    read = store.read([HEAD, EMBEDDING])
    assert torch.equal(read[HEAD], read[EMBEDDING] + 1)
    assert store.config.tie_word_embeddings is False
    assert "differs from model.embed_tokens.weight" in store.notes[0]
    assert compare_with_transformers(store).logit_error < 1e-6


def test_a_stored_head_that_is_the_embedding_stays_tied(changed: Callable[..., Path]) -> None:
    store = open_model(changed("llama_tied", lambda t: t.update({HEAD: t[EMBEDDING].clone()})))
    assert dict(store.tied) == {HEAD: EMBEDDING}
    assert HEAD not in store.shapes
    assert not store.notes


def test_a_tied_model_may_be_stored_under_the_name_of_its_head(changed: Callable[..., Path]) -> None:
    store = open_model(changed("llama_tied", lambda t: t.update({HEAD: t.pop(EMBEDDING)})))
    assert dict(store.tied) == {HEAD: EMBEDDING}
    wanted = tiny_models.build("llama_tied").state_dict()
    assert torch.equal(store.read([EMBEDDING])[EMBEDDING], wanted[EMBEDDING])
    assert compare_with_transformers(store).logit_error < 1e-6


def test_a_head_that_is_neither_stored_nor_tied_is_refused_with_both_remedies(changed: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"lacks lm_head.weight.*set tie_word_embeddings to true"):
        open_model(changed("llama", lambda t: {name: t[name] for name in t if name != HEAD}))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"language_model.{name}",
        lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn._orig_mod."),
    ],
)
def test_names_of_trainers_are_read_without_what_they_put_in_front(
    rename: Callable[[str], str], changed: Callable[..., Path]
) -> None:
    folder = changed("llama", lambda t: {rename(name): value for name, value in t.items()})
    store = open_model(folder)
    wanted = tiny_models.build("llama").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in store.read(store.shapes).items())
    assert "were read without the wrapper" in store.notes[0]
    assert compare_with_transformers(store).error < 1e-6


def test_a_prefix_that_only_some_names_have_is_no_trainers(changed: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"stores module.model.norm.weight"):
        open_model(changed("llama", lambda t: t.update({"module.model.norm.weight": t.pop("model.norm.weight")})))


def test_value_heads_and_layers_that_predict_further_tokens_are_left_out_by_name(changed: Callable[..., Path]) -> None:
    extra = {"v_head.summary.weight": torch.ones(1, 64), "model.layers.2.eh_proj.weight": torch.ones(64, 128)}
    extra["mtp.fc.weight"] = torch.ones(4, 4)
    store = open_model(changed("llama", lambda t: t.update(extra), num_nextn_predict_layers=1))
    assert not set(extra) & set(store.shapes)
    assert any("a value head (v_head.summary.weight" in note for note in store.notes)
    assert any("predict further tokens (model.layers.2.eh_proj.weight" in note for note in store.notes)
    assert compare_with_transformers(store).error < 1e-6


def test_a_classifier_is_refused_for_what_it_is(changed: Callable[..., Path]) -> None:
    def classify(tensors: Tensors) -> None:
        tensors["score.weight"] = torch.ones(2, 64)
        del tensors[HEAD]

    with pytest.raises(InputError, match=r"score.weight.*classifier or a reward model"):
        open_model(changed("llama", classify))


def test_persistent_buffers_belong_to_the_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("apertus", **tiny_models.COMMON)
    model = tiny_models.randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    beta = "model.layers.1.mlp.act_fn.beta"
    model.get_buffer(beta).fill_(0.75)
    model.save_pretrained(tmp_path)
    store = open_model(tmp_path)
    assert float(store.read([beta])[beta]) == 0.75


def test_a_block_runs_and_is_written_with_its_persistent_buffers() -> None:
    model = tiny_models.build("llama")
    block = model.model.layers[1]
    block.register_buffer("layer_scalar", torch.tensor([0.5]))
    forward = type(block).forward
    block.forward = lambda *args, **kwargs: forward(block, *args, **kwargs) * block.layer_scalar
    store = open_model(model)
    assert store.graph.blocks[1].buffers == ("model.layers.1.layer_scalar",)
    assert "model.layers.1.layer_scalar" in store.graph.block_params(1)
    assert compare_with_transformers(store).error < 1e-6
