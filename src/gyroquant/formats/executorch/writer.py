"""The checkpoint from which ExecuTorch makes a program for a Llama model: `consolidated.00.pth` and `params.json`.

A rounded linear layer with weights of shape (out, in) is stored under its name in Meta's checkpoints as

    weight  int8 (out, in)      steps from -8 to 7
    scales  fp32 (out, groups)  a weight is a step times its group's scale
    zeros   fp32 (out, groups)  0

ExecuTorch 1.5 reads this layout (examples/models/llama: model.py, source_transformation/pre_quantization.py).
`llm_config.yaml` holds the settings of its `export_llm`. Its RoPE turns neighbouring coordinates, so the rows of
queries and keys are put in that order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, FormatCapabilities, ModelRequirements, WeightType, requirements_of
from gyroquant.formats.checkpoint import NegativeScales, write_companions
from gyroquant.formats.executorch.layout import CHECKPOINT, PARAMS, SETTINGS
from gyroquant.formats.executorch.runtime import ExecuTorchRuntime
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import IntegerGrid, QuantizedWeight
from gyroquant.maps import Map, hadamard
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.stores.packed import PackedStore

_GROUPS = (256, 128, 64, 32)
_CONTEXT = 2048  # the largest number of tokens for which a program is made
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
    """Steps in groups of one size: the largest of 32, 64, 128 and 256 that divides all groups. Larger groups repeat
    their scale.

    The only online map that ExecuTorch runs is a Hadamard map whose size is a power of two, before every down_proj.
    """

    name = "executorch"
    title = "ExecuTorch checkpoint"
    runtime = ExecuTorchRuntime
    usage = """```sh
cd FOLDER && python -m executorch.extension.llm.export.export_llm --config llm_config.yaml
```"""
    capabilities = FormatCapabilities(
        weights=(
            WeightType("int4", bits=(1, 2, 3), midrise=True, block=32),
            WeightType("int4", bits=(4,), asymmetric=False, block=32),
        ),
        points=frozenset({"input"}),
        model_types=("llama", "mistral", "qwen2", "qwen3"),
    )

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        supported = needs.config is not None and needs.model_type in (self.capabilities.model_types or ())
        settings = _unsupported_settings(needs.config) if supported else ()
        reasons = [*super().incompatibilities(needs), *_unsupported_maps(needs), *settings]
        return reasons or list(_short_rows(needs))

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns the group size, whether R4 runs online, the number of groups with a negative scale,
        and notes.
        """
        group, negative = _group_of(requirements_of(store)), NegativeScales()
        rounded = store.description["tensors"]
        # ExecuTorch assumes that all tensors have the dtype of the first one. Scales are fp32, so the first must be
        folder.add({"norm.weight": store.read(["model.norm.weight"])["model.norm.weight"].float()})
        for names in store.graph.params:
            tensors: dict[str, Tensor] = {}
            for name in names:
                order = _row_order(store, name)
                if name in rounded:
                    tensors |= _arrays(_meta_name(name), store.quantized(name), order, group, negative)
                elif name != "model.norm.weight":
                    tensors[_meta_name(name)] = store.read([name])[name][order]
            folder.add(tensors)
        aliases = {} if "lm_head.weight" in store.shapes else {"output.weight": "tok_embeddings.weight"}
        folder.torch_file(CHECKPOINT, aliases)
        folder.json(PARAMS, _params(store, group))
        write_companions(store, folder)
        online = bool(store.online)
        settings = yaml.safe_dump(_settings(store, group, online, folder), sort_keys=False)
        (folder.partial / SETTINGS).write_text(settings, encoding="utf-8")
        return {"group_size": group, "online_hadamard": online, **negative.facts(), "notes": _notes(store, negative)}


def _unsupported_settings(config: Any) -> Iterable[str]:
    """The settings of a model that ExecuTorch would not follow, one sentence each."""
    rope = config.rope_parameters
    if config.hidden_act != "silu":
        yield f"ExecuTorch does not support the activation {config.hidden_act}; it supports silu"
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"ExecuTorch does not support RoPE of type {rope['rope_type']}; it supports default and llama3"
    if rope["rope_type"] == "llama3":
        for key, value in _LLAMA3.items():
            if rope[key] != value:
                yield f"ExecuTorch's RoPE of type llama3 has {key} {value}, not {rope[key]}"
    if rope.get("partial_rotary_factor", 1.0) != 1:
        yield "ExecuTorch turns whole heads, but this RoPE turns a part of each (partial_rotary_factor)"
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            yield f"ExecuTorch does not support the biases ({key}) of {config.model_type}"


