"""A first look at a model: what it answers, token by token, through whichever program runs its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.runtime import Runtime, open_runtime
from gyroquant.models.stores.config_loading import read_json

_UNFINISHED = "\ufffd"  # what a decoder gives for a character of which bytes are still to come


class Chat:
    """A conversation with the model of a folder: one that gyroquant wrote, or an export of one.

    `temperature` 0 always takes the likeliest token. Raises InputError when the folder has no model or tokenizer, or
    the program that runs it is not installed.
    """

    def __init__(self, folder: str | Path, temperature: float = 0.0, seed: int = 0):
        self.folder, self.temperature = Path(folder), temperature
        self.runtime = _runtime(self.folder)
        try:
            self.tokenizer: Any = self.runtime.tokenizer()
        except Exception as error:  # transformers raises many kinds where there is none
            raise InputError(f"{folder} has no usable tokenizer: {error}") from error
        self.messages: list[dict[str, str]] = []
        self._generator = torch.Generator().manual_seed(seed)

    def _prompt(self) -> Tensor:
        """The conversation so far as the model was taught to read it, (length,)."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer("\n".join(one["content"] for one in self.messages))["input_ids"]
        return torch.tensor(ids)

    def _next(self, logits: Tensor) -> int:
        if self.temperature <= 0:
            return int(logits.argmax())
        chances = (logits / self.temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def ask(self, text: str, max_tokens: int = 256) -> Iterator[str]:
        """What the model answers, in pieces as they come; the answer is part of the conversation then."""
        self.messages.append({"role": "user", "content": text})
        ends, found, said = self._ends(), list[int](), ""
        logits = self.runtime.logits(self._prompt())[-1]
        while len(found) < max_tokens:
            token = self._next(logits)
            if token in ends:
                break
            found.append(token)
            whole = self.tokenizer.decode(found, skip_special_tokens=True)
            if not whole.endswith(_UNFINISHED):
                yield whole[len(said) :]
                said = whole
            logits = self.runtime.feed(torch.tensor([[token]]))[-1]
        self.messages.append({"role": "assistant", "content": said})

    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        ends = getattr(self.tokenizer, "ends", None)
        found = {self.tokenizer.eos_token_id} if ends is None else set(ends)
        path = self.folder / "generation_config.json"
        if path.exists():
            listed = read_json(path).get("eos_token_id")
            found |= set(listed) if isinstance(listed, list) else {listed}
        return {one for one in found if one is not None}


def _runtime(folder: Path) -> Runtime:
    """The program that runs a folder, as it does by default."""
    manifest = folder / "gyroquant_export.json"
    if manifest.exists():
        name = read_json(manifest).get("format")
        if not isinstance(name, str):
            raise InputError(f"{manifest} names no format: export the model again")
        return open_runtime(name, folder, exact=False)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no model (it has no config.json)")
    return TransformersRuntime(folder, exact=False)
