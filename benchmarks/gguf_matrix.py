"""Tiny GGUF files of every type, architecture and scaling of RoPE, opened by gyroquant and by llama.cpp.

    python benchmarks/gguf_matrix.py [--json FILE]

Random models (hidden size 256, 4 heads) are written by the rules of llama.cpp's converter, and logits of 100 tokens
compared in fp32: KV cache in fp32, no flash attention. Files of other types than F32 are compared with llama.cpp run on
its own decoding of the same file to fp32, as its kernels round activations for them. The difference is the largest of
logits over the largest logit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType as Type

from gyroquant.errors import InputError
from gyroquant.formats.gguf.llama_cpp import distribution
from gyroquant.system.environment import versions

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
import gguf_models

THETA = 10000.0
LIMIT = 1e-3
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
}
FACTORS = {"short_factor": [1 + 0.05 * i for i in range(32)], "long_factor": [1 + 0.3 * i for i in range(32)]}
for label, original in (("longrope, short", 768), ("longrope, long", 64)):
    ROPES[label] = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "original_max_position_embeddings": original,
    } | FACTORS
ROUTED = {"moe_intermediate_size": 256, "mlp_only_layers": []}
NEEDED: dict[str, dict[str, Any]] = {  # what llama.cpp has built in
    "gemma": {"tie_word_embeddings": True}, "gemma3": {"num_hidden_layers": 7}, "smollm3": {"num_hidden_layers": 5},
    "seed_oss": {"attention_out_bias": False}, "ernie4_5": {"use_bias": False}, "arcee": {"mlp_bias": False},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "qwen2_moe": ROUTED | {"norm_topk_prob": False, "shared_expert_intermediate_size": 256},
    "qwen3_moe": ROUTED | {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4, "norm_topk_prob": False},
}  # fmt: skip
ALL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "granite", "smollm3", "seed_oss",
    "ernie4_5", "arcee", "olmo2", "olmo3", "exaone4", "cohere", "cohere2", "gpt2", "gpt_neox", "gpt_neox_serial",
    "starcoder2", "nemotron", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
]  # fmt: skip
TYPES = [kind for kind in gguf_models.written_types() if kind != Type.F32]
IMPOSSIBLE = {  # what llama.cpp has no place for
    ("qwen2", "llama3"): "llama.cpp reads rope_freqs.weight for llama, granite, arcee and exaone4 only",
    ("gemma2", "longrope"): "llama.cpp reads rope_factors_*.weight for llama, granite and phi3 only",
    ("gemma2", "no tie"): "llama.cpp always ties the head of gemma, gemma2, cohere and cohere2",
    ("phi3", "llama3"): "transformers' Phi-3 takes longrope only; read as that, see linear and yarn of phi3",
    ("ernie4_5", "bias"): "llama.cpp adds no biases in its feed-forward part, transformers' use_bias wants them",
    ("opt", "none"): "llama.cpp has no such architecture; helium, glm and others neither",
    ("llama", "F64"): "no model weights; refused by name, as the integer types and Q8_1, Q8_K",
}


@dataclass(frozen=True)
class Combination:
    """A file to be made and opened: an architecture with its changes, a type, a scaling of RoPE."""

    name: str
    kind: Type = Type.F32
    rope: str = "none"
    bias: bool = False
    tie: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        changes = NEEDED.get(self.name, {}) | self.changes
        rope = ROPES[self.rope]
        if rope is not None:
            local = {"rope_type": "default", "rope_theta": THETA}
            split = {"full_attention": rope, "sliding_attention": local}
            changes["rope_parameters"] = split if self.name in ("gemma3", "olmo3") else rope
            if self.name == "phi3":
                changes["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if self.tie:
            changes["tie_word_embeddings"] = True
        if self.bias:
            changes |= {"attention_bias": True} | ({"mlp_bias": True} if self.name in ("llama", "granite") else {})
        return gguf_models.build(self.name, **changes)


def combinations() -> Iterator[Combination]:
    """Every architecture, every scaling and every type, each with several others."""
    yield from (Combination(name) for name in ALL)
    yield from (Combination(name, rope=rope) for name in ("llama", "granite") for rope in ROPES if rope != "none")
    for name in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "seed_oss", "olmo2", "mixtral", "qwen3_moe"):
        yield from (Combination(name, rope=rope) for rope in ("linear", "yarn"))
    yield from (Combination("phi3", rope=rope) for rope in ("longrope, short", "longrope, long"))
    yield from (Combination(name, rope="llama3") for name in ("mistral", "arcee", "exaone4", "mixtral"))
    yield from (Combination(name, bias=True) for name in ("llama", "granite"))
    for name in ("llama", "qwen2", "qwen3", "phi3", "gemma3", "granite", "smollm3", "starcoder2"):
        yield Combination(name, tie=True)
    yield Combination("llama", bias=True, tie=True, rope="llama3")
    yield Combination("qwen2", tie=True, rope="yarn")
    for i, kind in enumerate(TYPES):
        yield Combination("llama", kind, rope=list(ROPES)[i % len(ROPES)], bias=i % 2 == 1, tie=i % 3 == 0)
        other = ("qwen2", "phi3", "gemma2", "qwen3", "mixtral", "gpt2", "gemma3", "qwen2_moe")[i % 8]
        yield Combination(other, kind, tie=i % 2 == 0 and other in ("qwen2", "qwen3", "phi3"))


def measured(one: Combination, place: Path) -> dict[str, Any]:
    started, path = time.perf_counter(), place / "model.gguf"
    gguf_models.write_model(path, one.build(), one.kind)
    row = {"model": one.name, "type": one.kind.name, "rope": one.rope, "bias": one.bias, "tie": one.tie}
    row["against"] = "the file" if one.kind == Type.F32 else "its decoding"
    try:
        row["difference"] = gguf_models.difference(path)
    except InputError as error:
        row["error"] = str(error).replace(str(place), "")
    return row | {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    print("| model | type | RoPE | bias | tied | llama.cpp runs | difference |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for one in combinations():
            rows.append(row := measured(one, Path(place)))
            found = f"{row['difference']:.1e}" if "difference" in row else row["error"]
            marks = ["x" if row[key] else "" for key in ("bias", "tie")]
            cells = (row["model"], row["type"], row["rope"], *marks, row["against"], found)
            print("| " + " | ".join(cells) + " |", flush=True)
    for (name, what), why in IMPOSSIBLE.items():
        print(f"left out: {name}, {what}: {why}")
    differences = [row["difference"] for row in rows if "difference" in row]
    failed = [row for row in rows if not row.get("difference", 1) <= LIMIT]
    print(f"{len(rows)} combinations, {len(failed)} of them above {LIMIT:.0e}; the largest: {max(differences):.1e}")
    used = versions() | {name: version(name) for name in (distribution(), "gguf")}
    print(used)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "largest": max(differences), "versions": used}, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
