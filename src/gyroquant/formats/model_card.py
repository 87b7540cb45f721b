"""The model card: README.md with metadata for the hub, in every folder that gyroquant writes.

A card is made of the manifest alone, except for its time and memory, so that the same run writes the same bytes. Paths
of this machine do not enter it: a local model or text goes by the last part of its path.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from gyroquant.errors import GyroquantError
from gyroquant.formats.base import Format
from gyroquant.formats.checkpoint import TRANSFORMERS_USAGE
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.packed_description import METHOD
from gyroquant.system.environment import size

CARD = "README.md"
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")  # the cache of the hub
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")
_TEXT = "text-generation"
_ROTATION = {
    "fused": "The residual stream was rotated, and the rotation is fused into the weights.",
    "online": "The residual stream was rotated, and the rotation runs with the model.",
}


def metadata_of(store: WeightStore) -> dict[str, Any]:
    """What is known about an original: its name on the hub (`base_model`), license, language and task.

    A folder says it in its README.md, a GGUF file in its metadata.
    """
    path = Path(store.label)
    folder = path if path.is_dir() else path.parent
    known = {} if not path.exists() else _metadata_in(folder / CARD)
    known.pop("base_model", None)  # what the original was made from
    if path.is_file():
        known = _license_in(path) | known
    found = _SNAPSHOT.search(f"{path.resolve().as_posix()}/") if path.exists() else None
    if found is not None:
        known["base_model"] = f"{found[1]}/{found[2]}"
    if store.text_config is store.config:
        known.setdefault("pipeline_tag", _TEXT)
    return known


def _license_in(path: Path) -> dict[str, Any]:
    """The license in the metadata of a GGUF file."""
    try:
        metadata = GgufFile(path).metadata
    except (GyroquantError, OSError, ValueError):
        return {}
    names = {key.replace("_", "."): key for key in ("license", "license_name", "license_link")}
    found = {ours: metadata.get(f"general.{theirs}") for theirs, ours in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, str) and value}


def _metadata_in(card: Path) -> dict[str, Any]:
    """The entries of a card that cards of copies carry over. Empty if there is no card, or none that can be read."""
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    return {name: data[name] for name in _CARRIED if _is_plain(data.get(name))}


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item for item in items)


def write_card(folder: Path, manifest: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Writes the card of a quantized model. `manifest` is that of the folder, `known` is from `metadata_of`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = config.get("quantization_config", {}).get("quant_method") == METHOD
    name, bits, recipe = _source_name(manifest, known), manifest["bits"], manifest["recipe"]
    first = (
        f"The weights of {_link(name, known)}, rounded to {bits['per_weight']:.2f} bits by the recipe "
        f"`{recipe.get('name', '')}` of gyroquant. {_ROTATION.get(manifest['rotation'], '')}"
    )
    first_line = "```python\nimport gyroquant  # lets transformers read the packed weights\n"
    usage = TRANSFORMERS_USAGE.replace("```python\n", first_line) if packed else TRANSFORMERS_USAGE
    text = [
        f"# {name}, quantized with gyroquant",
        first.strip(),
        _table(_numbers(folder, manifest)),
        "## How to load it",
        usage,
        "FOLDER is this folder, or the name of this repository.",
        *_making(manifest, name, config, packed),
    ]
    _write(folder, _data(known, "gyroquant" if packed else "transformers", recipe), text)


def write_export_card(folder: Path, manifest: Mapping[str, Any], source: Path, chosen: Format) -> None:
    """Writes the card of an export. `source` is the folder of the quantized model, with its card and its manifest."""
    original = _read(source / "gyroquant.json")
    known = _metadata_in(source / CARD)
    bits = original.get("bits", {}) | {"whole_model": manifest.get("whole_model_bits_per_weight")}
    bits |= {"per_weight": manifest["facts"].get("true_bits_per_weight", bits.get("per_weight"))}
    name, rows = _source_name(original, known), [*_bits({"bits": bits}), ("size", size(manifest["bytes"]))]
    rows += [*_proof(original), *_checked(manifest["check"])]
    facts = manifest["facts"]
    untied = f"The head was untied: {facts['untied']}." if "untied" in facts else ""
    decoded = [f"- `{name}` {text}" for name, text in facts.get("decoded", {}).items()]
    again = facts.get("requantized")
    arguments = ["gyroquant", "export", "OUT", "DEST", "--format", chosen.name]
    arguments += ["--requantize", again] if again else []
    text = [
        f"# {name}, quantized with gyroquant, for {chosen.title}",
        f"The weights of {_link(name, known)}, rounded by gyroquant, in the format {chosen.name}.",
        _table(rows),
        *([f"llama.cpp has rounded the weights again, to {again}."] if again else []),
        *([untied] if untied else []),
        *(["These rounded parameters are held as plain numbers:", "\n".join(decoded)] if decoded else []),
        "## How to load it",
        chosen.usage or f"Open it with {chosen.title}.",
        "FOLDER is this folder, or a copy of this repository.",
        "## How it was made",
        "The folder OUT was made as its own card says. Then:",
        _code(shlex.join(arguments), "sh"),
        _versions(manifest),
    ]
    _write(folder, _data(known, chosen.library or chosen.name, original.get("recipe", {}), *_tags(chosen)), text)


def _tags(chosen: Format) -> list[str]:
    return [] if chosen.capabilities.dense and chosen.library else [chosen.name]


def _read(path: Path) -> dict[str, Any]:
    """The manifest of a quantized model. Empty if it is lost or damaged: an export does not need it."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _write(folder: Path, data: ModelCardData, text: Iterable[str]) -> None:
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n"
    (folder / CARD).write_text(content, encoding="utf-8", newline="\n")


