"""llama.cpp runs what we write of every architecture, and what it would run differently is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
from missing_packages import LLAMA_CPP, hide
from selection import some, some_pairs
from transformers import PreTrainedModel

import gyroquant as gq
from gyroquant.formats.gguf.runtime import GgufRuntime
from gyroquant.formats.gguf.targets import TARGETS, target_problems
from gyroquant.models.deriving.tiny import default_config, randomise, tiny_config
from gyroquant.models.execution.runner import auto_class
from gyroquant.models.stores.packed import PackedStore

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
# What llama.cpp has built in, and rows that its blocks divide.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": 16, "sliding_window": 128},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
    "phi3": {"sliding_window": None},
    "gemma3_text": {
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        "num_hidden_layers": 7,
    },
    "granitemoeshared": {"shared_intermediate_size": 96},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "olmo3": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
    "cohere2": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
    "seed_oss": {"attention_out_bias": False},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "gpt_neox": {"hidden_act": "gelu_new"},
    "starcoder2": {"sliding_window": None},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "gpt_oss": {"rope_parameters": PLAIN},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "kv_lora_rank": 64},
    "deepseek_v3": {"kv_lora_rank": 64},
    "glm4_moe_lite": {"kv_lora_rank": 64},
    "youtu": {"kv_lora_rank": 64},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
}
MORE = {  # further variants of an architecture
    "granitemoeshared, not shared": ("granitemoeshared", {"shared_intermediate_size": 0}),
    "deepseek_v2, lite": ("deepseek_v2", CHANGES["deepseek_v2"] | {"q_lora_rank": None}),
    "nemotron_h, experts": (
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    ),
    "ernie4_5_moe, none shared": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox, serial": ("gpt_neox", CHANGES["gpt_neox"] | {"use_parallel_residual": False}),
}


FAST = {  # one of each kind of layer; several others differ from these in their numbers
    *("qwen3", "gemma3_text", "phi3", "nemotron", "cohere2", "gpt_neox", "starcoder2", "stablelm, parallel", "olmo2"),
    *("qwen2_moe", "deepseek_v2", "lfm2", "nemotron_h, experts", "gpt_oss", "granitemoeshared", "exaone4"),
}


def build(name: str, changes: dict[str, Any]) -> PreTrainedModel:
    """A tiny model of an architecture with rows that blocks of 32 divide."""
    config = tiny_config(default_config(name))
    widths = {key: 96 for key in WIDTHS if getattr(config, key, None)}
    settings = config.to_dict() | widths | changes
    config = type(config)(**{key: value for key, value in settings.items() if key != "layer_types" or value})
    return randomise(auto_class(config).from_config(config, dtype=torch.float32)).eval()


def rounded(name: str, out: Path, changes: dict[str, Any], **weights: Any) -> PackedStore:
    return saved_models.rounded(build(name, changes), out, **{"bits": 8, "group_size": 32} | weights)


@pytest.mark.parametrize("name", some([*TARGETS, *MORE], FAST))
def test_llama_cpp_runs_it(name: str, tmp_path: Path) -> None:
    model_type, changes = MORE.get(name, (name, CHANGES.get(name, {})))
    store = rounded(model_type, tmp_path / "ours", changes)
    gq.export(store.folder, "gguf", tmp_path / "gguf", check=False)
    from gyroquant.formats.gguf.llama_cpp_runtime import LlamaCppRuntime

    ids = torch.randint(10, 90, (40,), generator=torch.Generator().manual_seed(1))
    ours = saved_models.our_logits(store.folder, ids.tolist())
    runtime = LlamaCppRuntime(tmp_path / "gguf", exact=True)
    steps = [runtime.feed(part[None]) for part in (ids[:32], *ids[32:].split(1))]
    gelu = any("gelu" in str(value) for value in TARGETS[model_type].fixed.values())
    limit = 5e-4 if gelu else 5e-5  # llama.cpp takes GELU from a table of fp16 numbers
    assert float((torch.cat(steps) - ours).abs().max() / ours.abs().max()) < limit


@pytest.mark.parametrize(
    ("name", "symmetric"),
    some_pairs(["qwen3_moe", "gemma", "olmo2"], [True, False], [("qwen3_moe", False), ("gemma", True)]),
)
def test_our_own_reader_reads_it(name: str, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with 4-bit zero points too: they are compared with the weights of the file, whose offsets are fp16."""
    hide(monkeypatch, *LLAMA_CPP)
    store = rounded(name, tmp_path / "ours", CHANGES.get(name, {}), bits=4, symmetric=symmetric)
    check = gq.export(store.folder, "gguf", tmp_path / "gguf")["check"]
    assert check["runtime"] == GgufRuntime.title
    exact = symmetric or name == "qwen3_moe"
    assert check["relative_logit_error"] < (1e-5 if exact else 1e-2)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "runs qwen3moe with norm_topk_prob True, but this model has False"),
        (
            "gpt_neox",
            {"hidden_act": "gelu"},
            "does not support the activation gelu for gptneox; it supports gelu_pytorch",
        ),
        ("gemma2", {"query_pre_attn_scalar": 256}, "divides the scores of gemma2 by the root of"),
        ("gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}, "each 2th layer of gemma2"),
        ("nemotron", {"head_dim": 8}, "needs heads of nemotron that are as wide together as the model"),
        ("lfm2", {"layer_types": ["full_attention"] * 4}, "only with both convolutions and attention"),
        ("olmoe", {"num_key_value_heads": 2}, "only with a key and value head for each query head"),
        ("deepseek_v3", {"rope_interleave": False}, "turns neighbours in the heads of deepseek2"),
        ("smollm3", {"no_rope_layers": [1] * 4}, "leaves RoPE out of every fourth layer"),
    ],
)
def test_what_llama_cpp_has_built_in_is_checked(name: str, changes: dict[str, Any], reason: str) -> None:
    config = build(name, CHANGES.get(name, {})).config
    assert list(target_problems(config)) == []
    for key, value in changes.items():
        setattr(config, key, value)
    assert any(reason in problem for problem in target_problems(config)), list(target_problems(config))


def test_a_head_of_its_own_is_refused_where_llama_cpp_takes_the_embedding(tmp_path: Path) -> None:
    store = saved_models.rounded(build("gemma", {}), tmp_path / "ours", {"R1": {"method": "hadamard"}})
    with pytest.raises(gq.InputError, match=r"takes the embedding as the head of gemma, .* leave R1 out of the recipe"):
        gq.export(store.folder, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
