"""A conversation with a model, token by token, in the program that runs its folder."""

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

_UNFINISHED = "\ufffd"  # what a tokenizer decodes for a character whose last bytes are missing


class Chat:
    """A conversation with the model of a folder: one that gyroquant wrote, or an export of one.

    `temperature` 0 always takes the most likely token. `seed` is for sampling at other temperatures. Raises InputError
    if the folder has no model or tokenizer, or the program that runs it is not installed.
    """

    def __init__(self, folder: str | Path, temperature: float = 0.0, seed: int = 0):
        self.folder, self.temperature = Path(folder), temperature
        self.runtime = _runtime(self.folder)
        try:
            self.tokenizer: Any = self.runtime.tokenizer()
        except Exception as error:  # transformers raises errors of many types if there is no tokenizer
            raise InputError(f"{folder} has no usable tokenizer: {error}") from error
        self.messages: list[dict[str, str]] = []
        self._generator = torch.Generator().manual_seed(seed)

    def _prompt(self) -> Tensor:
        """The tokens of the conversation so far, in the chat template if there is one. Shape (length,)."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer("\n".join(message["content"] for message in self.messages))["input_ids"]
        return torch.tensor(ids)

    def _next(self, logits: Tensor) -> int:
        if self.temperature <= 0:
            return int(logits.argmax())
        probabilities = (logits / self.temperature).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def ask(self, text: str, max_tokens: int = 256) -> Iterator[str]:
        """Yields the answer of the model in pieces. The whole answer then becomes part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        ends, tokens, answer = self._ends(), list[int](), ""
        logits = self.runtime.logits(self._prompt())[-1]
        while len(tokens) < max_tokens:
            token = self._next(logits)
            if token in ends:
                break
            tokens.append(token)
            text_so_far = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text_so_far.endswith(_UNFINISHED):
                yield text_so_far[len(answer) :]
                answer = text_so_far
            logits = self.runtime.feed(torch.tensor([[token]]))[-1]
        self.messages.append({"role": "assistant", "content": answer})

    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        ends = getattr(self.tokenizer, "ends", None)
        tokens = {self.tokenizer.eos_token_id} if ends is None else set(ends)
        path = self.folder / "generation_config.json"
        if path.exists():
            listed = read_json(path).get("eos_token_id")
            tokens |= set(listed) if isinstance(listed, list) else {listed}
        return {token for token in tokens if token is not None}


def _runtime(folder: Path) -> Runtime:
    """Opens a folder in the program that runs it, with that program's defaults."""
    manifest = folder / "gyroquant_export.json"
    if manifest.exists():
        name = read_json(manifest).get("format")
        if not isinstance(name, str):
            raise InputError(f"{manifest} does not name a format; export the model again")
        return open_runtime(name, folder, exact=False)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a model: it has no config.json")
    return TransformersRuntime(folder, exact=False)
