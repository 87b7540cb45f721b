"""Weights come back from folders and GGUF files exactly as transformers loads them; damage is named."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from gguf_reading import write_gguf
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.models.stores.base import CheckpointStore, load_tokenizer
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_a_folder_gives_what_transformers_loads(name: str, folders: dict[str, Path]) -> None:
    store = open_model(folders[name])
    wanted = dict(tiny_models.build(name).named_parameters())
    assert set(store.shapes) == set(wanted)
    for key, tensor in store.read(store.shapes).items():
        assert torch.equal(tensor, wanted[key]), key


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    store = open_model(tmp_path)
    read = store.read(["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(read["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    tiny_models.build("llama").bfloat16().save_pretrained(tmp_path)
    store = open_model(tmp_path)
    assert store.dtype == torch.bfloat16
    assert store.bits_per_weight() == 16
    assert store.read(["model.norm.weight"])["model.norm.weight"].dtype == torch.bfloat16


@pytest.fixture
def copy(tmp_path: Path, folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def rewrite(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_and_unexpected_tensors_are_named(copy: Path) -> None:
    rewrite(copy, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(InputError, match=r"lacks model.layers.1.self_attn.q_proj.weight"):
        open_model(copy)
    rewrite(copy, lambda t: t.update({"vision.tower": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"stores vision.tower"):
        open_model(copy)


def test_nan_and_wrong_shapes_are_named(copy: Path) -> None:
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    for value in (torch.nan, torch.inf):
        rewrite(copy, lambda tensors, value=value: tensors[up][3].fill_(value))
        with pytest.raises(InputError, match=r"up_proj.weight holds values that are not finite"):
            open_model(copy).read([up])
    rewrite(copy, lambda tensors: tensors.update({down: torch.zeros(64, 95)}))
    with pytest.raises(InputError, match=r"has shape \(64, 95\), but config.json makes it \(64, 96\)"):
        open_model(copy)


def test_truncated_weights_are_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        open_model(copy)


def test_only_safetensors_are_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        open_model(copy)


def test_an_index_may_not_leave_its_folder(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lies outside"):
        open_model(copy)
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list where a JSON object is expected"):
        open_model(copy)


@pytest.mark.parametrize("what", ["/nowhere/at/all", "./nothing", "no-such-model"])
def test_a_model_that_is_not_there(what: str) -> None:
    with pytest.raises(InputError, match="there is no model at"):
        open_model(what)


def test_a_hub_name_without_network_says_so() -> None:
    with pytest.raises(InputError, match="neither a folder here nor can it be fetched"):
        open_model("nobody/no-such-model")


def test_files_and_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json"):
        open_model(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(InputError, match=r"not a \.gguf"):
        open_model(tmp_path / "x.bin")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"no usable config.json"):
        open_model(tmp_path)


def test_models_quantized_in_forms_that_are_not_decoded_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "aqlm"}}))
    with pytest.raises(InputError, match=r"already quantized \(aqlm\), a form that is not decoded"):
        open_model(copy)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_gguf_file_gives_what_transformers_loads(tmp_path: Path, kind: str) -> None:
    original = write_gguf(tmp_path / "tiny.gguf", kind)
    store = open_model(tmp_path / "tiny.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    wanted = dict(loaded.named_parameters())
    for name, tensor in store.read(store.shapes).items():
        assert torch.equal(tensor, wanted[name]), name
        if kind == "F32":
            assert torch.equal(tensor, original.get_parameter(name)), name
    assert store.bits_per_weight() < {"F32": 32.1, "F16": 18, "Q8_0": 10}[kind]
    assert open_model(tmp_path).label.endswith("tiny.gguf")  # a folder with nothing but one GGUF file


def test_damaged_gguf_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    with pytest.raises(InputError, match=r"cut short|cannot be read"):
        open_model(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(InputError, match="cannot be read as a GGUF"):
        open_model(path)


def test_a_store_reads_only_what_it_is_asked_for(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(folders["qwen3_moe"])
    read: list[str] = []
    from gyroquant.models.stores.safetensors_files import LazyTensor

    original = LazyTensor.__getitem__
    monkeypatch.setattr(LazyTensor, "__getitem__", lambda self, _: read.append(self.key) or original(self, _))
    store.read(store.graph.block_params(1))
    assert read
    assert all(key.startswith("model.layers.1.") for key in read)


@pytest.mark.parametrize("written", ["LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "TokenizersBackend"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_tokenizer_file_gives_its_tokens_whatever_class_is_written(
    written: str, model_type: str, tmp_path: Path
) -> None:
    """transformers builds some classes anew, with a way of their own to cut words and to normalize."""
    text = "Hello  12345 world's DON'T\n\n\n x=1;\te\u0301 99  a" * 3
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\n+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))
    raw.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": written}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found = load_tokenizer(tmp_path, "it")
    assert found(text)["input_ids"] == raw.encode(text).ids
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    found.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json")).encode(text).ids == raw.encode(text).ids


GENERATION = [
    {"temperature": 0.6, "top_p": 0.9},
    {"do_sample": False, "temperature": 0.0},
    {"do_sample": True, "temperature": 0.7, "max_length": 4096},
]


@pytest.mark.parametrize("more", GENERATION)
def test_settings_of_generation_are_carried_over_as_they_are(
    more: dict[str, object], folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers refuses to write some of them, which is no reason to lose a quantization at its end."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folders["llama"], model)
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    pipeline.run(prepare(model, out, gq.load_recipe("rtn", ["weights.group_size=16"])))
    assert (out / path.name).read_bytes() == path.read_bytes()
    gq.export(out, "dense", tmp_path / "export", check=False)
    assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes()
    gq.load(out)


@pytest.mark.parametrize("more", GENERATION)
def test_settings_of_generation_in_memory_are_carried_over_as_they_are(more: dict[str, object], tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.generation_config.update(**more)
    recipe = gq.load_recipe("rtn", ["weights.group_size=16"])
    pipeline.run(prepare(model, tmp_path / "out", recipe, tokenizer=tiny_models.tokenizer()))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    kept = {key: value for key, value in more.items() if value}  # what is as by default need not be there
    assert kept.items() <= written.items()
