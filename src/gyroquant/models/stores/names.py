"""Stored tensors whose names are not names of parameters.

There are two kinds: names with the prefix of a trainer's wrapper, and tensors of parts that the language model does not
use.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gyroquant.errors import InputError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing
_PREFIXES = ("module", "language_model")  # DistributedDataParallel; a decoder from a model that also takes images
_VALUE_HEADS = ("v_head.", "value_head.")  # reinforcement learning adds them to the language model


def trainer_names(stored: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Maps stored names that a trainer's wrappers changed to the original names; empty if there are none.

    A prefix is removed only if every name has it and the model has no part of that name.
    """
    stored = list(stored)
    names = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in stored]
    for prefix in _PREFIXES * 2:
        parts = {name.partition(".")[0] for name in names}
        if parts == {prefix} and not any(name.startswith(f"{prefix}.") for name in known):
            names = [name.partition(".")[2] for name in names]
    return {old: new for old, new in zip(stored, names, strict=True) if old != new}


def trainer_patterns(renames: Mapping[str, str]) -> dict[str, str]:
    """The same renaming as transformers' `key_mapping`: patterns and their replacements."""
    patterns = {rf"(^|\.){part}\.": r"\1" for part in _WRAPPERS if any(part in name.split(".") for name in renames)}
    for prefix in _PREFIXES:
        if all(prefix in name.split(".")[:3] for name in renames):
            patterns[rf"^{prefix}\."] = ""
    return patterns


def left_out(unexpected: list[str], model: Any, label: str) -> list[str]:
    """Notes on stored tensors that belong to parts which the model does not use.

    Raises InputError, with a remedy, for any other tensor that is not a parameter of the model.
    """
    groups: dict[str, list[str]] = {}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    layers = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0)
    for name in unexpected:
        number = re.search(r"\.layers\.(\d+)\.", name)
        if name.startswith(_VALUE_HEADS):
            groups.setdefault("a value head", []).append(name)
        elif re.match(r"(model\.)?mtp\.", name) or (
            number and _predicts_further_tokens(model.config, layers, int(number[1]))
        ):
            groups.setdefault("layers that predict further tokens", []).append(name)
        elif any(pattern.search(name) for pattern in ignored):
            groups.setdefault(f"tensors that transformers' {type(model).__name__} ignores", []).append(name)
        else:
            raise _unexpected_error(unexpected, model, label)
    return [f"{label} also holds {part} ({names[0]}, ...): not read" for part, names in groups.items()]


def _predicts_further_tokens(config: Any, layers: int, number: int) -> bool:
    """Whether a layer after the last one belongs to those that predict further tokens."""
    more = int(getattr(config.get_text_config(decoder=True), "num_nextn_predict_layers", 0) or 0)
    return layers <= number < layers + more


def _unexpected_error(names: list[str], model: Any, label: str) -> InputError:
    kind = type(model).__name__
    text = f"{label} stores {', '.join(names[:4])}, which {kind} does not have"
    if any(re.match(r"(score|classifier|qa_outputs)\.", name) for name in names):
        return InputError(
            f"{text}: it is a classifier or a reward model. Give a language model, whose head gives a logit for every "
            "token"
        )
    if any(".lora_" in name or name.startswith("base_model.model.") for name in names):
        return InputError(
            f"{text}: it is an adapter. Merge it into its base and give that folder (with peft: "
            "model.merge_and_unload().save_pretrained(FOLDER))"
        )
    return InputError(f"{text}: remove these tensors if the model does not need them, or check config.json")
