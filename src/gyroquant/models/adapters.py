"""Adapters (LoRA and its relatives): merged into their base by peft where both are at hand, refused where they are not.

What an adapter's owner runs is the base with the adapter on it, so neither alone may be taken for the model.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gyroquant.errors import InputError
from gyroquant.models.outside import read_json
from gyroquant.models.runner import auto_class
from gyroquant.models.store import CheckpointStore, ModuleStore, load_tokenizer

ADAPTER = "adapter_config.json"
_MERGE = "peft's PeftModel.from_pretrained(base, adapter).merge_and_unload()"


class MergedStore(ModuleStore):
    """A base with an adapter merged into it, in memory in fp32; `folder` holds the adapter."""

    def __init__(self, model: PreTrainedModel, base: CheckpointStore, folder: Path):
        super().__init__(model)
        self.folder, self.base, self.label = folder, base, str(folder)
        self.notes = (*base.notes, f"the adapter in {folder} was merged into its base, {base.label}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base is stored."""
        return self.base.dtype

    def tokenizer(self) -> Any:
        """The adapter's tokenizer, which may have tokens of its own, else the base's."""
        try:
            return load_tokenizer(self.folder, self.label)
        except InputError:
            return self.base.tokenizer()

    def generation_config(self) -> Any:
        """The settings that the base generates text with."""
        return self.base.generation_config()


def open_adapter(folder: Path) -> MergedStore:
    """The model that an adapter's folder stands for. Its base is in the same folder or in the one that it names.

    Raises InputError, with what to do, where the base is not here or peft is not installed.
    """
    settings = read_json(folder / ADAPTER)
    base = _base(folder, settings)
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"{folder} holds an adapter ({settings.get('peft_type', 'of peft')}) for {base}: install peft to have it "
            "merged (pip install 'gyroquant[peft]')"
        ) from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{folder} holds {ADAPTER}, but no adapter_model.safetensors: save the adapter as safetensors (pickles are "
            f"not read), or take {ADAPTER} away"
        )
    if read_json(base / "config.json").get("quantization_config") is not None:
        raise InputError(f"the base of {folder}, {base}, is already quantized: merge the adapter into the original")
    store = CheckpointStore(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what peft calls in transformers
            merged = peft.PeftModel.from_pretrained(_in_memory(store), folder).merge_and_unload(safe_merge=True)
    except Exception as error:  # each kind of adapter checks its settings in its own way
        why = " ".join(str(error).split())
        raise InputError(f"the adapter in {folder} cannot be merged into {base}: {why}") from error
    return MergedStore(merged, store, folder)


@torch.no_grad()
def _in_memory(store: CheckpointStore) -> Any:
    """A model with all weights of a store, in fp32, in which merging rounds nothing."""
    model = auto_class(store.config).from_config(store.config, dtype=torch.float32, trust_remote_code=False)
    stored = model.state_dict()
    for name in store.shapes:
        stored[name].copy_(store.read([name])[name])
    return model.eval()


def merged_in_memory(model: Any) -> ModuleStore:
    """A copy of a model in memory that is wrapped by peft, with its adapter merged.

    Raises InputError where it cannot be merged, and for anything that is no model of transformers.
    """
    if not type(model).__module__.startswith("peft."):
        raise InputError(
            f"{type(model).__module__}.{type(model).__name__} is no model of transformers: give a PreTrainedModel, a "
            "folder, a GGUF file or a name on the hub"
        )
    try:
        merged = deepcopy(model).merge_and_unload(safe_merge=True)
    except Exception as error:  # prompts and prefixes are no weights
        raise InputError(f"the adapter of this {type(model).__name__} cannot be merged: {error}") from error
    return ModuleStore(merged)


def check_plain(model: Any) -> None:
    """Raises InputError, with what to do, for a model in memory whose weights are not all that it computes with."""
    if type(model).__module__.startswith("peft."):
        raise InputError(
            "this model is wrapped by peft, and a fold would change its base alone: merge the adapter first, "
            "model = model.merge_and_unload()"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"this model has an adapter that load_adapter put on it: merge it first with {_MERGE}")
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__} is no model of transformers: give a PreTrainedModel")


def _base(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of an adapter's base, where it is here."""
    if (folder / "config.json").is_file() and any(
        path.name != "adapter_model.safetensors" for path in folder.glob("*.safetensors")
    ):
        return folder
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder} holds an adapter alone, and {ADAPTER} names no base: merge it with {_MERGE}")
    base = Path(named) if Path(named).is_absolute() else folder / named
    for place in (base, Path(named)):
        if (place / "config.json").is_file():
            return place
    raise InputError(
        f"{folder} holds an adapter alone, and its base {named!r} is not here: put the base into a folder and its path "
        f"into {ADAPTER} (base_model_name_or_path), or merge it with {_MERGE}"
    )
