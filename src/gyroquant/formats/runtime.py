"""Runtimes: the programs that run models, with one interface. They return the logits of token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gyroquant.errors import InputError
from gyroquant.registry import Registry


class Runtime(ABC):
    """A model opened by a program. With `exact`, everything runs in fp32; otherwise the program runs as by default.

    Raises InputError if the program is not installed. If it is not, or if it `refuses` the folder, `open_runtime` uses
    `instead`, if there is one.
    """

    registry: ClassVar[Registry[type[Runtime]]] = Registry("runtime", "gyroquant.formats")
    """The runtimes by the names of the formats that declare them (`Format.runtime`)."""
    title: ClassVar[str]
    instead: ClassVar[type[Runtime] | None] = None
    unpadded: ClassVar[str] = ""  # why it does not accept a padded batch; empty if it does
    longest: int | None = None  # the largest number of tokens in a text, if the program has a limit

    def __init__(self, folder: Path, exact: bool):
        self.folder, self.exact = folder, exact

    @classmethod
    def installed(cls) -> bool:
        """Whether the packages that the program needs are installed. Only asked if there is an `instead`."""
        return True

    @classmethod
    def refuses(cls, folder: Path) -> str:
        """Why the program cannot read the files of a folder; empty if it can. Only asked if there is an `instead`."""
        return ""

    @classmethod
    def on_devices(cls, folder: Path) -> Iterator[tuple[str, Runtime]]:
        """Pairs (device name, runtime), one for every device that the program finds, as it runs there by default."""
        return iter(())

    @abstractmethod
    def start(self) -> None:
        """Clears the text and the KV cache."""

    @abstractmethod
    def feed(self, ids: Tensor) -> Tensor:
        """Appends token ids, shape (1, length), to the text. Returns the logits after each: (length, words), fp32."""

    def padded(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """The logits of several texts, (length, words) for each, fp32. Each text is token ids of shape (length,).

        The texts are read from their start as one batch, in which shorter ones are padded on the left. The state is
        cleared afterwards. Raises InputError if the program does not accept such a batch.
        """
        longest = max(map(len, texts))
        ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
        mask = torch.tensor([[int(i >= longest - len(text)) for i in range(longest)] for text in texts])
        logits = self._batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        self.start()
        return [rows[longest - len(text) :] for rows, text in zip(logits, texts, strict=True)]

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The logits of a batch from its start, (batch, length, words). All arguments have shape (batch, length)."""
        raise InputError(f"{self.title} does not accept a padded batch: {self.unpadded}")

    def tokenizer(self) -> Any:
        """The tokenizer of the folder, with the interface of transformers. Raises an error if there is none."""
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of a text from its start, (length, words). `ids` has shape (length,)."""
        self.start()
        return self.feed(ids[None])

    def greedy(self, ids: Tensor, count: int) -> list[int]:
        """The `count` most likely tokens after a text, chosen one at a time. `ids` has shape (length,)."""
        tokens = [int(self.logits(ids)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.feed(torch.tensor([tokens[-1:]]))[-1].argmax()))
        return tokens


def open_runtime(format_name: str, folder: Path, exact: bool) -> Runtime:
    """Opens a folder with its format's program. Raises InputError if it is not installed or cannot open the folder."""
    kind = Runtime.registry.find(format_name, str(folder))
    if kind.instead is not None and (not kind.installed() or kind.refuses(folder)):
        kind = kind.instead
    return kind(folder, exact)
