"""Intel's auto-round through its own front door, for auto_round_parity.py; runs where gyroquant need not be installed.

    python auto_round_side.py MODEL_FOLDER TOKENS OUT --bits 2 --group-size 64 --iters 50 --batch-size 8

TOKENS is a safetensors file with `tokens`, shape (samples, length). Writes plain weights, as rounded, to OUT and prints
CPU seconds and peak memory as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name)
    for name in ("--bits", "--group-size", "--iters", "--batch-size"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    tokens = load_file(given.tokens)["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    AutoRound(
        model,
        tokenizer,
        scheme=f"W{given.bits}A16",
        group_size=given.group_size,
        sym=False,
        iters=given.iters,
        batch_size=given.batch_size,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        device_map="cpu",
    ).quantize()
    seconds = time.process_time()
    # not ru_maxrss, which a process inherits from the one that started it
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    model.float().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
