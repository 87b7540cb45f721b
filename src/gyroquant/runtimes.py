"""Programs that run what we write, behind one face: logits of token ids, and tokens one after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export.openvino import MODEL


class Runtime(ABC):
    """A model opened by a program. `exact` asks for fp32 throughout, otherwise it runs as that program does by default.

    Raises InputError when the program is not installed.
    """

    kinds: ClassVar[dict[str, type[Runtime]]] = {}
    formats: ClassVar[tuple[str, ...]]
    title: ClassVar[str]

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


class OpenVinoRuntime(Runtime):
    """OpenVINO's CPU plugin, or another of its devices."""

    formats = ("openvino",)
    title = "OpenVINO"

    def __init__(self, folder: Path, exact: bool, device: str = "CPU"):
        super().__init__(folder, exact)
        try:
            import openvino as ov

            from gyroquant.export.openvino_decoder import exact_settings
        except ImportError as error:
            raise InputError('OpenVINO is not installed: pip install "gyroquant[openvino]"') from error
        core = ov.Core()
        if device not in core.available_devices:
            raise InputError(f"OpenVINO has no device {device} here; it has {', '.join(core.available_devices)}")
        settings = exact_settings() if exact and device == "CPU" else {}
        self._request = core.compile_model(str(folder / MODEL), device, settings).create_infer_request()
        self._length = 0

    @classmethod
    def on_devices(cls, folder: Path) -> Iterator[tuple[str, Runtime]]:
        import openvino as ov

        core = ov.Core()
        for device in core.available_devices:
            yield f"{device}, {core.get_property(device, 'FULL_DEVICE_NAME')}", cls(folder, False, device)

    def start(self) -> None:
        self._request.reset_state()
        self._length = 0

    def feed(self, ids: Tensor) -> Tensor:
        total = self._length + ids.shape[1]
        inputs = {
            "input_ids": ids.numpy(),
            "attention_mask": torch.ones(1, total, dtype=torch.long).numpy(),
            "position_ids": torch.arange(self._length, total)[None].numpy(),
            "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
        }
        self._request.infer(inputs)
        self._length = total
        return torch.from_numpy(self._request.get_tensor("logits").data[0].copy()).float()


class TransformersRuntime(Runtime):
    """transformers, with whatever it needs for a format; with gyroquant for the folders that gyroquant wrote."""

    formats = ("dense", "compressed-tensors", "gptq", "gguf")
    title = "transformers"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": torch.float32 if exact else "auto"}
        if (folder / "model.gguf").exists():
            options["gguf_file"] = "model.gguf"
        try:
            self._model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        except (OSError, ImportError, ValueError, KeyError) as error:
            raise InputError(f"transformers does not open {folder} here: {error}") from error
        self._past: Any = None

    def start(self) -> None:
        self._past = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        return out.logits[0].float()


class ExecuTorchRuntime(Runtime):
    """ExecuTorch's model of a checkpoint, run by torch, with its KV cache: what `export_llm` makes a program of.

    By default what enters rounded layers is rounded to 8 bits a token; `exact` leaves it alone, by the layers that
    ExecuTorch has for programs that do. Weights are those of the checkpoint either way.
    """

    formats = ("executorch",)
    title = "ExecuTorch"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        try:
            from gyroquant.export.executorch_loader import load_model

            with redirect_stdout(StringIO()):  # the loader prints
                self._model, self._longest = load_model(folder, exact)
        except (ImportError, OSError) as error:
            raise InputError(
                f'ExecuTorch does not open {folder} here: {error}; install it by pip install "gyroquant[executorch]"'
            ) from error
        self._length = 0

    def start(self) -> None:
        self._length = 0

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        if self._length + ids.shape[1] > self._longest:
            raise InputError(f"{self.folder} is made for {self._longest} tokens (export.max_context_length), no more")
        logits = self._model(ids, {"input_pos": torch.tensor([self._length])})
        self._length += ids.shape[1]
        return logits[0].float()


def open_runtime(format_name: str, folder: Path, exact: bool) -> Runtime:
    """The program that runs a format. Raises InputError when it is not installed or does not open the folder."""
    return Runtime.kinds[format_name](folder, exact)
