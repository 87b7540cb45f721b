"""The checkpoint from which ExecuTorch makes a program of a Llama: `consolidated.00.pth` and `params.json`.

A rounded linear layer with weights of shape (out, in) is stored under its name in Meta's checkpoints as

    weight  int8 (out, in)      steps from -8 to 7
    scales  fp32 (out, groups)  steps are multiples of them
    zeros   fp32 (out, groups)  0

as ExecuTorch 1.5 reads it (examples/models/llama: model.py, source_transformation/pre_quantization.py). What its
`export_llm` is told is in `llm_config.yaml`. RoPE turns neighbours there, so that rows of queries and keys are put in
that order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export.checkpoint import NegativeScales, write_companions
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType, needs_of
from gyroquant.grids import IntegerGrid, QuantizedWeight
from gyroquant.maps import Map, hadamard
from gyroquant.models.online import OnlineMap
from gyroquant.models.packed import PackedStore

CHECKPOINT, PARAMS, SETTINGS = "consolidated.00.pth", "params.json", "llm_config.yaml"
_GROUPS = (256, 128, 64, 32)
_CONTEXT = 2048  # tokens for which a program is made, where the model takes as many
_LLAMA3 = {"low_freq_factor": 1, "original_max_position_embeddings": 8192}  # constants of ExecuTorch's RoPE
_OUTER = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_BLOCK = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm_fn",
    "self_attn.k_norm": "attention.k_norm_fn",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


class ExecuTorch(Format):
    """Steps in groups of one size, the largest of 32, 64, 128 and 256 that divides all groups, whose scales repeat.

    The one map that runs online there is the Hadamard map of a power of two in front of every down_proj.
    """

    name = "executorch"
    title = "ExecuTorch checkpoint"
    carries = Carries(
        weights=(
            WeightType("int4", bits=(1, 2, 3), midrise=True, block=32),
            WeightType("int4", bits=(4,), asymmetric=False, block=32),
        ),
        points=frozenset({"input"}),
        model_types=("llama", "mistral", "qwen2", "qwen3"),
    )

    def problems(self, needs: Needs) -> list[str]:
        known = needs.config is not None and needs.model_type in (self.carries.model_types or ())
        found = [*super().problems(needs), *_hadamards(needs), *(_refusals(needs.config) if known else ())]
        return found or list(_undivided(needs))

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns the group size, whether R4 runs online, groups with a negative scale, and what there
        is to note.
        """
        group, negative = _group_of(needs_of(store)), NegativeScales()
        rounded = store.description["tensors"]
        numbers = range(len(store.graph.blocks))
        # ExecuTorch takes the dtype of the first tensor for that of all, so that scales need it to be fp32
        folder.add({"norm.weight": store.read(["model.norm.weight"])["model.norm.weight"].float()})
        for names in (*(store.graph.block_params(i) for i in numbers), store.graph.outer_params()):
            tensors: dict[str, Tensor] = {}
            for name in names:
                order = _row_order(store, name)
                if name in rounded:
                    tensors |= _arrays(_named(name), store.quantized(name), order, group, negative)
                elif name != "model.norm.weight":
                    tensors[_named(name)] = store.read([name])[name][order]
            folder.add(tensors)
        aliases = {} if "lm_head.weight" in store.shapes else {"output.weight": "tok_embeddings.weight"}
        folder.torch_file(CHECKPOINT, aliases)
        folder.json(PARAMS, _params(store, group))
        write_companions(store, folder)
        online = bool(store.online)
        settings = yaml.safe_dump(_settings(store, group, online, folder), sort_keys=False)
        (folder.partial / SETTINGS).write_text(settings, encoding="utf-8")
        return {"group_size": group, "online_hadamard": online, **negative.facts(), "notes": _notes(store, negative)}


def _refusals(config: Any) -> Iterable[str]:
    """What ExecuTorch would run otherwise than a model is meant."""
    rope = config.rope_parameters
    if config.hidden_act != "silu":
        yield f"ExecuTorch runs {config.model_type} with the activation silu, not {config.hidden_act}"
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"ExecuTorch has RoPE of type default or llama3, not of type {rope['rope_type']}"
    if rope["rope_type"] == "llama3":
        for key, value in _LLAMA3.items():
            if rope[key] != value:
                yield f"ExecuTorch's RoPE of type llama3 has {key} {value}, not {rope[key]}"
    if rope.get("partial_rotary_factor", 1.0) != 1:
        yield "ExecuTorch turns whole heads, here RoPE turns a part of them"
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            yield f"ExecuTorch has no place for the biases ({key}) of {config.model_type}"


def _hadamards(needs: Needs) -> Iterable[str]:
    """Whether the maps that run online are those of ExecuTorch's SpinQuant: in front of each down_proj or of none."""
    remedy = "leave that site out, or in a model with such a width set its method to hadamard, without block"
    maps = [one for one in needs.online if isinstance(one, OnlineMap) and one.insertion.point == "input"]
    places = {one.insertion.module for one in maps}
    for one in maps:
        if not one.insertion.module.endswith(".mlp.down_proj") or not _is_plain_hadamard(one.map):
            yield (
                f"ExecuTorch runs one map online, the Hadamard map over the whole input of every down_proj where that "
                f"has a power of two, not this one of {one.map.n} in front of {one.insertion.module}; {remedy}"
            )
            return
    blocks = getattr(needs.config, "num_hidden_layers", len(places))
    if maps and len(places) != blocks:
        yield f"ExecuTorch runs that map in front of every down_proj or of none, here of {len(places)}; {remedy}"


