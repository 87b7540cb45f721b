"""The speed of writing tokens of several exports, in turns, so that a busy machine slows all of them alike.

    python benchmarks/decode_in_turns.py FORMAT=FOLDER FORMAT=FOLDER ... [--rounds 5] [--turn 8]

Every round, each export reads a prompt of 256 tokens; then all write `--turn` tokens in turn, 64 in all, one at a time.
Prints tokens a second in the fastest tenth of the tokens and in the median, and the ratio of both to the first export.
Exports that earlier versions wrote can be rows too: all are run as this version runs them. With FORMAT gguf, llama.cpp
runs the file, as the package xllamacpp has it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from gyroquant.formats.runtime import Runtime, open_runtime

PROMPT, TOKENS = 256, 64


def seconds(runtime: Runtime, ids: torch.Tensor) -> float:
    """How long the runtime takes to append token ids, shape (1, length)."""
    began = time.perf_counter()
    runtime.feed(ids)
    return time.perf_counter() - began


def main() -> None:
    """Reads the arguments, measures and prints one row for each export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+", metavar="FORMAT=FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=int, default=8, help="tokens that an export writes before the next one does")
    given = parser.parse_args()
    pairs = [export.split("=", 1) for export in given.exports]
    runtimes = [open_runtime(kind, Path(folder), exact=False) for kind, folder in pairs]
    draw = torch.Generator().manual_seed(0)
    found: list[list[float]] = [[] for _ in runtimes]
    for _ in range(given.rounds):
        prompt = torch.randint(1000, (1, PROMPT), generator=draw)
        for runtime in runtimes:
            runtime.start()
            runtime.feed(prompt)
        for ids in torch.randint(1000, (TOKENS // given.turn, given.turn + 1, 1, 1), generator=draw):
            for runtime, each in zip(runtimes, found, strict=True):
                runtime.feed(ids[0])  # the first token after another export has run finds a cold cache
                each += [seconds(runtime, token) for token in ids[1:]]
    print("| export | tokens/s, fastest tenth | to the first | tokens/s, median | to the first |")
    print("|---|--:|--:|--:|--:|")
    fast, middle = (np.array([np.percentile(each, percent) for each in found]) for percent in (10, 50))
    for name, a, b in zip(given.exports, fast, middle, strict=True):
        print(f"| {name} | {1 / a:.0f} | {fast[0] / a:.2f} | {1 / b:.0f} | {middle[0] / b:.2f} |")


if __name__ == "__main__":
    main()
