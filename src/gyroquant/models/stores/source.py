"""Opens every kind of model: a transformers model in memory, a folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from gyroquant.errors import InputError
from gyroquant.models.stores.adapters import ADAPTER, check_plain, merged_in_memory, open_adapter
from gyroquant.models.stores.base import CheckpointStore, ModuleStore, WeightStore
from gyroquant.models.stores.config_loading import kind_of, read_json, remedy
from gyroquant.models.stores.gguf.store import GgufStore, find_gguf
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.packed_description import METHOD
from gyroquant.models.stores.prequantized.opening import open_prequantized, quantization_of
from gyroquant.system.checksums import CHECKSUM_FILE

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md", CHECKSUM_FILE]


def open_model(model: str | Path | PreTrainedModel) -> WeightStore:
    """The store of a model. Raises InputError, with the reason, if the model cannot be opened.

    `model` is a transformers model in memory, the path of a folder or of a GGUF file, or a name on the hub.
    The weights of a folder that gyroquant wrote are compared with its checksums (see `checksums.unchecked`).
    """
    if isinstance(model, PreTrainedModel):
        check_plain(model)
        return ModuleStore(model)
    if not isinstance(model, (str, Path)):
        return merged_in_memory(model)
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            hint = "" if kind_of(path) in ("unknown", "unreadable") else f" ({remedy(path, '')})"
            raise InputError(
                f"{path} is a file, but not a .gguf{hint}; give a folder, a GGUF file or a name on the hub"
            )
        return GgufStore(path)
    if path.is_dir():
        return _open_folder(path)
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
        raise InputError(f"there is no model at {model}; give a folder, a GGUF file or a name on the hub (owner/name)")
    return _open_folder(_fetch(str(model)))


def open_original(model: str | Path | PreTrainedModel) -> WeightStore:
    """As `open_model`, but raises InputError for a model that gyroquant quantized."""
    store = open_model(model)
    if isinstance(store, PackedStore):
        raise InputError(f"{store.label} is already quantized; start from the model in full precision")
    return store


def _open_folder(folder: Path) -> WeightStore:
    if (folder / ADAPTER).is_file():
        return open_adapter(folder)
    if not (folder / "config.json").exists():
        return GgufStore(find_gguf(folder))
    try:
        quantization = quantization_of(folder, read_json(folder / "config.json"))
    except InputError as error:
        raise InputError(f"{folder} has no usable config.json: {error}") from error
    if quantization is None:
        return CheckpointStore(folder)
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        return PackedStore(folder)
    return open_prequantized(folder, quantization)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be fetched
        raise InputError(
            f"the model {name!r} is neither a folder here nor can it be fetched from the hub: {error}"
        ) from error