def _is_plain_hadamard(found: Map) -> bool:
    """Whether a map is Sylvester's Hadamard matrix, however it is put together."""
    if found.n & (found.n - 1):
        return False
    x = torch.randn(2, found.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return bool(torch.allclose(found.apply(x), hadamard(found.n).apply(x), rtol=0, atol=1e-6))


def _group_of(needs: Needs) -> int:
    """The size of the groups of all layers, 0 if there is none. One group a row is read wrongly, so rows have two."""
    grids = [(one.grid, one) for one in needs.layers if isinstance(one.grid, IntegerGrid)]
    found = [(grid.group_of(one.columns, one.name), one.columns) for grid, one in grids]
    return next((size for size in _GROUPS if all(g % size == 0 and c > size for g, c in found)), 0)


def _undivided(needs: Needs) -> Iterable[str]:
    if not _group_of(needs):
        name = next(one.name for one in needs.layers if one.columns <= _GROUPS[-1])
        yield f"ExecuTorch wants two groups of {_GROUPS[-1]} in a row or more, {name} has one; add it to weights.ignore"


def _named(name: str) -> str:
    """A parameter as Meta's checkpoints name it. Raises InputError for one that they do not have."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    number, _, rest = module.removeprefix("model.layers.").partition(".")
    if rest not in _BLOCK:
        raise InputError(f"an {ExecuTorch.title} has no place for {name}; choose another format")
    return f"layers.{number}.{_BLOCK[rest]}.{kind}"


def _row_order(store: PackedStore, name: str) -> Tensor | slice:
    """The order of rows in which the pairs that RoPE turns are neighbours, for all that makes queries and keys. Here
    the first half of each head is paired with the second.
    """
    if name.split(".")[-2] not in ("q_proj", "k_proj", "q_norm", "k_norm"):
        return slice(None)
    rows = torch.arange(store.shapes[name][0])
    return rows.view(-1, 2, store.graph.head_dim // 2).transpose(1, 2).reshape(-1)


def _arrays(
    name: str, weight: QuantizedWeight, order: Tensor | slice, group: int, negative: NegativeScales
) -> dict[str, Tensor]:
    """What is stored for a layer."""
    codes, scale, zero = weight.codes[order], weight.params.scale[order], weight.params.zero[order]
    half = 1 if torch.equal(zero, zero.round()) else 2  # numbers at odd multiples of half a step are counted in halves
    runs = half * codes.unflatten(1, (scale.shape[1], -1)).to(torch.int16) - (half * zero).to(torch.int16)
    turn = (scale < 0) & (runs.amin(-1, keepdim=True) > -8)  # XNNPACK loads no program with negative ones
    steps, scales = torch.where(turn, -runs, runs), torch.where(turn, -scale, scale).float() / half
    negative.found += int((scales < 0).sum())
    scales = scales.squeeze(-1).repeat_interleave(runs.shape[2] // group, 1)
    module = name.removesuffix(".weight")
    return {
        name: steps.flatten(1).to(torch.int8),
        f"{module}.scales": scales,
        f"{module}.zeros": torch.zeros_like(scales),
    }


def _params(store: PackedStore, group: int) -> dict[str, Any]:
    """The shape of a model as ExecuTorch's ModelArgs has it."""
    config, graph, rope = store.config, store.graph, store.config.rope_parameters
    params: dict[str, Any] = {
        "dim": graph.hidden,
        "n_layers": len(graph.blocks),
        "n_heads": graph.heads,
        "n_kv_heads": graph.kv_heads,
        "head_dim": graph.head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": store.shapes["model.embed_tokens.weight"][0],
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "quantization_args": {"group_size": group},
    }
    if rope["rope_type"] == "llama3":
        scaled = {"rope_scale_factor": rope["factor"], "high_freq_factor": rope["high_freq_factor"]}
        params |= {"use_scaled_rope": True, **scaled}
    if config.model_type == "qwen2":
        params["attention_qkv_bias"] = True
    if config.model_type == "qwen3":
        params |= {"use_qk_norm": True, "qk_norm_before_rope": True}
    return params


def _settings(store: PackedStore, group: int, online: bool, folder: OutputFolder) -> dict[str, Any]:
    """What `export_llm` is told: how the checkpoint is read, and a program for XNNPACK with a KV cache. A checkpoint
    without R4 is read as one trained to be rounded is.
    """
    config = store.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    metadata = {"get_bos_id": config.bos_token_id, "get_eos_ids": ends}
    base: dict[str, Any] = {
        "model_class": "llama3",
        "checkpoint": CHECKPOINT,
        "params": PARAMS,
        "metadata": json.dumps({key: value for key, value in metadata.items() if value not in (None, [None])}),
        "preq_mode": "preq_8da4w",
        "preq_group_size": group,
    }
    if (folder.partial / "tokenizer.json").exists():
        base["tokenizer_path"] = "tokenizer.json"
    context = min(config.max_position_embeddings, _CONTEXT)
    return {
        "base": base,
        "model": {"dtype_override": "fp32", "use_kv_cache": True, "use_sdpa_with_kv_cache": True},
        "export": {"max_seq_length": context, "max_context_length": context, "output_name": "model.pte"},
        "quantization": {"use_spin_quant": "native"} if online else {"use_qat": True},
        "backend": {"xnnpack": {"enabled": True, "extended_ops": True}},
    }


def _notes(store: PackedStore, negative: NegativeScales) -> list[str]:
    config = store.config
    notes = ["ExecuTorch rounds what enters these layers to 8 bits a token; XNNPACK rounds scales to bfloat16"]
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if window < config.max_position_embeddings:
        notes.append(f"ExecuTorch attends to all tokens, not to the last {window}: longer texts come out otherwise")
    if negative.found:
        notes.append(
            f"{negative.found} groups have a negative scale, as symmetric grids of 4 bits do: XNNPACK does not load "
            "programs with such; grids of 3 bits and fewer have none here"
        )
    return notes
