"""Tiny models of every described architecture as GGUF files, by the rules of llama.cpp's converter.

Written from what that converter does (conversion/*.py), not from how gyroquant reads: names by the gguf package, rows
of queries and keys turned to neighbours for the families of Llama, gains plus one for Gemma, and so on. Matrices may be
of any type: those that the gguf package does not make are blocks of random codes, with scales of a size that keeps the
model's numbers in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_models
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.store import GgufStore

NAMES = {
    "llama": "llama", "llama_bias": "llama", "llama_tied": "llama", "mistral": "llama", "mixtral": "llama",
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe",
    "phi3": "phi3", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "granite": "granite",
    "smollm3": "smollm3", "seed_oss": "seed_oss", "ernie4_5": "ernie4_5", "arcee": "arcee", "olmo2": "olmo2",
    "olmo3": "olmo2", "exaone4": "exaone4", "cohere": "command-r", "cohere2": "cohere2", "gpt2": "gpt2",
    "gpt_neox": "gptneox", "starcoder2": "starcoder2", "nemotron": "nemotron",
}  # fmt: skip
_PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3", "arcee")
_PLUS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")
_LAYER_NORM = {
    "cohere": "layer_norm_eps",
    "cohere2": "layer_norm_eps",
    "gpt2": "layer_norm_epsilon",
    "gpt_neox": "layer_norm_eps",
    "starcoder2": "norm_epsilon",
    "nemotron": "norm_eps",
}
_SCALES: dict[Type, tuple[int, ...]] = {  # where the fp16 numbers of a block lie
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
    Type.TQ1_0: (52,), Type.TQ2_0: (64,),
    **dict.fromkeys((Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_NL,
                     Type.IQ4_XS, Type.Q4_0, Type.Q5_0, Type.Q8_0), (0,)),
    Type.Q4_1: (0, 2), Type.Q5_1: (0, 2), Type.Q1_0: (0,),
}  # fmt: skip
_DERIVED = ("layer_types", "rope_parameters", "no_rope_layers", "model_type", "transformers_version")


def write_model(
    path: Path,
    model: Any,
    kind: Type = Type.F32,
    *,
    change: Callable[[dict[str, Any]], None] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> None:
    """A model as a GGUF file with its matrices of one type. `change` may edit the settings and `tensors` the tensors
    before they are written.
    """
    config = model.config
    name = NAMES[config.model_type]
    settings = dict(_settings(config))
    found = dict(_tensors(model))
    found |= _rope_tensors(config)
    if change:
        change(settings)
    if tensors:
        tensors(found)
    writer = gguf.GGUFWriter(path, name)
    for key, value in settings.items():
        _add(writer, f"{name}.{key}", value)
    writer.add_tokenizer_model("none")
    for key, value in found.items():
        large = value.ndim > 1 and "norm" not in key and "_inp" not in key and not key.startswith("position")
        if large and kind not in (Type.F32,):
            writer.add_tensor(key, blocks(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    kind = config.model_type
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    yield "context_length", config.max_position_embeddings
    yield "embedding_length", config.hidden_size
    yield "block_count", config.num_hidden_layers
    yield "feed_forward_length", getattr(config, "intermediate_size", None) or config.n_inner or 4 * config.hidden_size
    yield "attention.head_count", heads
    yield "attention.head_count_kv", getattr(config, "num_key_value_heads", None) or heads
    if width != config.hidden_size // heads or kind not in ("gpt2", "gpt_neox"):
        yield "attention.key_length", width
        yield "attention.value_length", width
    yield "vocab_size", config.vocab_size
    if kind in _LAYER_NORM:
        yield "attention.layer_norm_epsilon", getattr(config, _LAYER_NORM[kind])
    else:
        yield "attention.layer_norm_rms_epsilon", config.rms_norm_eps
    if getattr(config, "rope_parameters", None):
        yield from _rope_settings(config, width)
    if count := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        yield "expert_count", count
        yield "expert_used_count", config.num_experts_per_tok
    if wide := getattr(config, "moe_intermediate_size", None):
        yield "expert_feed_forward_length", wide
    if wide := getattr(config, "shared_expert_intermediate_size", None):
        yield "expert_shared_feed_forward_length", wide
    if kind in ("gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2") or (kind == "phi3" and config.sliding_window):
        yield "attention.sliding_window", config.sliding_window or 0
    if kind == "exaone4":
        yield "attention.sliding_window_pattern", [one == "sliding_attention" for one in config.layer_types]
    for part in ("attn", "final"):
        if (cap := getattr(config, f"{part}_logit_softcapping", None)) is not None:
            yield f"{part}_logit_softcapping", cap
    if kind == "granite":
        yield "logit_scale", config.logits_scaling
        yield "residual_scale", config.residual_multiplier
        yield "embedding_scale", config.embedding_multiplier
        yield "attention.scale", config.attention_multiplier
    if kind in ("cohere", "cohere2"):
        yield "logit_scale", config.logit_scale
    if kind == "gpt_neox":
        yield "use_parallel_residual", config.use_parallel_residual


def _rope_settings(config: Any, width: int) -> Iterator[tuple[str, Any]]:
    rope = config.rope_parameters
    if "full_attention" in rope:
        if config.model_type == "gemma3_text":
            yield "rope.freq_base_swa", float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    yield "rope.freq_base", float(rope["rope_theta"])
    yield "rope.dimension_count", int(width * rope.get("partial_rotary_factor", 1.0))
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings")
    if kind == "linear":
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.type", "yarn"
        yield "rope.scaling.factor", float(rope["factor"])
        yield "rope.scaling.original_context_length", original
    if kind == "longrope":
        if config.model_type != "phi3":
            yield "rope.scaling.type", "longrope"
        yield "rope.scaling.original_context_length", original
        scale = config.max_position_embeddings / original
        yield "rope.scaling.attn_factor", math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{one}.weight": np.array(rope[f"{one}_factor"], np.float32) for one in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    width, base, factors = config.head_dim or config.hidden_size // config.num_attention_heads, rope["rope_theta"], []
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for i in range(0, width, 2):
        wave = 2 * math.pi * base ** (i / width)
        if wave < old / high:
            factors.append(1.0)
        elif wave > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    config = model.config
    kind, heads = config.model_type, config.num_attention_heads
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == NAMES[kind])
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().numpy()
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(value, 2, axis=1), strict=True):
                yield f"blk.{block}.ffn_{part}_exps.weight", half
            continue
        if name.endswith("experts.down_proj"):
            yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", value
            continue
        for part, count in (("q_proj", heads), ("k_proj", getattr(config, "num_key_value_heads", heads))):
            if kind in _PERMUTED and part in name:
                value = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if kind in _PLUS_ONE and name.endswith("norm.weight"):
            value = value + 1
        if "query_key_value" in name:
            value = value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        if kind == "gpt2" and value.ndim > 1 and ("attn" in name or "mlp" in name):
            value = value.T
        if "shared_expert_gate" in name:
            value = value.reshape(-1)
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        yield found, value


def blocks(value: np.ndarray, kind: Type) -> np.ndarray:
    """Values as the bytes of a type: rounded where the gguf package does that, blocks of random codes of about the same
    size elsewhere.
    """
    try:
        return gguf.quantize(np.ascontiguousarray(value, np.float32), kind)
    except NotImplementedError:
        pass
    width, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind) + value.size)
    data = rng.integers(0, 256, (value.size // width, size), np.uint8)
    wanted = float(value.std())
    _scaled(data, kind, 1.0, rng)
    found = 1.0 if kind == Type.Q1_0 else float(gguf.dequantize(data, kind).std())
    _scaled(data, kind, wanted / found, rng)
    return data.reshape(*value.shape[:-1], -1)


def _scaled(data: np.ndarray, kind: Type, size: float, rng: np.random.Generator) -> None:
    """Puts scales around a size into blocks of random bytes."""
    count = len(data)
    if kind == Type.MXFP4:
        data[:, 0] = 127 + round(math.log2(size))
    elif kind == Type.NVFP4:  # E4M3 without a sign: the exponent's bias is 7
        data[:, :4] = np.clip(round((math.log2(size) + 7) * 8), 1, 119)
    elif kind == Type.IQ1_M:  # a nibble in each of the four last numbers
        half = np.full(count, size, "<f2").view("<u2")
        for i in range(4):
            data[:, 49 + 2 * i] = data[:, 49 + 2 * i] & 15 | (half >> 4 * i & 15).astype(np.uint8) << 4
    else:
        for at in _SCALES[kind]:
            numbers = np.full(count, size) if size == 1 else size * rng.uniform(0.8, 1.2, count)
            data[:, at : at + 2] = numbers.astype("<f2").view(np.uint8).reshape(count, 2)


def build(name: str, **changes: Any) -> Any:
    """A tiny model wide enough for the blocks of all types; gains and biases are random. Some layers of those with a
    window see all tokens.
    """
    config = transformers.GemmaConfig(**tiny_models.COMMON) if name == "gemma" else tiny_models.CONFIGS[name]()
    heads = {"n_embd": 256, "n_inner": 512, "n_positions": 1024} if name == "gpt2" else {"head_dim": 64}
    wide = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024} if name != "gpt2" else {}
    if name in ("gemma2", "gemma3"):
        wide["query_pre_attn_scalar"] = changes.get("head_dim", 64)
    kept = {key: value for key, value in config.to_dict().items() if key not in _DERIVED}
    made = type(config)(**(kept | wide | heads | changes))
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    return tiny_models.randomise(model).eval()


@torch.no_grad()
def logits(store: GgufStore, ids: torch.Tensor) -> torch.Tensor:
    """What the model of a file says of a text, ids of shape (length,), in fp32."""
    return store.load()(ids[None]).logits[0]


def one_bit(data: np.ndarray) -> np.ndarray:
    """The values of Q1_0: a bit for the sign of an fp16 number for each 128."""
    parts = data.reshape(-1, 18)
    scale = parts[:, :2].copy().view("<f2").astype(np.float32)
    signs = np.unpackbits(parts[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return (scale * signs).reshape(*data.shape[:-1], -1)


def split(path: Path, stem: Path, starts: list[int]) -> list[Path]:
    """A file in parts, as llama.cpp's gguf-split makes them: each after the first starts with the tensor of one of
    these numbers, and the first alone has the metadata.
    """
    reader = gguf.GGUFReader(path)
    tensors, made = list(reader.tensors), []
    bounds, count = [0, *starts, len(tensors)], len(starts) + 1
    for i in range(count):
        made.append(stem.with_name(f"{stem.name}-{i + 1:05}-of-{count:05}.gguf"))
        writer = gguf.GGUFWriter(made[-1], "llama")
        if i:
            del writer.kv_data[0]["general.architecture"]
        else:
            _copy_metadata(reader, writer)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[bounds[i] : bounds[i + 1]]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return made


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = {"sub_type": field.types[-1]} if field.types[0] == gguf.GGUFValueType.ARRAY else {}
            writer.add_key_value(key, field.contents(), field.types[0], **sub)


def written_types() -> list[Type]:
    """The types that `blocks` makes and llama.cpp decodes."""
    return [Type.F32, Type.F16, Type.BF16, *sorted(_SCALES.keys() - {Type.Q1_0}), Type.IQ1_M, Type.MXFP4, Type.NVFP4]


def difference(path: Path, length: int = 100) -> float:
    """The largest difference between the logits of gyroquant's reader and of llama.cpp, over the largest of these, in
    fp32. llama.cpp runs a file of other types than fp32 by its own decoding of it.
    """
    from gyroquant.formats.gguf.llama_cpp_runtime import LlamaModel, open_exactly

    store = GgufStore(path)
    ids = torch.randint(3, store.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    plain = all(entry.type == Type.F32 for entry in GgufFile(path).tensors.values())
    model = LlamaModel(path, exact=True) if plain else open_exactly(path)
    wanted = model.feed(ids.tolist())
    return float((logits(store, ids) - wanted).abs().max() / wanted.abs().max())
