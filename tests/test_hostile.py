"""Whatever is wrong with what a run is given is named before any work, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import gyroquant as gq
from gyroquant.errors import GyroquantError, InputError, RecipeError
from gyroquant.inspection.model import inspect_model
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.recipes.presets import preset_names
from gyroquant.system.checksums import write_checksums

Break = Callable[[Path], Any]
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
RECIPE = saved_models.recipe({"R1": {"method": "hadamard"}})


@pytest.fixture(autouse=True)
def _no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: object) -> str:
        raise AssertionError(f"asked on the terminal: {words}")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def copy(tmp_path: Path, folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def everything(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.stat().st_size for path in sorted(place.rglob("*"))}


def refused(model: Any, out: Path, message: str, kind: type[GyroquantError] = InputError, **options: Any) -> None:
    """That a run is refused with this message, soon, and leaves its surroundings as they are."""
    before, started = everything(out.parent), time.monotonic()
    with pytest.raises(kind, match=message):
        prepare(model, out, options.pop("recipe", RECIPE), options.pop("text", [tiny_models.prose(3000)]), **options)
    assert everything(out.parent) == before
    assert time.monotonic() - started < 20


def changed(**settings: Any) -> Break:
    """config.json with other settings."""

    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def weights(change: Callable[[bytes], bytes]) -> Break:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def pickled(name: str) -> Break:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / name)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def written(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


NORM, HEAD = "model.norm.weight", "lm_head.weight"
DEEP = "[" * 100_000 + "]" * 100_000
MODELS: dict[str, tuple[Break, str]] = {
    "weights cut": (weights(lambda b: b[:-100]), f"{WEIGHTS} cannot be read.*cut short: fetch it again"),
    "weights cut in the header": (weights(lambda b: b[:40]), f"{WEIGHTS} cannot be read"),
    "weights empty": (weights(lambda b: b""), f"{WEIGHTS} cannot be read.*it is empty"),
    "weights of noise": (weights(lambda b: bytes(range(256)) * 40), f"{WEIGHTS} cannot be read"),
    "a header that is longer than all": (weights(lambda b: b"\xff" * 8 + b[8:]), f"{WEIGHTS} cannot be read"),
    "a bit of the header": (weights(lambda b: b[:9] + b"\x03" + b[10:]), f"{WEIGHTS} cannot be read"),
    "a GGUF file by another name": (weights(lambda b: b"GGUF" + b[4:]), "GGUF file by another name: call it .gguf"),
    "a pickle by another name": (pickled(WEIGHTS), "a pickle of PyTorch, which could run code and is never read"),
    "a pickle alone": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle, which could run code"),
    "weights that are a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        f"{WEIGHTS} is not a file",
    ),
    "whole numbers": (tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.int8)})), f"{HEAD} is stored as I8"),
    "another shape": (tensors(lambda t: t.update({HEAD: t[HEAD][:5]})), r"lm_head.weight has shape \(5, 64\)"),
    "no config": (lambda f: (f / CONFIG).unlink(), r"no config.json"),
    "config of no object": (written(CONFIG, "[]"), "no usable config.json.*a list where a JSON object"),
    "config cut": (written(CONFIG, '{"model_type": "lla'), r"no usable config.json"),
    "config nested deeply": (written(CONFIG, '{"a": ' + DEEP + "}"), "config.json.*nested too deeply"),
    "config of bytes": (written(CONFIG, b"\xff\xfe\x00"), r"no usable config.json"),
    "config of a long number": (written(CONFIG, '{"hidden_size": ' + "9" * 9999 + "}"), r"no usable config.json"),
    "another config": (changed(configuration_files=["config.4.0.0.json"]), "names other files"),
    "an unknown architecture": (changed(model_type="hostile"), r"no usable config.json.*hostile"),
    "an architecture of no text": (changed(model_type="vit"), "has no language model of the type 'vit'"),
    "code for the config": (changed(model_type="own", auto_map={"AutoConfig": "evil.E"}), "code of the model's own"),
    "a billion layers": (changed(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000.*21 tensors"),
    "a billion layers inside": (changed(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers is 1000000000"),
    "layers below none": (changed(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "no layers": (changed(num_hidden_layers=0), "num_hidden_layers is 0"),
    "no width": (changed(hidden_size=0), "hidden_size is 0"),
    "a width of words": (changed(hidden_size="64"), "hidden_size is '64'"),
    "a true width": (changed(hidden_size=True), "hidden_size is True"),
    "a broken width": (changed(hidden_size=64.5), "hidden_size is 64.5"),
    "a width that is not stored": (changed(hidden_size=10**7), "hidden_size is 10000000.*no dimension above 96"),
    "heads that do not divide": (changed(num_attention_heads=7, num_key_value_heads=7), "config"),
    "heads of heads": (changed(num_key_value_heads=3), r"config|shape"),
    "a vocabulary of 10^12": (changed(vocab_size=10**12), "vocab_size is 1000000000000"),
    "padding outside of the vocabulary": (changed(pad_token_id=5000), "describes no model that can be built|config"),
    "no RoPE": (changed(rope_theta=0, rope_parameters={"rope_theta": 0, "rope_type": "default"}), "rope_theta is 0"),
    "RoPE of NaN": (changed(rope_parameters={"rope_theta": float("nan")}), "rope_theta is nan"),
    "RoPE of an unknown kind": (changed(rope_parameters={"rope_theta": 1e4, "rope_type": "x"}), "config"),
    "an infinite epsilon": (changed(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "positions in words": (changed(max_position_embeddings="many"), "max_position_embeddings is 'many'"),
    "an unknown activation": (changed(hidden_act="boom"), "describes no model that can be built"),
    "quantized by a word": (changed(quantization_config="gptq"), r"already quantized \(gptq\)"),
    "quantized by us, undescribed": (changed(quantization_config={"quant_method": "gyroquant"}), "format version None"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "no usable tokenizer"),
    "a damaged tokenizer": (written("tokenizer.json", '{"model": '), "no usable tokenizer"),
    "a tokenizer of nothing": (written("tokenizer.json", "{}"), "no usable tokenizer"),
    "settings of generation cut": (written("generation_config.json", "{"), "generation_config.json cannot be read"),
    "settings of generation of a wrong type": (
        written("generation_config.json", '{"num_beams": "many", "temperature": [1]}'),
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_damaged_models_are_refused(name: str, copy: Path, tmp_path: Path) -> None:
    broken, message = MODELS[name]
    broken(copy)
    refused(copy, tmp_path / "out", message)


def index(places: Any) -> Break:
    """An index of two shards that hold half of the tensors each, with this mapping, or changed by a function."""

    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        halves = [dict(list(found.items())[::2]), dict(list(found.items())[1::2])]
        names = ["a.safetensors", "b.safetensors"]
        for name, half in zip(names, halves, strict=True):
            save_file(half, folder / name, metadata={"format": "pt"})
        mapping = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        given = places(folder, mapping) if callable(places) else places
        content = given if isinstance(given, str) else json.dumps({"weight_map": given})
        (folder / INDEX).write_text(content)

    return change


def _twice(folder: Path, mapping: dict[str, str]) -> dict[str, str]:
    one, other = load_file(folder / "a.safetensors"), load_file(folder / "b.safetensors")
    save_file(other | {next(iter(one)): next(iter(one.values()))}, folder / "b.safetensors", metadata={"format": "pt"})
    return mapping


def _elsewhere(folder: Path, mapping: dict[str, str]) -> dict[str, str]:
    return mapping | {next(iter(mapping)): "b.safetensors"}


def _gone(folder: Path, mapping: dict[str, str]) -> dict[str, str]:
    (folder / "b.safetensors").unlink()
    return mapping


INDICES: dict[str, tuple[Any, str]] = {
    "a shard that is missing": (_gone, "names b.safetensors, which is missing: fetch it"),
    "a tensor in another shard": (_elsewhere, "lies in b.safetensors, which does not hold it"),
    "a tensor in two shards": (_twice, "is in .*a.safetensors and in .*b.safetensors"),
    "a shard that is not in it": (
        lambda _, mapping: {key: name for key, name in mapping.items() if name != "b.safetensors"},
        "lacks .* fetch the shard that holds",
    ),
    "a path out of the folder": ({NORM: "../../x.safetensors"}, "lies outside the model's folder"),
    "an absolute path": ({NORM: "/etc/passwd"}, "lies outside the model's folder"),
    "the folder above": ({NORM: ".."}, "only safetensors and GGUF files are read"),
    "no name": ({NORM: ""}, "only safetensors and GGUF files are read"),
    "a name with a zero": ({NORM: "a\0.safetensors"}, "which is missing"),
    "a pickle": ({NORM: "pytorch_model.bin"}, "only safetensors and GGUF files are read"),
    "a number for a name": ({NORM: 5}, "not a valid index"),
    "no object": ("[]", "a list where a JSON object is expected"),
    "no mapping": ('{"weight_map": [1]}', "not a valid index"),
    "nothing": ("", "cannot be read as JSON"),
    "nested deeply": (DEEP, "nested too deeply"),
    "too long": ('{"a": "' + "x" * (1 << 25) + '"}', "more than the [0-9]+ that are allowed"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_lie_are_refused(name: str, copy: Path, tmp_path: Path) -> None:
    places, message = INDICES[name]
    index(places)(copy)
    refused(copy, tmp_path / "out", message)


def test_links_to_weights_and_code_that_is_not_needed_are_no_matter(copy: Path, tmp_path: Path) -> None:
    (copy / WEIGHTS).rename(tmp_path / "blob")
    (copy / WEIGHTS).symlink_to(tmp_path / "blob")
    evil = "raise SystemExit('run')"
    (copy / "evil.py").write_text(evil)
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(evil)
    changed(auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.M"})(copy)
    job = prepare(copy, tmp_path / "out", RECIPE, [tiny_models.prose(3000)])
    pipeline.run(job)
    assert gq.load(tmp_path / "out")(tiny_models.tokens(job.store.skeleton())).logits.isfinite().all()


@pytest.mark.parametrize("listed", [["evil.T", None], {"AutoTokenizer": ["evil.T", None]}])
def test_code_of_a_tokenizer_is_never_run(listed: Any, copy: Path, tmp_path: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('run')")
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "Own", "auto_map": listed}))
    refused(copy, tmp_path / "out", "auto_map.*, which is never run|no usable tokenizer")


def test_no_call_lets_transformers_run_code_of_a_folder() -> None:
    source = Path(gq.__file__).parent
    for path in source.rglob("*.py"):
        if "runners" in path.parts:  # in environments of other programs
            continue
        text = path.read_text()
        assert not re.search(r"trust_remote_code\W+True", text), path
        for call in re.findall(r"(?<!`)Auto\w+\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)", text):
            if '"FOLDER"' in call:  # the example in a model card
                continue
            assert "trust_remote_code" in call or "**safe" in call or "**options" in call, (path, call)


def test_pickles_are_not_loaded_either(copy: Path) -> None:
    pickled("pytorch_model.bin")(copy)
    with pytest.raises(InputError, match="pickle"):
        gq.load(copy)


TEXTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "corpus.txt is empty"),
    "noise": (lambda f: f.write_bytes(torch.randint(256, (9999,), dtype=torch.uint8).numpy().tobytes()), "not UTF-8"),
    "a zip": (lambda f: f.write_bytes(b"PK\x03\x04" + b"\0" * 100), "zero bytes, so it is not text"),
    "no UTF-8": (lambda f: f.write_bytes("grün".encode("latin-1")), "corpus.txt is not UTF-8 text"),
    "short": (lambda f: f.write_text("w1 w2 w3"), "corpus.txt has 3 tokens, fewer than one window of 32"),
    "a folder": (lambda f: f.mkdir(), "corpus.txt is a folder; give a text file"),
    "missing": (lambda f: None, "there is no text file"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_none_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    make, message = TEXTS[name]
    make(tmp_path / "corpus.txt")
    refused(folders["llama"], tmp_path / "out", message, text=tmp_path / "corpus.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a very long text " * 1000, "there is no text file 'a very long"),
        ([], "0 strings is empty"),
        (["w1", 5], "one entry of the list is neither a string nor a row"),
        (["w1 \ud800"], "lone surrogates"),
        ("bad\0name", "there is no text file"),
    ],
)
def test_texts_from_python_that_are_none_are_refused(
    text: Any, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    refused(folders["llama"], tmp_path / "out", message, text=text)


def test_a_tokenizer_needs_no_special_tokens_but_the_models_words(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def words(count: int) -> PreTrainedTokenizerFast:
        raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=raw)

    job = prepare(folders["llama"], tmp_path / "out", RECIPE, [tiny_models.prose(3000)], tokenizer=words(93))
    assert job.tokens is not None
    far = [" ".join(f"w{i}" for i in range(200)) * 3]
    refused(folders["llama"], tmp_path / "out", "token 199, but the model has only 96", text=far, tokenizer=words(200))


def test_places_that_would_delete_what_is_read_are_refused(copy: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts" / "corpus.txt"
    text.parent.mkdir()
    text.write_text(tiny_models.prose(3000))
    out = tmp_path / "link"
    out.symlink_to(copy)
    for place, message in (
        (copy, "model holds .*model, which replacing it would delete"),
        (copy / ".." / "model", "which replacing it would delete"),
        (tmp_path, "model, which replacing it would delete"),
        (text.parent, "corpus.txt, which replacing it would delete"),
        (out, "is a symbolic link"),
        (copy / "out", "lies in the folder of the model"),
        (Path("/"), "which replacing it would delete"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (copy / CONFIG / "out", "not a writable folder"),
    ):
        before = everything(tmp_path)
        with pytest.raises(InputError, match=message):
            prepare(copy, place, RECIPE, text, overwrite=True)
        assert everything(tmp_path) == before
    saved = saved_models.rounded(copy, tmp_path / "saved")
    for place in (saved.folder, tmp_path):
        with pytest.raises(InputError, match="which replacing it would delete"):
            gq.export(saved.folder, "dense", place, overwrite=True)


@torch.no_grad()
def _dead(model: Any) -> None:
    """Channels that are always zero, before and behind a norm, and layers with empty columns and rows."""
    layer = model.model.layers[0]
    model.model.embed_tokens.weight[:, 5] = 0
    layer.self_attn.o_proj.weight[5] = layer.mlp.down_proj.weight[5] = 0
    layer.input_layernorm.weight.zero_()
    layer.post_attention_layernorm.weight[:7] = 0
    layer.mlp.up_proj.weight[:, 3] = layer.mlp.gate_proj.weight[4] = 0
    layer.self_attn.v_proj.weight.zero_()


_QUICK = {
    "optrot": ["learn.steps=2"],
    "ostquant": ["learn.steps=2"],
    "gyro-w3": ["finish.held_out=1", "finish.steps=2"],
    "signround": ["weights.tune.iters=2"],
}
_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("duquant", "gyro-w3", "ostquant", "signround")]


@pytest.mark.parametrize(
    "recipe", ["gptq", "gptaq", "qronos", "smoothquant", "awq", "perq", "bbt-spectral", "optrot", *_SLOW]
)
def test_channels_without_variance_give_numbers(recipe: str, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    _dead(model)
    changes = ["calibration.nsamples=4", "calibration.seqlen=32", "proof.seqlen=32", "weights.group_size=16"]
    loaded = gq.load_recipe(recipe, [*changes, *_QUICK.get(recipe, [])])
    pipeline.run(prepare(model, tmp_path / "out", loaded, [tiny_models.prose(3000)], tokenizer=tiny_models.tokenizer()))
    assert gq.load(tmp_path / "out", dtype="float32")(tiny_models.tokens(model)).logits.isfinite().all()


PRIME = {"hidden_size": 59, "intermediate_size": 97, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize("recipe", preset_names())
def test_widths_that_nothing_divides_are_refused_or_right(recipe: str, tmp_path: Path) -> None:
    model = tiny_models.build("llama", **PRIME)
    changes = ["calibration.nsamples=4", "calibration.seqlen=32", "proof.seqlen=32", "weights.group_size=16"]
    text, words = [tiny_models.prose(3000)], tiny_models.tokenizer()
    with pytest.raises(GyroquantError, match=r"59|97|not installed|pip install|leave group_size out"):
        prepare(model, tmp_path / "out", gq.load_recipe(recipe, changes), text, tokenizer=words)
    try:  # one group a row is possible, maps that need another order are not
        row = gq.load_recipe(recipe, [*changes[:-1], "weights.group_size=-1"])
        prepare(model, tmp_path / "out", row, text, tokenizer=words)
        reason = ""
    except GyroquantError as error:
        reason = str(error)
    assert re.search(r"^$|59|97|order|block|pip install|leave group_size out", reason), reason
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("in_memory", [True, False])
def test_weights_that_are_no_numbers_are_named(value: float, in_memory: bool, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    source = model if in_memory else tmp_path / "model"
    before = everything(tmp_path)
    job = prepare(source, tmp_path / "out", saved_models.recipe(), None, tokenizer=tiny_models.tokenizer())
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        pipeline.run(job)
    assert everything(tmp_path) == before


def test_devices_and_dtypes_and_folders_that_are_not_there(copy: Path, tmp_path: Path) -> None:
    refused(copy, tmp_path / "out", "the device 'banana' cannot be used", device="banana")
    refused(copy, tmp_path / "out", "the device 'cuda:99' cannot be used", device="cuda:99")
    refused(copy, tmp_path / "out", "not a writable folder", offload=copy / CONFIG / "x")
    refused(copy, tmp_path / "out", "dtype 'int3' is not supported for saving", save_dtype="int3")
    with pytest.raises(InputError, match="dtype 'int3' is not supported for evaluation; use float32, "):
        gq.evaluate(copy, ["w1"], dtype="int3")
    with pytest.raises(InputError, match="a window of -5 tokens"):
        gq.evaluate(copy, ["w1"], window=-5)


def test_a_line_of_a_megabyte_is_soon_looked_at(folders: dict[str, Path], tmp_path: Path) -> None:
    refused(folders["llama"], tmp_path / "out", "1 tokens, fewer than one window", text=["w1" * 500_000])


def test_a_width_that_nothing_divides_is_rounded_row_by_row(tmp_path: Path) -> None:
    model, recipe = tiny_models.build("llama", **PRIME), saved_models.recipe(group_size=-1, solver="gptq")
    pipeline.run(prepare(model, tmp_path / "out", recipe, [tiny_models.prose(3000)], tokenizer=tiny_models.tokenizer()))
    assert gq.load(tmp_path / "out", dtype="float32")(tiny_models.tokens(model)).logits.isfinite().all()


def test_settings_that_could_not_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.config.num_attention_heads = 7  # 64 is no multiple of it
    refused(
        model,
        tmp_path / "out",
        "configuration contradicts itself.*multiple",
        text=None,
        tokenizer=tiny_models.tokenizer(),
    )


SETTINGS = {
    "weights.bits=0": "weights.bits",
    "weights.bits=17": "weights.bits",
    "weights.bits=-1": "weights.bits",
    "weights.bits=.nan": "weights.bits is nan",
    "weights.bits=1e400": "weights.bits",
    "weights.group_size=0": "group_size is -1",
    "weights.group_size=1.0e+400": "weights.group_size is inf",
    "weights.bits=!!python/object/apply:os.system [x]": "not valid YAML",
    "weights.bits=!!timestamp x": "not valid YAML",
    "weights.bits=2024-99-99": "not valid YAML",
    "weights.bits=" + "9" * 9999: "not valid YAML",
    "weights.bits=" + "9" * 99: "larger than any setting",
    "weights.bits=&a [*a]": "anchors or aliases",
    "weights.bits={a: 1, a: 2}": "for the second time",
    "weights.bits=" + DEEP: "larger than any recipe",
    "weights.bits=" + "[" * 500: "nested more than 32 deep",
    "weights={1: 2}": "keys are words",
    "calibration.nsamples=1000000000000": "not for 1000000000000",
    "calibration.seqlen=0": "calibration.seqlen",
    "calibration.seqlen=1000000000000": "longer than the 128 positions",
    "calibration.nsamples=-5": "calibration.nsamples",
    "proof.threshold=.inf": "proof.threshold is inf",
    "proof.threshold=.nan": "proof.threshold is nan",
    "seed=-1": "seed",
    "seed=99999999999": "seed",
    "learn.steps=-1": "learn.steps",
    "learn.steps=1000000000000": "learn.steps",
    "transform.R1.block=1000000000000": "R1|block",
    "transform.R1=[[[]]]": "transform.R1",
    "weights.solver.damp_percent=1.0e+308": "damp_percent",
    "weights.overrides=[5]": "weights.overrides.0",
    "weights.ignore=[5]": "weights.ignore",
    "efforts=5": "efforts",
}


@pytest.mark.parametrize("change", SETTINGS, ids=lambda change: change[:40])
def test_settings_that_no_recipe_can_have_are_refused(change: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GyroquantError, match=SETTINGS[change]):
        recipe = gq.load_recipe(
            "gsr", ["calibration.nsamples=4", "calibration.seqlen=32", "weights.group_size=16", change]
        )
        prepare(folders["llama"], tmp_path / "out", recipe, [tiny_models.prose(3000)])
    assert not list(tmp_path.iterdir())


def test_recipes_from_python_are_held_to_the_same() -> None:
    endless: dict[str, Any] = {"weights": {}}
    endless["weights"]["again"] = endless
    wide: list[Any] = [0] * 10
    for _ in range(9):
        wide = [wide] * 10
    for data in (endless, {"weights": wide}, {"weights": {"bits": float("nan")}}, {"weights": {"bits": torch.ones(2)}}):
        with pytest.raises(RecipeError):
            gq.load_recipe(data)


def test_recipe_files_are_held_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    for content, message in {
        laughs: "anchors or aliases",
        "weights: {bits: 2}\nweights: {bits: 4}\n": "line 2 has the key 'weights' for the second time",
        "weights: !!python/object/apply:os.system ['true']\n": "not valid YAML",
        "[" * 100_000: "nested more than 32 deep",
        "x" * 10**6: "larger than any recipe",
        "? [a, b]\n: c\n": "not valid YAML|keys are words",
        "": "does not hold a mapping",
        "\0": "not valid YAML",
    }.items():
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            gq.load_recipe(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:
    """A folder as gyroquant writes it, with maps and rounding that run with the model."""
    out = tmp_path_factory.mktemp("saved") / "out"
    changes = ["calibration.nsamples=4", "calibration.seqlen=32", "proof.seqlen=32", "weights.group_size=16"]
    recipe = gq.load_recipe("quarot-w4a4kv4", changes)
    pipeline.run(prepare(folders["llama"], out, recipe, [tiny_models.prose(3000)]))
    return out


def described(change: Callable[[dict[str, Any]], Any]) -> Break:
    """config.json with another description of what is stored."""

    def rewrite(folder: Path) -> None:
        path = folder / CONFIG
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return rewrite


def _nested(description: dict[str, Any]) -> None:
    for _ in range(100):
        description["maps"][0] = {"kind": "product", "parts": [description["maps"][0]]}


UP = "model.layers.0.mlp.up_proj.weight"


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    return tensors(lambda found: found.update({f"{UP}_{name}": change(found[f"{UP}_{name}"]).contiguous()}))


SAVED: dict[str, tuple[Break, str]] = {
    "no grids": (described(lambda d: d.pop("grids")), "quantization_config.grids is damaged"),
    "tensors of a list": (described(lambda d: d.update(tensors=[])), "quantization_config.tensors is damaged"),
    "no such grid": (described(lambda d: d["tensors"][UP].update(grid=7)), "has grid 7, and there are"),
    "a grid below none": (described(lambda d: d["tensors"][UP].update(grid=-1)), f"tensors.{UP}.grid is damaged"),
    "an unknown grid": (described(lambda d: d["grids"][0].update(grid="x")), "there is no grid 'x'"),
    "a grid of lists": (described(lambda d: d["grids"][0].update(grid=[])), r"there is no grid \[\]"),
    "a grid of 99 bits": (described(lambda d: d["grids"][0].update(bits=99)), "cannot have bits"),
    "other bits": (described(lambda d: d["grids"][0].update(bits=3)), "cannot hold"),
    "another group": (described(lambda d: d["grids"][0].update(group_size=32)), "of shape"),
    "a group that does not divide": (described(lambda d: d["grids"][0].update(group_size=17)), "does not divide"),
    "a basis of 10^12": (described(lambda d: d["tensors"][UP].update(basis={"order": 10**12})), "order is damaged"),
    "a basis of 2^20": (described(lambda d: d["tensors"][UP].update(basis={"order": 1 << 20})), "not stored as"),
    "no parameter of that name": (described(lambda d: d["tensors"].update(x={"grid": 0})), "codes or scales of x"),
    "a version of tomorrow": (described(lambda d: d.update(format_version=9)), "format version 9"),
    "a version of a list": (described(lambda d: d.update(format_version=[1])), "format version"),
    "no such map": (described(lambda d: d["online"][0].update(map=99)), "has map 99"),
    "an unknown map": (described(lambda d: d["maps"].__setitem__(0, {"kind": "x"})), "there is no map 'x'"),
    "a map of a list": (described(lambda d: d["maps"].__setitem__(0, {"kind": []})), r"there is no map \[\]"),
    "a map without order": (described(lambda d: d["maps"].__setitem__(0, {"kind": "hadamard"})), "hadamard.n of a"),
    "a map of 10^12": (described(lambda d: d["maps"].__setitem__(0, {"kind": "hadamard", "n": 10**12})), "range"),
    "a map of another order": (described(lambda d: d["maps"].__setitem__(0, {"kind": "hadamard", "n": 8})), "order 8"),
    "a map without array": (
        described(lambda d: d["maps"].__setitem__(0, {"kind": "dense", "matrix": {"array": "gyroquant_map.9"}})),
        "gyroquant_map.9.*is missing",
    ),
    "a map of many": (
        described(
            lambda d: d["maps"].__setitem__(
                0, {"kind": "across", "inner": 1 << 20, "map": {"kind": "hadamard", "n": 1 << 20}}
            )
        ),
        "order 1099511627776",
    ),
    "a map of maps of maps": (described(_nested), "nested more than 16 deep"),
    "a place that is none": (
        described(lambda d: d["online"][0].update(module="nowhere")),
        "which the model lacks",
    ),
    "a point that is none": (described(lambda d: d["online"][0].update(point="beside")), "online.0.point is damaged"),
    "a lost mean": (
        described(lambda d: d["cache"][0].update(key_mean="lost")),
        "'lost' of a rounded KV cache",
    ),
    "codes of another type": (part("codes", lambda t: t.float()), "uint8"),
    "codes cut": (part("codes", lambda t: t[:-3]), "cannot hold"),
    "scales of another shape": (part("scales", lambda t: t[:, :1]), "scales of shape"),
    "scales of NaN": (part("scales", lambda t: t * torch.nan), "not finite"),
    "no zero points": (tensors(lambda t: t.pop(f"{UP}_zeros", None) is None and t.pop(f"{UP}_scales")), "missing"),
    "an unknown type": (part("scales", lambda t: t.to(torch.float8_e4m3fn)), "stored as F8_E4M3"),
}


@pytest.mark.parametrize("name", SAVED)
def test_damaged_results_are_refused(name: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    broken, message = SAVED[name]
    broken(folder)
    write_checksums(folder)  # as one would who wants to be believed
    with pytest.raises(GyroquantError, match=message):
        store = open_model(folder)
        _ = store.online
        store.read([UP])
    with pytest.raises(GyroquantError, match=message):
        gq.load(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"layers": 5}', '{"layers": [5]}', '{"layers": [{"name": 1, "rate_distortion": {}}]}', DEEP]
)
def test_damaged_manifests_are_refused(content: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "gyroquant.json").write_text(content)
    with pytest.raises(InputError, match=r"gyroquant\.json"):
        inspect_model(folder)
    (folder / "gyroquant_export.json").write_text(content)
    with pytest.raises(InputError, match=r"not an export of gyroquant"):
        gq.verify_export(folder, saved)
