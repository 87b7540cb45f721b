"""What the scripts here share that have a program quantize, save, load its own files again, and show what they hold.

No script here imports gyroquant: they run with the interpreter of the program's own environment.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything asked for is on the disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

_SAMPLE = 128  # tokens that a reload is judged by


def arguments(description: str | None) -> argparse.Namespace:
    """MODEL TOKENS OUT, the size, the seed, the settings of the variant as JSON, and where the report goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out", "--report"):
        parser.add_argument(name, type=Path, **({"required": True} if name.startswith("--") else {}))
    for name in ("--bits", "--group-size", "--seed"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={})
    return parser.parse_args()


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes; 0 where the system does not tell.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


class Work:
    """One run: its arguments, its calibration text, its clock, and what becomes of its files."""

    def __init__(self, description: str | None, packages: tuple[str, ...]):
        self.given = arguments(description)
        for name in ("model", "tokens", "out", "report"):
            setattr(self.given, name, getattr(self.given, name).absolute())
        os.chdir(self.given.out)  # some write logs to wherever they are
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
    def outside(self) -> Iterator[None]:
        """What is done in here is not part of the time that the program took."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def remember(self, model: Any, what: str) -> None:
        """Runs the model as the program itself has it; the folder with plain weights is judged by that."""
        with self.outside():
            self._reference = logits(model, self.tokens)
            print(f"perplexity of {_SAMPLE} tokens, {what}: {perplexity(self._reference, self.tokens):.4f}")

    def saved(self) -> None:
        """The program has written its files: time and memory are taken here, before anything is loaded again."""
        with self.outside():
            self._measured = {"seconds": self._seconds, "peak_memory_bytes": peak_memory_bytes()}

    def finish(self, reloaded: Any, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Writes the folder with plain weights, which is what the program's files stand for, and the report.

        `layers` has weight and bias of the rounded ones, by name; the rest is of the reloaded model, to the last bit of
        the files where its loader rounds. The report tells how far the folder's logits are from what the program had.
        """
        inside = tuple(f"{name}." for name in layers)
        plain = {name: value for name, value in reloaded.state_dict().items() if not name.startswith(inside)}
        plain |= {name: value for name, value in self.stored().items() if name in plain}
        for name, (weight, bias) in layers.items():
            plain[f"{name}.weight"] = weight
            if bias is not None:
                plain[f"{name}.bias"] = bias
        model = dense_model(reloaded.config, plain)
        found = logits(model, self.tokens)
        print(f"perplexity of {_SAMPLE} tokens, as plain weights: {perplexity(found, self.tokens):.4f}")
        assert self._reference is not None
        error = float((found - self._reference).norm() / self._reference.norm())
        folder = self.given.out / "dense"
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        versions = {name: version(name) for name in (*self.packages, "torch", "transformers")}
        report = self._measured | {"reload_error": error, "layers": len(layers), "versions": versions}
        self.given.report.write_text(json.dumps(report) + "\n")

    def stored(self) -> dict[str, torch.Tensor]:
        """Every tensor of the program's files."""
        return {name: value for path in self.files.rglob("*.safetensors") for name, value in load_file(path).items()}


def dense_model(config: Any, plain: Mapping[str, torch.Tensor]) -> Any:
    """A model of plain fp32 weights; what is tied may be left out."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in plain.items()}, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and name.startswith("lm_head."))]
    if missing or unexpected:
        raise SystemExit(f"the reloaded model lacks {missing[:3]} and has {unexpected[:3]} too many")
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What a model says to the first tokens of the calibration text, fp32, shape (length, vocabulary)."""
    return model(tokens[:1, :_SAMPLE]).logits[0].float()


def perplexity(said: torch.Tensor, tokens: torch.Tensor) -> float:
    """Perplexity of the same tokens."""
    return float(torch.nn.functional.cross_entropy(said[:-1], tokens[0, 1:_SAMPLE]).exp())


@torch.no_grad()
def by_identity(layer: Callable[[torch.Tensor], torch.Tensor], in_features: int, bias: Any = None) -> torch.Tensor:
    """The weight that a layer really applies, shape (out, in), fp32: its answer to the identity matrix.

    Whatever the layer does to its input first, such as a rotation, is in it. Numbers too small for fp32's exponents,
    which some kernels leave where there should be zeros, are zeros: they would make every product fifty times as slow.
    """
    answer = layer(torch.eye(in_features)).float()
    answer = (answer - bias.float() if bias is not None else answer).T.contiguous()
    return torch.where(answer.abs() < torch.finfo(torch.float32).tiny, 0.0, answer)
