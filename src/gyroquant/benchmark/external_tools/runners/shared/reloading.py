"""Functions of the runners: arguments, time and memory, reference logits, plain weights, and the report.

No runner imports gyroquant: it runs with the interpreter of the external tool's environment.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are on the disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

_SAMPLE = 128  # tokens on which models are compared


def arguments(description: str | None) -> argparse.Namespace:
    """The arguments of a runner: MODEL TOKENS OUT, the grid, the seed, the variant's settings as JSON, the report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out", "--report"):
        parser.add_argument(name, type=Path, **({"required": True} if name.startswith("--") else {}))
    for name in ("--bits", "--group-size", "--seed"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={})
    return parser.parse_args()


def peak_memory_bytes() -> int:
    """The peak resident memory of this process so far, in bytes; 0 if the system does not report it.

    This is not `ru_maxrss`, which a process inherits from its parent.
    """
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else 0


class Work:
    """One run of a tool: its arguments, calibration tokens, time, memory, files and report."""

    def __init__(self, description: str | None, packages: tuple[str, ...]):
        self.given = arguments(description)
        for name in ("model", "tokens", "out", "report"):
            setattr(self.given, name, getattr(self.given, name).absolute())
        os.chdir(self.given.out)  # some tools write logs to the working folder
        self.packages = packages
        self.files = self.given.out / "files"
        self.tokens = load_file(self.given.tokens)["tokens"]
        self.tokenizer = AutoTokenizer.from_pretrained(self.given.model)
        self._since = time.perf_counter()
        self._seconds = 0.0
        self._measured: dict[str, Any] = {}
        self._reference: torch.Tensor | None = None
        torch.manual_seed(self.given.seed)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """The body of this context does not count in the time of the tool."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def set_reference(self, model: Any, state: str) -> None:
        """Runs the tool's own model. The folder with plain weights is compared with its logits.

        state: "in memory" or "reloaded", for the log.
        """
        with self.untimed():
            self._reference = logits(model, self.tokens)
            print(f"perplexity of {_SAMPLE} tokens, {state}: {perplexity(self._reference, self.tokens):.4f}")

    def stop_clock(self) -> None:
        """Records time and memory. To be called after the tool has written its files, before they are loaded again."""
        with self.untimed():
            self._measured = {"seconds": self._seconds, "peak_memory_bytes": peak_memory_bytes()}

    def finish(self, reloaded: Any, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Writes the folder with the plain weights that the tool's files decode to, and the report.

        layers: weight and bias of the rounded layers, by name. All other parameters come from the reloaded model or, if
            the tool's files have them under the same name, from the files, because a loader may round.

        The report states the relative error of the folder's logits against the reference.
        """
        inside = tuple(f"{name}." for name in layers)
        plain = {name: value for name, value in reloaded.state_dict().items() if not name.startswith(inside)}
        plain |= {name: value for name, value in self.stored().items() if name in plain}
        for name, (weight, bias) in layers.items():
            plain[f"{name}.weight"] = weight
            if bias is not None:
                plain[f"{name}.bias"] = bias
        model = dense_model(reloaded.config, plain)
        decoded = logits(model, self.tokens)
        print(f"perplexity of {_SAMPLE} tokens, as plain weights: {perplexity(decoded, self.tokens):.4f}")
        assert self._reference is not None
        error = float((decoded - self._reference).norm() / self._reference.norm())
        folder = self.given.out / "dense"
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        versions = {name: version(name) for name in (*self.packages, "torch", "transformers")}
        report = self._measured | {"reload_error": error, "layers": len(layers), "versions": versions}
        self.given.report.write_text(json.dumps(report) + "\n")

    def stored(self) -> dict[str, torch.Tensor]:
        """Every tensor in the tool's files, by name."""
        return {name: value for path in self.files.rglob("*.safetensors") for name, value in load_file(path).items()}


def dense_model(config: Any, plain: Mapping[str, torch.Tensor]) -> Any:
    """A model with plain fp32 weights. `plain` may lack a tied head."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in plain.items()}, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and name.startswith("lm_head."))]
    if missing or unexpected:
        raise SystemExit(f"the reloaded model lacks {missing[:3]} and has unexpected {unexpected[:3]}")
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the first `_SAMPLE` tokens of the calibration text, fp32, shape (length, vocabulary)."""
    return model(tokens[:1, :_SAMPLE]).logits[0].float()


def perplexity(scores: torch.Tensor, tokens: torch.Tensor) -> float:
    """The perplexity of the same tokens, from their logits."""
    return float(torch.nn.functional.cross_entropy(scores[:-1], tokens[0, 1:_SAMPLE]).exp())


@torch.no_grad()
def by_identity(layer: Callable[[torch.Tensor], torch.Tensor], in_features: int, bias: Any = None) -> torch.Tensor:
    """The weight that a layer applies, shape (out, in), fp32: its output for the identity matrix.

    It includes whatever the layer does to its input first, such as a rotation. Subnormal numbers, which some kernels
    give in place of zeros, become zeros: they would make every product fifty times as slow.
    """
    output = layer(torch.eye(in_features)).float()
    weight = (output - bias.float() if bias is not None else output).T.contiguous()
    return torch.where(weight.abs() < torch.finfo(torch.float32).tiny, 0.0, weight)
