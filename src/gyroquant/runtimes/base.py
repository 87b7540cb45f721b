"""What every program that runs a model does: logits of token ids, and tokens one after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gyroquant.errors import InputError


class Runtime(ABC):
    """A model opened by a program. `exact` asks for fp32 throughout, otherwise it runs as that program does by default.

    Raises InputError when the program is not installed. Without its `package` another program is asked `instead`.
    """

    kinds: ClassVar[dict[str, type[Runtime]]] = {}
    formats: ClassVar[tuple[str, ...]]
    title: ClassVar[str]
    package: ClassVar[str] = ""
    instead: ClassVar[type[Runtime] | None] = None
    unpadded: ClassVar[str] = ""  # why it takes no padded batch; empty where it does
    longest: int | None = None  # tokens of a text, where the program knows

    def __init_subclass__(cls) -> None:
        for name in cls.formats:
            Runtime.kinds[name] = cls

    def __init__(self, folder: Path, exact: bool):
        self.folder, self.exact = folder, exact

    @classmethod
    def on_devices(cls, folder: Path) -> Iterator[tuple[str, Runtime]]:
        """The model on every device that the program finds here, as it runs there by default; by the device's name."""
        return iter(())

    @abstractmethod
    def start(self) -> None:
        """Forgets all text."""

    @abstractmethod
    def feed(self, ids: Tensor) -> Tensor:
        """Reads on, ids of shape (1, length); returns the logits behind each of them, (length, words), fp32."""

    def padded(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """The logits of several texts, each of shape (length,), read from their start as one batch in which shorter
        ones are padded on the left; (length, words) of each, fp32. Forgets them again. Raises InputError where the
        program takes no such batch.
        """
        longest = max(map(len, texts))
        ids = torch.stack([torch.nn.functional.pad(one, (longest - len(one), 0)) for one in texts])
        mask = torch.tensor([[int(i >= longest - len(one)) for i in range(longest)] for one in texts])
        logits = self._batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        self.start()
        return [rows[longest - len(one) :] for rows, one in zip(logits, texts, strict=True)]

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The logits of a batch read from its start, (batch, length, words); all arguments are (batch, length)."""
        raise InputError(f"{self.title} takes no padded batch: {self.unpadded}")

    def tokenizer(self) -> Any:
        """The tokenizer of the folder, as transformers' are called. Raises an error where there is none."""
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of a text from its start, ids of shape (length,)."""
        self.start()
        return self.feed(ids[None])

    def greedy(self, ids: Tensor, count: int) -> list[int]:
        """The most likely token, `count` times, behind a text of shape (length,)."""
        found = [int(self.logits(ids)[-1].argmax())]
        while len(found) < count:
            found.append(int(self.feed(torch.tensor([found[-1:]]))[-1].argmax()))
        return found
