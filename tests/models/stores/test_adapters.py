"""Adapters are merged into their base where both are at hand, and refused, with what to do, where they are not."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.models.stores.source import open_model


@pytest.fixture
def base(tmp_path: Path, folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(folders["llama"], tmp_path / "base"))


@pytest.fixture
def adapted(base: Path) -> peft.PeftModel:
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_models.build("llama"), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    return model


@pytest.fixture
def adapter(adapted: peft.PeftModel, tmp_path: Path) -> Path:
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def same(store: object, adapted: peft.PeftModel) -> bool:
    ids = tiny_models.tokens(tiny_models.build("llama"))
    with torch.no_grad():
        return torch.allclose(store.model(ids).logits, adapted(ids).logits, atol=1e-4)  # type: ignore[attr-defined]


def test_an_adapter_whose_base_is_here_is_merged(adapter: Path, base: Path, adapted: peft.PeftModel) -> None:
    store = open_model(adapter)
    assert same(store, adapted)
    assert store.notes == (f"the adapter in {adapter} was merged into its base, {base}",)
    assert store.tokenizer() is not None  # the base's: the adapter has none


def test_an_adapter_beside_its_base_is_merged(adapter: Path, base: Path, adapted: peft.PeftModel) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base)
    assert same(open_model(base), adapted)


def test_an_adapter_without_its_base_is_refused(adapter: Path, base: Path) -> None:
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"its base .* is not here: put the base into a folder"):
        open_model(adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base"):
        open_model(adapter)


def test_an_adapter_without_its_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        open_model(adapter)


def test_without_peft_the_extra_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'gyroquant\[peft\]'"):
        open_model(adapter)


def test_a_model_that_peft_wraps_is_merged_as_a_copy(adapted: peft.PeftModel) -> None:
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    assert same(open_model(adapted), adapted)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_folding_a_model_that_peft_wraps_says_how_to_merge_it(adapted: peft.PeftModel, adapter: Path) -> None:
    with pytest.raises(InputError, match=r"model = model\.merge_and_unload\(\)"):
        gq.transform(adapted, "quarot")
    model = tiny_models.build("llama")
    model.load_adapter(str(adapter))
    for call in (lambda: gq.transform(model, "quarot"), lambda: open_model(model)):
        with pytest.raises(InputError, match="an adapter that load_adapter put on it"):
            call()


def test_anything_else_in_memory_is_named() -> None:
    with pytest.raises(InputError, match=r"torch\.nn\..*Linear is not a transformers model"):
        open_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