def _unsupported_maps(needs: ModelRequirements) -> Iterable[str]:
    """Why ExecuTorch cannot run the online maps. It runs those of SpinQuant: before every down_proj, or nowhere."""
    remedy = "leave that site out, or, if the width is a power of two, set its method to hadamard, without block"
    ops = [op for op in needs.online if isinstance(op, OnlineMap) and op.hook_point.point == "input"]
    modules = {op.hook_point.module for op in ops}
    for op in ops:
        if not op.hook_point.module.endswith(".mlp.down_proj") or not _is_plain_hadamard(op.map):
            yield (
                "ExecuTorch runs only one online map: the Hadamard map over the whole input of every down_proj, if the "
                f"width is a power of two. It cannot run the map of {op.map.n} before {op.hook_point.module}; {remedy}"
            )
            return
    blocks = getattr(needs.config, "num_hidden_layers", len(modules))
    if ops and len(modules) != blocks:
        yield f"ExecuTorch runs that map before every down_proj or before none, not before {len(modules)}; {remedy}"


def _is_plain_hadamard(m: Map) -> bool:
    """Whether a map is Sylvester's Hadamard matrix, however it is composed."""
    if m.n & (m.n - 1):
        return False
    x = torch.randn(2, m.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return bool(torch.allclose(m.apply(x), hadamard(m.n).apply(x), rtol=0, atol=1e-6))


def _group_of(needs: ModelRequirements) -> int:
    """The group size of all layers, or 0 if no size fits. ExecuTorch reads rows of a single group wrongly, so a row
    needs at least two.
    """
    grids = [(layer.grid, layer) for layer in needs.layers if isinstance(layer.grid, IntegerGrid)]
    groups = [(grid.group_of(layer.columns, layer.name), layer.columns) for grid, layer in grids]
    return next((size for size in _GROUPS if all(g % size == 0 and c > size for g, c in groups)), 0)


def _short_rows(needs: ModelRequirements) -> Iterable[str]:
    if not _group_of(needs):
        name = next(layer.name for layer in needs.layers if layer.columns <= _GROUPS[-1])
        yield (
            f"ExecuTorch needs at least two groups of {_GROUPS[-1]} in a row, and {name} has one; "
            "add it to weights.ignore"
        )


def _meta_name(name: str) -> str:
    """The name of a parameter in Meta's checkpoints. Raises InputError if they do not have it."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    number, _, rest = module.removeprefix("model.layers.").partition(".")
    if rest not in _BLOCK:
        raise InputError(f"an {ExecuTorch.title} cannot hold {name}; choose another format")
    return f"layers.{number}.{_BLOCK[rest]}.{kind}"


def _row_order(store: PackedStore, name: str) -> Tensor | slice:
    """The order of rows that makes the pairs of RoPE neighbours, for all parameters of queries and keys. In our order,
    the first half of each head is paired with the second. Other parameters keep their order.
    """
    if name.split(".")[-2] not in ("q_proj", "k_proj", "q_norm", "k_norm"):
        return slice(None)
    rows = torch.arange(store.shapes[name][0])
    return rows.view(-1, 2, store.graph.head_dim // 2).transpose(1, 2).reshape(-1)


def _arrays(
    name: str, weight: QuantizedWeight, order: Tensor | slice, group: int, negative: NegativeScales
) -> dict[str, Tensor]:
    """The tensors that are stored for a layer. Adds its negative scales to `negative`."""
    codes, scale, zero = weight.codes[order], weight.params.scale[order], weight.params.zero[order]
    half = 1 if torch.equal(zero, zero.round()) else 2  # numbers at odd multiples of half a step are counted in halves
    runs = half * codes.unflatten(1, (scale.shape[1], -1)).to(torch.int16) - (half * zero).to(torch.int16)
    turn = (scale < 0) & (runs.amin(-1, keepdim=True) > -8)  # XNNPACK does not load programs with negative scales
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
    """The sizes and settings of a model, by the names of ExecuTorch's ModelArgs."""
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
    """The settings of `export_llm`: how to read the checkpoint, and a program for XNNPACK with a KV cache. A checkpoint
    without R4 is read like one of quantization-aware training (`use_qat`).
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
    notes = [
        "ExecuTorch rounds the inputs of these layers to 8 bits, token by token; XNNPACK rounds scales to bfloat16"
    ]
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if window < config.max_position_embeddings:
        notes.append(f"ExecuTorch attends to all tokens, not to the last {window}: longer texts give other results")
    if negative.found:
        notes.append(
            f"{negative.found} groups have a negative scale, which symmetric grids of 4 bits use: XNNPACK does not "
            "load programs with negative scales; grids of 3 bits or fewer do not have them in this format"
        )
    return notes
