"""A model of the shape of a 7B or 70B Llama, with random weights, rotated, rounded by GPTQ and saved: time and memory.

    python benchmarks/large_model.py FOLDER [--shape 7b] [--blocks 32] [--samples 16] [--length 256] [--json FILE]

FOLDER gets the model, made once, one shard in bfloat16 a block, and what is made of it, with R1 and R2 fused, at 4
bits. A run that is stopped goes on. Random weights tell nothing of quality; memory and time do not depend on what
weights are. Peak memory is that of the process that does all of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

import gyroquant as gq
from gyroquant.calibration.text import TokenBatch
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.resources import estimate
from gyroquant.report.console import ConsoleProgress

SHAPES = {"7b": (4096, 11008, 32, 32, 32, 32000), "70b": (8192, 28672, 80, 64, 8, 32000)}
CHANGES = ["transform.R1.method=hadamard", "transform.R2.method=hadamard", "weights.bits=4", "weights.group_size=128"]


def config_of(shape: str, blocks: int | None) -> LlamaConfig:
    """The configuration of a shape, with as many blocks as asked for."""
    hidden, ffn, depth, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def parameters(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the parameters of every shard: one a block, and one for what is around them."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = head * config.num_key_value_heads
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    around = {
        "model.embed_tokens": (config.vocab_size, hidden),
        "model.norm": (hidden,),
        "lm_head": (config.vocab_size, hidden),
    }
    shards = [
        {f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(config.num_hidden_layers)
    ]
    return [{f"{name}.weight": shape for name, shape in shard.items()} for shard in (*shards, around)]


def make(folder: Path, config: LlamaConfig) -> None:
    """Writes a random model, one shard after the other."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, shard in enumerate(track(parameters(config), "make the model")):
        generator = torch.Generator().manual_seed(number)
        name = f"model-{number:05d}.safetensors"
        tensors = {key: random(shape, generator) for key, shape in shard.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)  # last: without it there is no model


def random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights as they are drawn before training; gains are around 1."""
    drawn = torch.empty(shape).normal_(0, 0.02, generator=generator)
    return (drawn + 1 if len(shape) == 1 else drawn).bfloat16()


def run(place: Path, config: LlamaConfig, samples: int, length: int) -> dict[str, Any]:
    """Quantizes the model and returns the manifest, with what it was reckoned to take beforehand."""
    changes = [*CHANGES, f"calibration.nsamples={samples}", f"calibration.seqlen={length}", "proof.nsamples=1"]
    recipe = gq.load_recipe("gptq", [*changes, "proof.seqlen=64"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (samples, length), generator=generator)
    batch = TokenBatch("random tokens", "0", tokens)
    job = prepare(place / "model", place / "out", recipe, batch, offload=place / "offload", overwrite=True)
    return {"estimated": estimate(job).peak_memory_bytes, **pipeline.run(job, ConsoleProgress())}


def main() -> None:
    """Makes the model, quantizes it and prints what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    config = config_of(asked.shape, asked.blocks)
    place = asked.folder / f"{asked.shape}-{config.num_hidden_layers}"
    make(place / "model", config)
    manifest = run(place, config, asked.samples, asked.length)
    shutil.rmtree(place / "offload", ignore_errors=True)
    size = sum(path.stat().st_size for path in (place / "out").iterdir())
    row = {
        "shape": asked.shape,
        "blocks": config.num_hidden_layers,
        "tokens": asked.samples * asked.length,
        "minutes": manifest["seconds"] / 60,
        "estimated_gb": manifest["estimated"] / 1e9,
        "peak_memory_gb": manifest["peak_memory_bytes"] / 1e9,
        "model_gb": sum(path.stat().st_size for path in (place / "model").iterdir()) / 1e9,
        "result_gb": size / 1e9,
        "true_bits": manifest["bits"]["per_weight"],
        "proof": manifest["proof"]["relative_logit_error"],
        "versions": manifest["versions"],
    }
    table = Table("", "value")
    for key, value in row.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
