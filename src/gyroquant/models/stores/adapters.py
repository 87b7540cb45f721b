"""Adapters (LoRA and similar): peft merges them into their base.

The model is the base together with the adapter. Neither of them alone may be taken for the model. If the base or peft
is missing, opening the adapter is an error.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gyroquant.errors import InputError
from gyroquant.models.execution.runner import auto_class
from gyroquant.models.stores.base import CheckpointStore, ModuleStore, load_tokenizer
from gyroquant.models.stores.config_loading import read_json

ADAPTER = "adapter_config.json"
_MERGE = "peft's PeftModel.from_pretrained(base, adapter).merge_and_unload()"


class MergedStore(ModuleStore):
    """A base with an adapter merged into it, in memory, in fp32. `folder` holds the adapter."""

    def __init__(self, model: PreTrainedModel, base: CheckpointStore, folder: Path):
        super().__init__(model)
        self.folder, self.base, self.label = folder, base, str(folder)
        self.notes = (*base.notes, f"the adapter in {folder} was merged into its base, {base.label}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base is stored."""
        return self.base.dtype

    def tokenizer(self) -> Any:
        """The adapter's tokenizer, which may have additional tokens; the base's if the adapter has none."""
        try:
            return load_tokenizer(self.folder, self.label)
        except InputError:
            return self.base.tokenizer()

    def generation_config(self) -> Any:
        """The settings for generation of the base."""
        return self.base.generation_config()


def open_adapter(folder: Path) -> MergedStore:
    """The model of an adapter's folder: base and adapter merged.

    The base is in the same folder or in the folder that the adapter names. Raises InputError, with a remedy, if the
    base is missing or already quantized, if peft is not installed, or if peft cannot merge the two.
    """
    settings = read_json(folder / ADAPTER)
    base = _base_folder(folder, settings)
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"{folder} holds an adapter ({settings.get('peft_type', 'of peft')}) for {base}: install peft to merge "
            "it (pip install 'gyroquant[peft]')"
        ) from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{folder} holds {ADAPTER}, but no adapter_model.safetensors: save the adapter as safetensors (pickles are "
            f"not read), or remove {ADAPTER}"
        )
    if read_json(base / "config.json").get("quantization_config") is not None:
        raise InputError(f"the base of {folder}, {base}, is already quantized: merge the adapter into the original")
    store = CheckpointStore(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from calls of peft to transformers
            merged = peft.PeftModel.from_pretrained(_in_memory(store), folder).merge_and_unload(safe_merge=True)
    except Exception as error:  # adapters check their settings and raise many kinds
        why = " ".join(str(error).split())
        raise InputError(
            f"the adapter in {folder} cannot be merged into {base}: {why}; check that it belongs to this base"
        ) from error
    return MergedStore(merged, store, folder)


@torch.no_grad()
def _in_memory(store: CheckpointStore) -> Any:
    """A model with all weights of a store, in fp32, so that merging rounds nothing."""
    model = auto_class(store.config).from_config(store.config, dtype=torch.float32, trust_remote_code=False)
    stored = model.state_dict()
    for name in store.shapes:
        stored[name].copy_(store.read([name])[name])
    return model.eval()


def merged_in_memory(model: Any) -> ModuleStore:
    """A copy of a model in memory that peft wraps, with its adapter merged.

    Raises InputError if the adapter cannot be merged, and for anything that is not a transformers model.
    """
    if not type(model).__module__.startswith("peft."):
        raise InputError(
            f"{type(model).__module__}.{type(model).__name__} is not a transformers model: give a PreTrainedModel, a "
            "folder, a GGUF file or a name on the hub"
        )
    try:
        merged = deepcopy(model).merge_and_unload(safe_merge=True)
    except Exception as error:  # prompts and prefixes cannot become weights
        raise InputError(
            f"the adapter of this {type(model).__name__} cannot be merged: {error}; give a model without an adapter"
        ) from error
    return ModuleStore(merged)


def check_plain(model: Any) -> None:
    """Raises InputError, with a remedy, for a model in memory that has an adapter or is not a transformers model."""
    if type(model).__module__.startswith("peft."):
        raise InputError(
            "peft wraps this model, and a fold would change only its base: merge the adapter first, "
            "model = model.merge_and_unload()"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"this model has an adapter that load_adapter put on it: merge it first with {_MERGE}")
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__} is not a transformers model: give a PreTrainedModel")


def _base_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of an adapter's base. Raises InputError if it is not on this machine."""
    if (folder / "config.json").is_file() and any(
        path.name != "adapter_model.safetensors" for path in folder.glob("*.safetensors")
    ):
        return folder
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder} holds only an adapter, and {ADAPTER} names no base: merge it with {_MERGE}")
    base = Path(named) if Path(named).is_absolute() else folder / named
    for candidate in (base, Path(named)):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(
        f"{folder} holds only an adapter, and its base {named!r} is not here: put the base into a folder and its path "
        f"into {ADAPTER} (base_model_name_or_path), or merge it with {_MERGE}"
    )
