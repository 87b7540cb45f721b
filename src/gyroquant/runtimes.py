"""Programs that run what we write, behind one face: logits of token ids, and tokens one after another."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export import onnx, openvino


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

    def greedy(self, ids: Tensor, count: int) -> tuple[list[int], dict[str, float]]:
        """The most likely token, `count` times, and how many tokens a second were read and written."""
        began = time.perf_counter()
        token = int(self.logits(ids)[-1].argmax())
        read, found = time.perf_counter() - began, [token]
        began = time.perf_counter()
        while len(found) < count:
            token = int(self.feed(torch.tensor([[token]]))[-1].argmax())
            found.append(token)
        written = time.perf_counter() - began
        speeds = {"prefill_tokens_per_second": len(ids) / read}
        return found, speeds | {"decode_tokens_per_second": (count - 1) / written if count > 1 else 0.0}


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
        self._request = core.compile_model(str(folder / openvino.MODEL), device, settings).create_infer_request()
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


class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider."""

    formats = ("onnx",)
    title = "ONNX Runtime"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        try:
            import onnxruntime as ort

            from gyroquant.export.onnx_decoder import in_fp32
        except ImportError as error:
            raise InputError('ONNX Runtime is not installed: pip install "gyroquant[onnx]"') from error
        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        model = (folder / onnx.MODEL).read_bytes()
        self._session = ort.InferenceSession(in_fp32(model) if exact else model, settings, ["CPUExecutionProvider"])
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.start()

    def start(self) -> None:
        self._length, self._past = 0, dict[str, Any]()
        for one in self._session.get_inputs()[3:]:
            _, heads, _, size = one.shape
            self._past[one.name] = self._value(torch.zeros(1, heads, 0, size).numpy())

    def feed(self, ids: Tensor) -> Tensor:
        total = self._length + ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones(1, total, dtype=torch.long),
            "position_ids": torch.arange(self._length, total)[None],
        }
        given = {name: self._value(tensor.numpy()) for name, tensor in inputs.items()}
        logits, *present = self._session.run_with_ort_values(self._outputs, given | self._past)
        self._past, self._length = dict(zip(self._past, present, strict=True)), total
        return torch.from_numpy(logits.numpy()[0])


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
        except (ImportError, ValueError, KeyError) as error:
            raise InputError(f"transformers does not open {folder} here: {error}") from error
        self._past: Any = None

    def start(self) -> None:
        self._past = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        return out.logits[0].float()


def open_runtime(format_name: str, folder: Path, exact: bool) -> Runtime:
    """The program that runs a format. Raises InputError when it is not installed or does not open the folder."""
    return Runtime.kinds[format_name](folder, exact)
