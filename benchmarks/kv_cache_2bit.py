"""Perplexity with a KV cache of few bits, step by step: rotation, clipping, centring, exact tokens, OSCAR.

    python benchmarks/kv_cache_2bit.py [MODEL.gguf --text FILE --validation FILE] [--bits 2 4] [--windows 4]
    python benchmarks/kv_cache_2bit.py ... --bits 2 --clips 0.96/0.92 0.85/0.75       # these clip ratios, all else on

Weights are not rounded. Calibration is 8 windows of 512 tokens of `--text`: for the means of keys and for OSCAR.
Perplexity is that of windows of 1024 tokens, evenly spread over `--validation`, each predicted from its own start.
"Bits" are those of a number in a cache of 8192 tokens, with scales, zero points and exact tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

import gyroquant as gq
from gyroquant.models.execution.online import CacheQuantizer, attached, observing_keys
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.planning import plan_quantizers
from gyroquant.rounding.activations import KeyMean

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
SEQLEN, LENGTH = 1024, 8192
CLIPS = {2: (0.75, 0.65), 4: (0.96, 0.92)}
EXACT = {"first_tokens": 16, "last_tokens": 64}


def rows(bits: int) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Of each row: its name, the method at R2 and R3, and its section `kv_cache`."""
    clip = dict(zip(("key_clip", "value_clip"), CLIPS[bits], strict=True))
    real = {"grid": "real_zero", "bits": bits}
    own_clip = {"key_clip": 0.96, "value_clip": 0.92}
    centred = {"center_keys": True}
    steps: list[tuple[str, str | None, dict[str, Any]]] = [
        ("no rotation", None, real),
        ("Hadamard", "hadamard", real),
        ("+ clip", "hadamard", real | clip),
        ("+ centring", "hadamard", real | clip | centred),
        ("+ exact tokens", "hadamard", real | clip | centred | EXACT),
        ("OSCAR in place of Hadamard", "oscar", real | clip | centred | EXACT),
    ]
    if own_clip != clip:
        steps.append(("OSCAR with its own clip ratios", "oscar", real | own_clip | centred | EXACT))
        steps.insert(0, ("Hadamard, integer zero point", "hadamard", {"bits": bits}))
    return steps


def cache_bits(section: dict[str, Any], size: int) -> float:
    """Bits of a number in a cache of `LENGTH` tokens."""
    grid = gq.RealZeroGrid(bits=section["bits"]) if "grid" in section else gq.IntegerGrid(bits=section["bits"])
    exact = (section.get("first_tokens", 0) + section.get("last_tokens", 0)) / LENGTH
    return (1 - exact) * (grid.bits + grid.group_bits / size) + 16 * exact


def clipped(bits: int, clips: list[str]) -> list[tuple[str, str | None, dict[str, Any]]]:
    """As `rows`, for clip ratios of keys and values such as 0.96/0.92, with centring and exact tokens."""
    found: list[tuple[str, str | None, dict[str, Any]]] = []
    for text in clips:
        clip = dict(zip(("key_clip", "value_clip"), map(float, text.split("/")), strict=True))
        section = {"grid": "real_zero", "bits": bits, "center_keys": True, **clip, **EXACT}
        found += [(f"{method} {text}", method, section) for method in ("hadamard", "oscar")]
    return found


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Of windows of shape (windows, SEQLEN)."""
    losses = [model(window[None], labels=window[None], use_cache=False).loss for window in windows]
    return math.exp(float(torch.stack(losses).mean()))


class Rotated:
    """The model with a method at R2 and R3, and the means of its keys."""

    def __init__(self, load: Any, method: str | None, calibration: Tensor):
        self.model = load()
        self.graph = ModuleStore(self.model).graph
        if method is not None:
            sites = [f"transform.{site}.method={method}" for site in ("R2", "R3")]
            amount = [f"calibration.nsamples={len(calibration)}", f"calibration.seqlen={calibration.shape[1]}"]
            proof = gq.transform(self.model, gq.load_recipe("rtn", [*sites, *amount]), calibration)
            print(f"{method}: relative logit error {proof.relative_logit_error:.1e}", file=sys.stderr, flush=True)
        self.means = self._means(calibration)

    @torch.no_grad()
    def _means(self, calibration: Tensor) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        quantizers = plan_quantizers(self.graph, gq.load_recipe("rtn", ["kv_cache.bits=2"]))
        observers = {op.module: KeyMean() for op in quantizers}
        managers = [observing_keys(self.model, module, mean) for module, mean in observers.items()]
        for manager in managers:
            manager.__enter__()
        for window in calibration:
            self.model(window[None], use_cache=False)
        for manager in reversed(managers):
            manager.__exit__(None, None, None)
        means |= {module: mean.result() for module, mean in observers.items()}
        return means

    def scored(self, section: dict[str, Any], windows: Tensor) -> float:
        """The perplexity with a rounded cache."""
        recipe = gq.load_recipe("rtn", [f"kv_cache={json.dumps(section)}"])
        quantizers = plan_quantizers(self.graph, recipe)
        if recipe.centers_keys:
            quantizers = [
                replace(op, key_mean=self.means[op.module]) if isinstance(op, CacheQuantizer) else op
                for op in quantizers
            ]
        with attached(self.model, quantizers):
            return perplexity(self.model, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4], choices=[2, 4])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--clips", nargs="+", metavar="KEYS/VALUES")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.disable_progress_bar()
    if given.model is None:
        import assets

        given.model, (given.text, given.validation) = assets.model(), assets.texts()
    place = {"pretrained_model_name_or_path": given.model.parent, "gguf_file": given.model.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)

    def load() -> Any:
        settings = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        return AutoModelForCausalLM.from_pretrained(**place, **settings).eval()

    def cut(text: Path, count: int, seqlen: int) -> Tensor:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        whole = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
        return whole[:: max(1, len(whole) // count)][:count]

    calibration, windows = cut(given.text, 8, 512), cut(given.validation, given.windows, SEQLEN)
    models = {None: Rotated(load, None, calibration)}
    exact = perplexity(models[None].model, windows)
    results = [{"row": "unrounded", "bits": 16.0, "perplexity": exact}]
    print(
        f"| cache | bits | perplexity | times unrounded |\n|---|--:|--:|--:|\n| unrounded | 16 | {exact:.2f} | 1 |",
        flush=True,
    )
    size = models[None].model.config.head_dim
    for bits in given.bits:
        for name, method, section in clipped(bits, given.clips) if given.clips else rows(bits):
            if method not in models:
                models[method] = Rotated(load, method, calibration)
            start, true_bits = time.perf_counter(), cache_bits(section, size)
            score = models[method].scored(section, windows)
            results.append({"row": name, "section": section, "bits": true_bits, "perplexity": score})
            print(f"| INT{bits} {name} | {true_bits:.2f} | {score:.2f} | {score / exact:.3f} |", flush=True)
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
