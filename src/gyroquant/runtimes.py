"""Programs that run what we write, behind one face: logits of token ids, and tokens one after another."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gyroquant.errors import InputError
from gyroquant.export import onnx, openvino
from gyroquant.export.gguf import FILE
from gyroquant.export.llama_cpp import LlamaModel, LlamaTokenizer, open_exactly


class Runtime(ABC):
    """A model opened by a program. `exact` asks for fp32 throughout, otherwise it runs as that program does by default.

    Raises InputError when the program is not installed. Without its `package` another program is asked `instead`.
    """

    kinds: ClassVar[dict[str, type[Runtime]]] = {}
    formats: ClassVar[tuple[str, ...]]
    title: ClassVar[str]
    package: ClassVar[str] = ""
    instead: ClassVar[type[Runtime] | None] = None
    decodes: ClassVar[bool] = False  # weights are fp32 as well where it runs exactly, so that other kernels run

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

    def tokenizer(self) -> Any:
        """The tokenizer of the folder, as transformers' are called. Raises an error where there is none."""
        return AutoTokenizer.from_pretrained(self.folder)

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

    formats = ("dense", "compressed-tensors", "gptq")
    title = "transformers"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": torch.float32 if exact else "auto"}
        if (folder / FILE).exists():
            options["gguf_file"] = FILE
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


class LlamaCppRuntime(Runtime):
    """llama.cpp, on the CPU where it runs exactly. Its kernels for rounded weights round what these meet to 8 bits; it
    runs exactly with weights that it has itself decoded to fp32. transformers reads the file where it is not installed.
    """

    formats = ("gguf",)
    title = "llama.cpp"
    package = "llama_cpp"
    instead = TransformersRuntime
    decodes = True

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._model = open_exactly(folder / FILE) if exact else LlamaModel(folder / FILE)

    def tokenizer(self) -> Any:
        return LlamaTokenizer(self._model)

    def start(self) -> None:
        self._model.forget()

    def feed(self, ids: Tensor) -> Tensor:
        return self._model.feed(ids[0].tolist())


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
    kind = Runtime.kinds[format_name]
    if kind.instead is not None and importlib.util.find_spec(kind.package) is None:
        kind = kind.instead
    return kind(folder, exact)
