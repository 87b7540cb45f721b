"""The model card of every folder: metadata for the hub, true numbers, and no paths of this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import yaml
from gguf_reading import write_gguf
from huggingface_hub import ModelCard
from tiny_runs import run

import gyroquant as gq
from gyroquant.formats.base import Format
from gyroquant.formats.export import export
from gyroquant.formats.model_card import metadata_of
from gyroquant.models.stores.source import open_model
from gyroquant.system.checksums import check, read_sums

README = """---
license: other
license_name: tiny-license
license_link: https://example.org/license
language:
- en
- de
base_model: someone/parent
tags:
- not-carried
---
# Tiny
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model where the hub's client keeps a downloaded one."""
    folder = tmp_path_factory.mktemp("cache") / "models--lab--tiny-llama" / "snapshots" / "0123"
    tiny_models.build("llama_tied").save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture(scope="module")
def out(original: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "out"
    more = ("embeddings.bits=8", "embeddings.symmetric=true", "embeddings.group_size=32", "keep_ties=true")
    run(original, folder, "gsr-w4", corpus, "weights.group_size=32", "weights.symmetric=true", *more, tokenizer=None)
    return folder


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def table_of(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| (\S.*?) \| (.*?) \|$", card.text, re.MULTILINE))


def blocks_of(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card.text, re.DOTALL)


def test_the_metadata_are_those_of_the_original(out: Path) -> None:
    assert card_of(out).data.to_dict() == {
        "base_model": "lab/tiny-llama",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "gyroquant",
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "https://example.org/license",
        "pipeline_tag": "text-generation",
        "tags": ["quantization", "gyroquant", "4-bit"],
    }


def test_the_numbers_are_those_of_the_manifest(out: Path) -> None:
    manifest: Any = json.loads((out / "gyroquant.json").read_text())
    table, bits = table_of(card_of(out)), manifest["bits"]
    assert table["true bits per weight, rounded layers"] == f"{bits['per_weight']:.4f}"
    tables = bits["embeddings"]["per_weight"]
    assert table["true bits per weight, rounded embeddings and head"] == f"{tables:.4f}"
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert table["size of the weights"].split()[0] == f"{weights / 1000:.0f}"
    proof = table["relative error of the logits after the transformation, before rounding"]
    assert proof.startswith(f"{manifest['proof']['relative_logit_error']:.1e} on ")
    assert float(table["true bits per weight, whole model"]) > 4


def test_the_card_is_among_the_checked_files(out: Path) -> None:
    sums, integrity = read_sums(out), check(out)
    assert sums is not None
    assert integrity is not None
    assert "README.md" in sums
    assert integrity.intact


def test_the_command_makes_the_same_model_again(out: Path, original: Path, corpus: Path, tmp_path: Path) -> None:
    card = card_of(out)
    (command,), (recipe,) = blocks_of(card, "sh"), blocks_of(card, "yaml")
    arguments = shlex.split(command)
    assert arguments[:4] == ["gyroquant", "quantize", "lab/tiny-llama", "OUT"]
    assert arguments[arguments.index("--text") + 1] == corpus.name
    options = gq.OutputOptions(save_dtype=arguments[arguments.index("--save-dtype") + 1])
    gq.quantize(original, yaml.safe_load(recipe), corpus, tmp_path / "again", options=options)
    for path in [*out.glob("*.safetensors"), out / "README.md"]:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_code_loads_it(out: Path) -> None:
    (code,) = blocks_of(card_of(out), "python")
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(out)), names)
    assert names["model"].config.model_type == "llama"
    assert names["tokenizer"]("w1 w2")["input_ids"]


def test_no_path_of_this_machine_is_in_it(out: Path, corpus: Path) -> None:
    text = (out / "README.md").read_text()
    for path in (out, corpus):
        assert str(path.parent) not in text


def test_what_is_not_known_is_left_out(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    tiny_models.build("llama").save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    for content in (None, "no metadata", "---\nlicense: [broken\n---\n", "---\nlicense: 3\n---\n"):
        if content is not None:
            (folder / "README.md").write_text(content)
        assert metadata_of(open_model(folder)) == {"pipeline_tag": "text-generation"}
    (folder / "README.md").unlink()
    run(folder, tmp_path / "out", "rtn-w4", corpus, dense=True, tokenizer=None)
    card = card_of(tmp_path / "out")
    assert not {"license", "base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert card.data.library_name == "transformers"
    assert "# my model, quantized with gyroquant" in card.text
    assert "import gyroquant" not in card.text
    assert "--dense" in blocks_of(card, "sh")[0]


def test_a_gguf_file_says_its_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    before = gguf.GGUFWriter.add_name
    monkeypatch.setattr(gguf.GGUFWriter, "add_name", lambda w, name: (before(w, name), w.add_license("apache-2.0")))
    write_gguf(tmp_path / "tiny.gguf")
    assert metadata_of(open_model(tmp_path / "tiny.gguf"))["license"] == "apache-2.0"


def test_an_export_has_a_card_too(out: Path, tmp_path: Path) -> None:
    manifest = export(out, "gguf", tmp_path / "gguf")
    card = card_of(tmp_path / "gguf")
    data = card.data.to_dict()
    assert data["library_name"] == "gguf"
    assert data["tags"] == ["quantization", "gyroquant", "4-bit", "gguf"]
    assert (data["base_model"], data["license_name"]) == ("lab/tiny-llama", "tiny-license")
    assert "not-carried" not in card.content
    error = table_of(card)[f"relative error of the logits in {manifest['check']['runtime']}"]
    assert error.startswith(f"{manifest['check']['relative_logit_error']:.1e}; ")
    assert f"The head was untied: {manifest['facts']['untied']}." in card.text
    assert "gyroquant export OUT DEST --format gguf" in blocks_of(card, "sh")
    sums = read_sums(tmp_path / "gguf")
    assert sums is not None
    assert "README.md" in sums


def test_an_export_says_what_was_decoded_and_what_was_not_checked(out: Path, tmp_path: Path) -> None:
    manifest = export(out, "gptq", tmp_path / "gptq", check=False)
    text = card_of(tmp_path / "gptq").text
    for name, said in manifest["facts"]["decoded"].items():
        assert f"- `{name}` {said}" in text
    assert table_of(card_of(tmp_path / "gptq"))["compared with the quantized model"] == "no"


def test_an_export_of_a_folder_without_card_and_manifest_has_a_card(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "ours")
    for name in ("README.md", "gyroquant.json"):
        (store.folder / name).unlink()
    export(store.folder, "dense", tmp_path / "dense", check=False)
    assert card_of(tmp_path / "dense").data.tags == ["quantization", "gyroquant"]


@pytest.mark.parametrize("name", sorted(Format.registry))
def test_every_format_says_how_it_is_opened(name: str) -> None:
    assert "FOLDER" in Format.registry[name].usage
