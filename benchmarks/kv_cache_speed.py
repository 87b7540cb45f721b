"""Decode speed and memory of the packed KV cache beside transformers' own in bfloat16, in one run.

    python benchmarks/kv_cache_speed.py [MODEL.gguf] [--bits 2 4] [--lengths 512 2048 8192] [--tokens 8]

Both caches are filled with the same random keys and values, so that no time goes into a prompt. Then the same model, in
bfloat16, generates tokens in turns: some with one cache, some with the other. Reported is the median of a token. The
packed cache centres keys, rotates them online by a Hadamard matrix (R3), and keeps 16 first and 64 last tokens exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GgufConfig
from transformers.utils import logging

import gyroquant as gq
from gyroquant.maps import hadamard
from gyroquant.models.execution.exact_tokens import ExactTokens
from gyroquant.models.execution.online import CacheQuantizer, OnlineMap, attached
from gyroquant.models.graph.sites import HookPoint

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))


def operations(model: Any, bits: int, exact: ExactTokens) -> list[OnlineMap | CacheQuantizer]:
    """R3 and the rounding of the cache at every layer."""
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    online: list[OnlineMap | CacheQuantizer] = []
    for index in range(model.config.num_hidden_layers):
        name = f"model.layers.{index}.self_attn"
        grids = (gq.RealZeroGrid(bits=bits, clip=0.96), gq.RealZeroGrid(bits=bits, clip=0.92))
        online.append(OnlineMap(HookPoint("qk", name), hadamard(size).in_fp32()))
        online.append(CacheQuantizer(name, *grids, key_mean=torch.randn(heads, size).half(), exact=exact))
    return online


def fill(cache: Any, model: Any, length: int) -> None:
    """Random keys and values of `length` tokens in every layer."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.config.num_key_value_heads, length, model.config.head_dim)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*(torch.randn(shape, generator=generator).bfloat16() for _ in range(2)), layer)


def full_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values of all layers."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def seconds(model: Any, cache: Any, tokens: int) -> list[float]:
    """The seconds that each of some tokens takes."""
    times = []
    for _ in range(tokens):
        position = torch.tensor([[cache.get_seq_length()]])
        start = time.perf_counter()
        model(torch.tensor([[11]]), past_key_values=cache, position_ids=position, use_cache=True)
        times.append(time.perf_counter() - start)
    return times


def measure(model: Any, bits: int, length: int, tokens: int) -> dict[str, Any]:
    """Bytes of both caches with `length` tokens, and the median seconds of a token after them."""
    online = operations(model, bits, ExactTokens(16, 64))
    full, times = DynamicCache(), dict[str, list[float]](packed=[], full=[])
    fill(full, model, length)
    with attached(model, online):
        packed = gq.PackedKVCache(model)
        fill(packed, model, length)
    row: dict[str, Any] = {"bits": bits, "tokens": length, "packed": packed.nbytes, "bfloat16": full_bytes(full)}
    for turn in range(3):
        count = 1 if turn == 0 else tokens // 2  # the first is not counted
        with attached(model, online):
            packed_times = seconds(model, packed, count)
        full_times = seconds(model, full, count)
        if turn:
            times["packed"] += packed_times
            times["full"] += full_times
    row |= {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.disable_progress_bar()
    if given.model is None:
        import assets

        given.model = assets.model()
    torch.set_num_threads(given.threads)
    folder, file = given.model.parent, given.model.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    print("| bits | tokens | packed | bfloat16 | ratio | packed ms/token | bfloat16 ms/token | speed |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows = []
    for bits in given.bits:
        for length in given.lengths:
            row = measure(model, bits, length, given.tokens)
            rows.append(row)
            sizes = (
                f"{row['packed'] / 1e6:.2f} MB | {row['bfloat16'] / 1e6:.2f} MB | {row['packed'] / row['bfloat16']:.4f}"
            )
            speed = f"{row['packed_ms']:.0f} | {row['full_ms']:.0f} | {row['full_ms'] / row['packed_ms']:.2f}"
            print(f"| {bits} | {length} | {sizes} | {speed} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