def _data(known: Mapping[str, Any], library: str, recipe: Mapping[str, Any], *tags: str) -> ModelCardData:
    entries = dict(known)
    if "base_model" in known:
        entries["base_model_relation"] = "quantized"
    bits = recipe.get("weights", {}).get("bits")
    width = [f"{bits}-bit"] if isinstance(bits, int) else []
    tags = ("quantization", "gyroquant", *width, *tags)
    return ModelCardData(library_name=library, tags=list(dict.fromkeys(tags)), **entries)


def _source_name(manifest: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    base = known.get("base_model")
    return base if isinstance(base, str) else Path(str(manifest.get("model", "model"))).resolve().name


def _link(name: str, known: Mapping[str, Any]) -> str:
    return f"[{name}](https://huggingface.co/{name})" if name == known.get("base_model") else name


def _numbers(folder: Path, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return [*_bits(manifest), ("size of the weights", size(weights)), *_proof(manifest)]


def _bits(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    bits = manifest.get("bits", {})
    tables = bits.get("embeddings", {}).get("per_weight")
    parts = {"rounded layers": bits.get("per_weight"), "rounded embeddings and head": tables}
    parts["whole model"] = bits.get("whole_model", bits.get("whole_model_per_weight"))  # the old name
    for part, value in parts.items():
        if value is not None:
            yield f"true bits per weight, {part}", f"{value:.4f}"


def _proof(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The error of the transformed model before it was rounded."""
    proof = manifest.get("proof", {})
    if proof.get("tokens"):
        error = f"{proof['relative_logit_error']:.1e} on {proof['tokens']} tokens"
        yield "relative error of the logits after the transformation, before rounding", error


def _checked(check: Mapping[str, Any] | None) -> Iterable[tuple[str, str]]:
    if check is None or "not_run" in check:
        yield "compared with the quantized model", "no"
        return
    same = f"{check['greedy_tokens_alike']} of {check['greedy_tokens']} greedy tokens are the same"
    yield f"relative error of the logits in {check['runtime']}", f"{check['relative_logit_error']:.1e}; {same}"


def _making(manifest: Mapping[str, Any], name: str, config: Mapping[str, Any], packed: bool) -> list[str]:
    """The command that makes the folder again, with the recipe as YAML."""
    arguments = ["gyroquant", "quantize", name, "OUT", "--recipe", "recipe.yaml"]
    if manifest["text"] is not None:
        arguments += ["--text", Path(str(manifest["text"]["name"])).name]
    arguments += [] if packed else ["--dense"]
    arguments += ["--save-dtype", str(config.get("dtype", "auto"))]
    recipe = yaml.safe_dump(_portable(manifest["recipe"]), sort_keys=False, allow_unicode=True)
    return [
        "## How it was made",
        _code(shlex.join(arguments), "sh"),
        "`gyroquant.json` has the statistics of each layer. `gyroquant verify FOLDER` checks the files.",
        "This is recipe.yaml:",
        _code(recipe, "yaml"),
        _versions(manifest),
    ]


def _portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose text goes by the last part of its path."""
    calibration = dict(recipe["calibration"])
    if isinstance(calibration.get("text"), str):
        calibration["text"] = Path(calibration["text"]).name
    return {**recipe, "calibration": calibration}


def _versions(manifest: Mapping[str, Any]) -> str:
    used = manifest["versions"]
    return f"Versions: gyroquant {used['gyroquant']}, torch {used['torch']}, transformers {used['transformers']}."


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
