"""Names of stored tensors that no parameter has: those that a trainer has put something in front of, and those of parts
that a language model runs without.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gyroquant.errors import InputError

_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing
_IN_FRONT = ("module", "language_model")  # DistributedDataParallel; a decoder cut out of a model with images
_VALUE_HEADS = ("v_head.", "value_head.")  # of reinforcement learning, beside the whole language model


def trainer_names(stored: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Stored names that a trainer's wrappers have changed, and what they are without; empty where there are none.

    What stands in front counts only where every name has it and the model has no part of that name.
    """
    stored = list(stored)
    names = [".".join(part for part in name.split(".") if part not in _ANYWHERE) for name in stored]
    for prefix in _IN_FRONT * 2:
        parts = {name.partition(".")[0] for name in names}
        if parts == {prefix} and not any(name.startswith(f"{prefix}.") for name in known):
            names = [name.partition(".")[2] for name in names]
    return {old: new for old, new in zip(stored, names, strict=True) if old != new}


def trainer_patterns(renames: Mapping[str, str]) -> dict[str, str]:
    """The same renaming as transformers' `key_mapping`: patterns and what replaces them."""
    patterns = {rf"(^|\.){part}\.": r"\1" for part in _ANYWHERE if any(part in name.split(".") for name in renames)}
    for prefix in _IN_FRONT:
        if all(prefix in name.split(".")[:3] for name in renames):
            patterns[rf"^{prefix}\."] = ""
    return patterns


def left_out(unexpected: list[str], model: Any, label: str) -> list[str]:
    """What is to be told of stored tensors that are no parameters of a model: they are parts which it runs without.

    Raises InputError, with what to do, for any other.
    """
    groups: dict[str, list[str]] = {}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    layers = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0)
    for name in unexpected:
        number = re.search(r"\.layers\.(\d+)\.", name)
        if name.startswith(_VALUE_HEADS):
            groups.setdefault("a value head", []).append(name)
        elif re.match(r"(model\.)?mtp\.", name) or (number and _predicts_more(model.config, layers, int(number[1]))):
            groups.setdefault("layers that predict further tokens", []).append(name)
        elif any(pattern.search(name) for pattern in ignored):
            groups.setdefault(f"what transformers' {type(model).__name__} leaves out", []).append(name)
        else:
            raise _stray(unexpected, model, label)
    return [f"{label} also holds {what} ({names[0]}, ...), which is left out" for what, names in groups.items()]


def _predicts_more(config: Any, layers: int, number: int) -> bool:
    """Whether a layer behind the last is one of those that predict more than the next token."""
    more = int(getattr(config.get_text_config(decoder=True), "num_nextn_predict_layers", 0) or 0)
    return layers <= number < layers + more


def _stray(names: list[str], model: Any, label: str) -> InputError:
    kind = type(model).__name__
    text = f"{label} stores {', '.join(names[:4])}, which {kind} has not"
    if any(re.match(r"(score|classifier|qa_outputs)\.", name) for name in names):
        return InputError(
            f"{text}: it is a classifier or a reward model, and only language models can be quantized here, whose head "
            "gives a logit for every word"
        )
    if any(".lora_" in name or name.startswith("base_model.model.") for name in names):
        return InputError(
            f"{text}: it is an adapter. Merge it into its base and give that folder (with peft: "
            "model.merge_and_unload().save_pretrained(FOLDER))"
        )
    return InputError(f"{text}: take these tensors away if the model does not need them, or check config.json")
