"""What reads files from outside, each as a function of the bytes of one file, with seeds and what damages them."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saved_models
import tiny_models
import torch
import yaml
from gguf_reading import write_gguf
from safetensors.torch import load_file, save_file
from transformers.integrations.gguf.reader import GgufHeader

from gyroquant.errors import GyroquantError
from gyroquant.finetuning.rotations_file import describe, load_rotations, write_rotations
from gyroquant.formats.export import MANIFEST, read_manifest
from gyroquant.inspection.model import read_layers
from gyroquant.models.stores.base import checked_skeleton, load_tokenizer
from gyroquant.models.stores.config_loading import load_config, read_json
from gyroquant.models.stores.gguf.check import check_gguf
from gyroquant.models.stores.packed import attachments
from gyroquant.models.stores.packed_description import check_version
from gyroquant.models.stores.safetensors_files import safetensors_index
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.recipes.presets import preset_names
from gyroquant.recipes.schema import load_recipe
from gyroquant.report.layer_tables import rounded_layers

Kind = str  # of the bytes: `binary`, `json` or `yaml`


@dataclass(frozen=True)
class Target:
    """A reader: `read` takes the folder and the path of the file in it that is tried, whose good contents are `seeds`.

    It returns, or raises a GyroquantError; anything else is a crash. `head` is where the interesting bytes end.
    """

    name: str
    file: str
    kind: Kind
    folder: Path
    seeds: tuple[bytes, ...]
    read: Callable[[Path, Path], Any]
    head: int | None = None

    def accepts(self, data: bytes) -> bool:
        """Whether the reader takes these bytes; False where it refuses them in its own words."""
        path = self.folder / self.file
        path.write_bytes(data)
        try:
            self.read(self.folder, path)
        except GyroquantError as error:
            if not str(error).strip():
                raise AssertionError("refused without a word") from error
            return False
        return True


def _gguf(folder: Path, path: Path) -> None:
    check_gguf(path)
    try:
        header = GgufHeader.from_file(str(path))
    except ValueError as error:
        if "not supported yet" not in str(error):
            raise
        return
    if any(header.data_start + info.offset + info.nbytes > path.stat().st_size for info in header.tensors):
        raise AssertionError("a tensor behind the end was passed")


def _weights(folder: Path, path: Path) -> None:
    for tensor in list(safetensors_index(folder).values())[:3]:
        _ = tensor[...]


def _config(folder: Path, path: Path) -> None:
    shapes = [tensor.shape for tensor in safetensors_index(folder).values()]
    checked_skeleton(load_config(folder, shapes), str(folder))


def _tokenizer(folder: Path, path: Path) -> None:
    load_tokenizer(folder, str(folder))("w1 w2")


def _description(folder: Path, path: Path) -> None:
    found = read_json(path)
    check_version(found, str(path))
    attachments(found, sorted(folder.glob("*.safetensors")))


def make(place: Path) -> dict[str, Target]:
    """All targets, each with a folder of its own in `place`, made from a tiny model."""
    model, text = tiny_models.build("llama"), [tiny_models.prose(3000)]
    plain, saved = place / "plain", place / "saved"
    model.save_pretrained(plain)
    tiny_models.tokenizer().save_pretrained(plain)
    changes = ["calibration.nsamples=4", "calibration.seqlen=32", "proof.seqlen=32", "weights.group_size=16"]
    pipeline.run(prepare(plain, saved, load_recipe("quarot-w4a4kv4", changes), text))
    write_gguf(place / "whole.gguf", "Q8_0")
    gguf, weights = (place / "whole.gguf").read_bytes(), (plain / "model.safetensors").read_bytes()
    config = (saved / "config.json").read_bytes()
    description = json.dumps(json.loads(config)["quantization_config"]).encode()
    index = _shards(plain, place / "shards")
    layers = (saved / "gyroquant.json").read_bytes()
    export = json.dumps({"format": "gguf", "facts": {"file": "model.gguf"}, "bytes": 5, "check": None}).encode()
    recipes = [yaml.safe_dump(load_recipe(name).to_dict()).encode() for name in preset_names()[::4]]
    recipes.append(yaml.safe_dump(saved_models.recipe()).encode())
    plain_config = (plain / "config.json").read_bytes()
    start = GgufHeader.from_file(str(place / "whole.gguf")).data_start
    targets = [
        Target("gguf", "model.gguf", "binary", _empty(place / "gguf"), (gguf,), _gguf, start),
        Target("safetensors", "model.safetensors", "binary", _empty(place / "st"), (weights,), _weights, 4096),
        Target("index", "model.safetensors.index.json", "json", place / "shards", (index,), _weights),
        Target("config", "config.json", "json", plain, (plain_config,), _config),
        Target("tokenizer", "tokenizer.json", "json", place / "words", (_words(place / "words"),), _tokenizer),
        Target("rotations", "r.safetensors", "binary", _empty(place / "o"), (_rotations(place),), _read_rotations, 400),
        Target("recipe", "mine.yaml", "yaml", _empty(place / "r"), tuple(recipes), lambda _, path: load_recipe(path)),
        Target("description", "description.json", "json", saved, (description,), _description),
        Target("manifest", "gyroquant.json", "json", _empty(place / "m"), (layers,), _manifest),
        Target("export manifest", MANIFEST, "json", _empty(place / "e"), (export,), lambda f, _: read_manifest(f)),
    ]
    return {target.name: target for target in targets}


def _words(folder: Path) -> bytes:
    tiny_models.tokenizer().save_pretrained(folder)
    return (folder / "tokenizer.json").read_bytes()


def _rotations(place: Path) -> bytes:
    path = place / "rotations.safetensors"
    write_rotations(path, {"R1": torch.eye(8, dtype=torch.float64), "model.layers.0.self_attn.R2": torch.eye(4)})
    return path.read_bytes()


def _read_rotations(folder: Path, path: Path) -> None:
    describe(load_rotations(path))


def _manifest(folder: Path, path: Path) -> None:
    rounded_layers(read_layers(path))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _shards(plain: Path, folder: Path) -> bytes:
    """Two shards of a model in a folder; returns their index."""
    shutil.copytree(plain, folder)
    found = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    places = {}
    for name, half in (("a.safetensors", dict(found[::2])), ("b.safetensors", dict(found[1::2]))):
        save_file(half, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(half, name)
    return json.dumps({"metadata": {"total_size": 5}, "weight_map": places}).encode()


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**60, 10**12, 10**30, -(2**63), 0.5, -0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "a\0b", "\ud7ff", "1e400", "re:(", "x" * 5000),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [0] * 100, ["lm_head", 5], {"method": "hadamard"}),
)
_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(target: Target, seed: int) -> bytes:
    """A damaged seed of a target, the same for the same number."""
    chance = random.Random(seed)
    data = chance.choice(target.seeds)
    if target.kind != "binary" and chance.random() < 0.7:
        try:
            return _written(_damaged_often(data, target.kind, chance), target.kind)
        except RecursionError:  # of what makes the damage, which is not what is tried
            return data
    return _noise(data, chance, target.head)


def _damaged_often(data: bytes, kind: Kind, chance: random.Random) -> Any:
    tree = json.loads(data) if kind == "json" else yaml.safe_load(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        tree = _damaged(tree, chance, (2, 20, 300 if kind == "json" else 60))
    return tree


def _written(tree: Any, kind: Kind) -> bytes:
    if kind == "yaml":
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _damaged(tree: Any, chance: random.Random, depths: tuple[int, ...]) -> Any:
    """The tree with one value of it changed, taken away, doubled or nested."""
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(chance.choice(HOSTILE))
    parent, key = chance.choice(places)
    what = chance.random()
    if what < 0.6:
        parent[key] = copy.deepcopy(chance.choice(HOSTILE))
    elif what < 0.75:
        del parent[key]
    elif what < 0.85:
        other, at = chance.choice(places)
        parent[key] = copy.deepcopy(other[at] if _has(other, at) else None)
    elif what < 0.95 and isinstance(parent, dict):
        parent[chance.choice(("x", "", "grid", "method", "kind", "\0", "n" * 300))] = parent.pop(key)
    else:
        value = parent[key]
        for _ in range(chance.choice(depths)):
            value = [value] if chance.random() < 0.5 else {"kind": "product", "parts": [value]}
        parent[key] = value
    return tree


def _has(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def _places(tree: Any) -> Any:
    left = [tree] if isinstance(tree, (dict, list)) else []
    while left:
        parent = left.pop()
        for key, value in parent.items() if isinstance(parent, dict) else enumerate(parent):
            yield parent, key
            if isinstance(value, (dict, list)):
                left.append(value)


def _noise(data: bytes, chance: random.Random, head: int | None) -> bytes:
    """Bytes changed, cut, repeated and overwritten with telling numbers."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not out:
            return bytes(out)
        at, what = chance.randrange(min(len(out), head or len(out))), chance.random()
        if what < 0.35:
            out[at] = chance.randrange(256)
        elif what < 0.65:
            size = chance.choice((1, 2, 4, 8))
            out[at : at + size] = (chance.choice(_WORDS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif what < 0.75:
            del out[at:]
        elif what < 0.85:
            del out[at : at + chance.randrange(1, 40)]
        else:
            end = at + chance.randrange(1, 40)
            out[at:at] = out[at:end] * chance.choice((1, 2, 50))
    return bytes(out)
