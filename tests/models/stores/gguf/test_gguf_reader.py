"""A GGUF file opens as the model that it was made of, whatever it says and however it is stored; what would be left out
is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGMLQuantizationType as Type
from gguf_models import build, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf import file as gguf_reading
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.ik_types import IK_TYPES
from gyroquant.models.stores.gguf.rope import _llama3
from gyroquant.models.stores.gguf.store import GgufStore
from gyroquant.models.stores.source import open_model

NARROW = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 128}
ROUTED = {"moe_intermediate_size": 32, "mlp_only_layers": []}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama_tied": {}, "llama_bias": {}, "mistral": {}, "mixtral": {}, "qwen2": {},
    "qwen3": {"head_dim": 32}, "phi3": {}, "gemma": {"tie_word_embeddings": True}, "gemma2": {},
    "gemma3": {"num_hidden_layers": 7}, "granite": {}, "granite_bias": {}, "smollm3": {"num_hidden_layers": 5},
    "seed_oss": {"attention_out_bias": False}, "ernie4_5": {"use_bias": False}, "arcee": {"mlp_bias": False},
    "olmo2": {}, "olmo3": {}, "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "cohere": {}, "cohere2": {}, "starcoder2": {}, "nemotron": {},
    "qwen2_moe": ROUTED | {"norm_topk_prob": False}, "qwen3_moe": ROUTED | {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4, "norm_topk_prob": False},
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONG |= {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.0 + 0.3 * i for i in range(8)]}


@torch.no_grad()
def same(model: Any, store: GgufStore, tolerance: float = 1e-6) -> None:
    ids = tiny_models.tokens(model, batch=1, length=60)[0]
    wanted, found = model(ids[None]).logits[0], gguf_models.logits(store, ids)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_comes_back(name: str, tmp_path: Path) -> None:
    model = build(name, **(NARROW | MODELS[name]))
    write_model(tmp_path / "m.gguf", model)
    store = open_model(tmp_path / "m.gguf")
    same(model, store)
    assert store.config.tie_word_embeddings == model.config.tie_word_embeddings
    if name != "gemma":  # not described for rotations
        assert len(store.graph.blocks) == model.config.num_hidden_layers


@pytest.mark.parametrize(("name", "tolerance"), [("gpt2", 1e-6), ("gpt_neox", 3e-3), ("gpt_neox_serial", 3e-3)])
def test_families_with_fused_attention(name: str, tolerance: float, tmp_path: Path) -> None:
    model = build(name, **({} if name == "gpt2" else NARROW | {"head_dim": None}))
    write_model(tmp_path / "m.gguf", model)
    same(model, open_model(tmp_path / "m.gguf"), tolerance)  # llama.cpp runs GPT-NeoX with GELU by tanh


@pytest.mark.parametrize(
    ("name", "rope"),
    [(name, rope) for name in ("llama", "granite", "mixtral") for rope in (LLAMA3, YARN, LINEAR, LONG)]
    + [(name, rope) for name in ("qwen2", "qwen3", "gemma2") for rope in (YARN, LINEAR)]
    + [("phi3", LONG)],
)
def test_scaled_rope_comes_back(name: str, rope: dict[str, Any], tmp_path: Path) -> None:
    original = {"original_max_position_embeddings": 32} if name == "phi3" else {}
    model = build(name, **NARROW, rope_parameters=rope, **original)
    write_model(tmp_path / "m.gguf", model)
    store = open_model(tmp_path / "m.gguf")
    for key, value in rope.items():
        assert store.config.rope_parameters[key] == (value if key == "rope_type" else pytest.approx(value, rel=1e-6))
    same(model, store)


def test_gemma3_scales_only_the_layers_that_see_everything(tmp_path: Path) -> None:
    rope = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    model = build("gemma3", **NARROW, num_hidden_layers=7, rope_parameters=rope)
    write_model(tmp_path / "m.gguf", model)
    same(model, open_model(tmp_path / "m.gguf"))


@given(
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    high=st.sampled_from([2.0, 4.0, 8.0]),
    original=st.sampled_from([64, 4096, 8192]),
    base=st.sampled_from([1e4, 5e5]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_llama3_is_found_in_its_factors(factor: float, high: float, original: int, base: float) -> None:
    plain = base ** -(np.arange(0, 64, 2) / 64)
    smooth = np.clip((original * plain / (2 * np.pi) - 1) / (high - 1), 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32).astype(np.float64)
    found, seen = _llama3(plain, factors), (factors > 1.001) & (factors < factor * 0.999)
    if seen.sum() > 1:  # otherwise other numbers give the same factors
        assert found is not None
        assert found["factor"] == factor
        assert found["high_freq_factor"] == pytest.approx(high, rel=1e-3)
        assert found["original_max_position_embeddings"] == pytest.approx(original, rel=1e-3)


def test_factors_of_another_shape_are_kept_too(tmp_path: Path) -> None:
    model = build("llama", **NARROW)
    factors = np.linspace(1, 3, 8).astype(np.float32)
    write_model(tmp_path / "m.gguf", model, tensors=lambda found: found.update({"rope_freqs.weight": factors}))
    store = open_model(tmp_path / "m.gguf")
    rotary = type(model)(store.config).model.rotary_emb
    assert torch.allclose(rotary.inv_freq * torch.from_numpy(factors), model.model.rotary_emb.inv_freq, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "none"])
def test_a_factor_without_a_type_scales(kind: str, tmp_path: Path) -> None:
    model = build("llama", **NARROW)
    changes = {"rope.scaling.factor": 4.0} | ({} if kind == "linear" else {"rope.scaling.type": kind})
    write_model(tmp_path / "m.gguf", model, change=lambda found: found.update(changes))
    assert open_model(tmp_path / "m.gguf").config.rope_parameters["rope_type"] == {"none": "default"}.get(kind, kind)


def edited(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.update({key.replace("__", "."): value for key, value in changes.items()})


SETTINGS = {
    "a setting that nobody knows": ("llama", edited(foo=1), r"llama\.foo is 1, which is not described"),
    "a window": ("llama", edited(attention__sliding_window=64), "sliding_window is 64, which llama.cpp does not read"),
    "a soft cap": ("qwen3", edited(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0, which llama.cpp"),
    "a scale of logits": ("llama", edited(logit_scale=0.5), "logit_scale is 0.5"),
    "clamped queries": ("olmo2", edited(attention__clamp_kqv=8.0), "clamp_kqv is 8.0"),
    "both ways": ("llama", edited(attention__causal=False), "attention.causal is False"),
    "scaled experts": ("mixtral", edited(expert_weights_scale=2.5), "expert_weights_scale is 2.5"),
    "layers of their own": ("llama", edited(attention__head_count_kv=[2, 4]), "head_count_kv differs from layer to"),
    "half a head": ("llama", edited(rope__dimension_count=8), "RoPE turns 8 of 16 coordinates"),
    "another kind of scaling": ("llama", edited(rope__scaling__type="su"), "no RoPE scaling of the type 'su'"),
    "keys unlike values": ("llama", edited(attention__value_length=8), "differ in width"),
    "no norm": (
        "llama",
        lambda found: found.pop("attention.layer_norm_rms_epsilon"),
        "lacks llama.attention.la",
    ),
    "bounds of YaRN": (
        "llama",
        edited(rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__yarn_beta_fast=8.0),
        "yarn_beta_fast is 8.0, which llama.cpp does not read",
    ),
    "Granite without RoPE": ("granite", edited(rope__scaling__finetuned=False), "without RoPE"),
    "text for a number": (
        "llama",
        edited(rope__freq_base="much"),
        "cannot be read as a GGUF model|freq_base is 'much'",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_would_be_lost_are_named(case: str, tmp_path: Path) -> None:
    name, change, message = SETTINGS[case]
    write_model(tmp_path / "m.gguf", build(name, **NARROW), change=change)
    with pytest.raises(InputError, match=message):
        open_model(tmp_path / "m.gguf")


def put(**tensors: tuple[int, ...]) -> Callable[[dict[str, np.ndarray]], None]:
    made = {key.replace("__", "."): np.ones(shape, np.float32) for key, shape in tensors.items()}
    return lambda found: found.update(made)


def fused(found: dict[str, np.ndarray]) -> None:
    for kind in ("weight", "bias"):
        parts = [found.pop(f"blk.1.attn_{one}.{kind}", None) for one in "qkv"]
        if parts[0] is not None:
            found[f"blk.1.attn_qkv.{kind}"] = np.concatenate(parts)


TENSORS = {
    "a tensor more": ("llama", put(blk__0__foo__weight=(3,)), r"has blk\.0\.foo\.weight, which llama has no place for"),
    "a bias of the output": ("qwen2", put(blk__1__attn_output__bias=(64,)), r"has blk\.1\.attn_output\.bias"),
    "a bias of the head": ("qwen2", put(output__bias=(96,)), r"has output\.bias, which"),
    "a bias that Qwen3 does not add": (
        "qwen3", put(blk__0__attn_q__bias=(64,), blk__0__attn_output__bias=(64,)), r"has blk\.0\.attn_output\.bias"
    ),
    "a head that Gemma does not have": ("gemma2", put(output__weight=(96, 64)), r"has output\.weight, which"),
    "factors that Qwen2 does not read": ("qwen2", put(rope_freqs__weight=(8,)), r"has rope_freqs\.weight, which llama"),
    "factors for another type": ("llama", put(rope_factors_long__weight=(8,)), r"has rope_factors_long\.weight"),
    "too few factors": ("llama", put(rope_freqs__weight=(7,)), "does not hold 8 numbers above 0"),
    "a second scale": ("qwen2", put(blk__0__ffn_up__scale=(1,)), r"has blk\.0\.ffn_up\.scale, a second scale"),
    "a layer less": ("llama", lambda found: found.pop("blk.1.ffn_up.weight"), r"lacks .*up_proj.weight \(blk\.1"),
    "no embedding": ("llama", lambda found: found.pop("token_embd.weight"), r"lacks token_embd\.weight"),
    "another width": ("llama", put(blk__0__ffn_up__weight=(64, 96)), r"blk\.0\.ffn_up\.weight has rows of 96"),
    "another height": ("llama", put(blk__0__ffn_up__weight=(95, 64)), r"blk\.0\.ffn_up\.weight has 6080 numbers"),
    "a bias that has to be": ("starcoder2", lambda found: found.pop("blk.0.attn_q.bias"), r"blk\.0\.attn_q\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_would_be_lost_are_named(case: str, tmp_path: Path) -> None:
    name, change, message = TENSORS[case]
    write_model(tmp_path / "m.gguf", build(name, **NARROW), tensors=change)
    with pytest.raises(InputError, match=message):
        open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_bias"])
def test_fused_queries_keys_and_values(name: str, tmp_path: Path) -> None:
    model = build(name, **NARROW)
    write_model(tmp_path / "m.gguf", model, tensors=fused)
    same(model, open_model(tmp_path / "m.gguf"))


def test_biases_that_are_not_there_are_zero(tmp_path: Path) -> None:
    model = build("llama_bias", **NARROW)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.bias.zero_()
    write_model(tmp_path / "m.gguf", model, tensors=lambda found: found.pop("blk.0.attn_output.bias"))
    same(model, open_model(tmp_path / "m.gguf"))


def test_a_head_of_its_own_stays_one_even_if_it_is_equal(tmp_path: Path) -> None:
    model = build("llama", **NARROW)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    write_model(tmp_path / "m.gguf", model)
    store = open_model(tmp_path / "m.gguf")
    assert not store.tied
    assert "lm_head.weight" in store.shapes


def test_phi3_attends_to_everything_as_in_llama_cpp(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("phi3", **NARROW, sliding_window=8))
    assert open_model(tmp_path / "m.gguf").config.sliding_window is None


# The package gguf cannot write Q2_0 and the types of ik_llama.cpp. The tests of our export read files with them
TYPES = sorted(gguf_reading._DECODERS.keys() - {42, *(kind.id for kind in IK_TYPES.values())})


@pytest.mark.parametrize("number", TYPES, ids=gguf_reading.kind_name)
def test_every_type_is_decoded(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_reading, "_CHUNK", 600)  # two rows at once
    kind = Type(number)
    values = np.random.default_rng(0).normal(size=(3, 5, 256)).astype(np.float32)
    data = values if kind == Type.F32 else gguf_models.blocks(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("first", np.ones(33, np.float32))
    writer.add_tensor("a", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if number == 41:
        wanted = gguf_models.one_bit(data)
    else:
        wanted = gguf.dequantize(data, kind).reshape(values.shape)
    file = GgufFile(tmp_path / "m.gguf")
    assert np.array_equal(file.values("a"), wanted)
    assert np.array_equal(file.values("a", slice(1, 3)), wanted[1:3])
    assert np.abs(wanted).max() > 0


@pytest.mark.parametrize("kind", [Type.I32, Type.F64])
def test_types_without_weights_are_named(kind: Type, tmp_path: Path) -> None:
    dtype = {Type.I32: np.int32, Type.F64: np.float64}[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((96, 64), dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=rf"token_embd\.weight is of the type {kind.name}, which cannot be decoded"):
        open_model(tmp_path / "m.gguf")


def test_architectures_without_a_description_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("llama", **NARROW))
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"bloom"))
    with pytest.raises(InputError, match="architecture bloom, which is not described; these are: llama, qwen2"):
        open_model(tmp_path / "m.gguf")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three parts, the first of which has no tensors."""
    write_model(tmp_path / "whole.gguf", build("llama", **NARROW))
    folder = tmp_path / "parts"
    folder.mkdir()
    return gguf_models.split(tmp_path / "whole.gguf", folder / "m", [0, 9])


def test_parts_open_by_any_of_them_and_by_their_folder(parts: list[Path]) -> None:
    whole = open_model(parts[0].parent.parent / "whole.gguf")
    for path in (*parts, parts[0].parent):
        store = open_model(path)
        assert store.shapes == whole.shapes
        assert all(torch.equal(store.read([name])[name], whole.read([name])[name]) for name in store.shapes)
    assert store.bits_per_weight() == whole.bits_per_weight()


def test_missing_parts_are_named(parts: list[Path]) -> None:
    for i, path in enumerate(parts):
        other = path.rename(path.with_suffix(".away"))
        with pytest.raises(InputError, match=f"m-0000{i + 1}-of-00003.gguf is missing"):
            open_model(parts[0].parent if i else parts[1])
        other.rename(path)


def test_parts_that_do_not_belong_together_are_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(InputError, match=r"m-00002-of-00003.gguf states that it is part 2 of 3 .*, not 1 of 3"):
        open_model(parts[0])


def test_a_part_by_another_name_says_what_it_is(parts: list[Path]) -> None:
    path = parts[1].rename(parts[1].with_name("model.gguf"))
    with pytest.raises(InputError, match=r"is a part of a model \(split.no is 1, split.count is 3\), but its name"):
        open_model(path)
