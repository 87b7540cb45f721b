"""What a GGUF file holds, decoded here by the published block layouts, is every weight that was saved; transformers
reads the same model from it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_models
import tiny_models
import torch
from gguf_reading import written
from missing_packages import LLAMA_CPP, hide
from selection import some
from transformers import AutoModelForCausalLM

import gyroquant as gq
from gyroquant import maps
from gyroquant.formats.base import Layer, ModelRequirements, check_fit
from gyroquant.formats.gguf.runtime import GgufRuntime
from gyroquant.formats.gguf.writer import Gguf
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import Fp4Grid, IntegerGrid
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "IQ4_NL": 20, "BF16": 30, "Q2_0": 42}
IDS |= {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35}
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q8_0": 7, "IQ4_NL": 25, "Q2_0": 41}
FILE_TYPES |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
GGUF = Gguf()


def original_order(values: np.ndarray, name: str, store: PackedStore) -> np.ndarray:
    """Rows of queries and keys as transformers has them: llama.cpp keeps the two of a pair of RoPE together."""
    if store.config.model_type not in ("llama", "mistral") or not any(part in name for part in ("q_proj", "k_proj")):
        return values
    heads = store.graph.heads if "q_proj" in name else store.graph.kv_heads
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(values.shape)


def target(name: str) -> str:
    """What a parameter is called in a GGUF file."""
    module, _, kind = name.rpartition(".")
    block = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        block = f"blk.{number}."
    return f"{block}{NAMES[module]}.{kind}"


def check(store: PackedStore, tensors: dict[str, Any], tolerance: float = 0.0) -> Counter[str]:
    """Everything in the file is what the store has, and there is nothing else. Returns the types of rounded weights."""
    assert tensors.keys() == {target(name) for name in store.shapes}
    types: Counter[str] = Counter()
    for name in store.shapes:
        kind, values = tensors[target(name)]
        wanted = store.read([name])[name].float().numpy()
        found = original_order(values, name, store)
        worst = float(np.abs(found - wanted).max())
        in_codes = name in store.description["tensors"]
        assert worst <= (tolerance * float(np.abs(wanted).max()) if in_codes else 0), name
        types[next(one for one, number in IDS.items() if number == kind)] += in_codes
        assert in_codes == (kind not in (0, 1, 30))
        assert wanted.ndim > 1 or kind == 0
    return +types


def same_logits(store: PackedStore, out: Path, tolerance: float = 1e-5) -> None:
    """transformers makes the same model of the file as of our own folder."""
    ours = gq.load(store.folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    ids = tiny_models.tokens(ours)
    with torch.no_grad():
        wanted, found = ours(ids).logits, theirs(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


MODELS = {
    "llama": {},
    "llama_tied": {},
    "llama_bias": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers does not read it from a file and takes this
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in MODELS for kind in ("Q4_0", "Q4_1")), ("llama", "Q8_0")]
)
def test_everything_comes_back(name: str, kind: str, tmp_path: Path) -> None:
    settings = {"Q4_0": {}, "Q4_1": {"symmetric": False}, "Q8_0": {"bits": 6, "symmetric": False}}[kind]
    store = saved_models.rounded(tiny_models.build(name, **MODELS[name]), tmp_path / "ours", **settings)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    exact = kind != "Q4_1"
    assert check(store, tensors, 0 if exact else 5e-4) == {kind: 14}
    around = 1 if name == "llama_tied" else 2
    assert facts["types"] == {kind: 14, "F16": around, "F32": len(tensors) - 14 - around}
    assert (facts["deviation"] == 0) == exact
    assert facts["deviation"] < 5e-4
    assert metadata["general.architecture"] == store.config.model_type.replace("mistral", "llama")
    assert metadata["general.file_type"] == FILE_TYPES[kind]
    if name != "llama_bias":  # transformers does not look for its biases
        same_logits(store, tmp_path / "gguf", 1e-5 if exact else 1e-3)


@pytest.mark.parametrize("group_size", [32, 64])
def test_numbers_of_iq4_nl_come_back(group_size: int, tmp_path: Path) -> None:
    weights = {"grid": "lookup", "table": "iq4_nl", "group_size": group_size, "solver": "gptq"}
    recipe = {"weights": weights, "calibration": {"nsamples": 4, "seqlen": 32}, "proof": {"seqlen": 32}}
    text, words = [tiny_models.prose(3000)], tiny_models.tokenizer()
    gq.quantize(tiny_models.build("llama", **WIDE), recipe, text, out=tmp_path / "ours", tokenizer=words)
    store = open_model(tmp_path / "ours")
    assert isinstance(store, PackedStore)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    assert check(store, tensors) == {"IQ4_NL": 14}
    assert metadata["general.file_type"] == FILE_TYPES["IQ4_NL"]
    assert facts["deviation"] == 0
    scales = torch.cat([store.quantized(name).params.scale.flatten() for name in store.description["tensors"]])
    assert bool((scales < 0).any())
    same_logits(store, tmp_path / "gguf")


@pytest.mark.parametrize(
    "settings", some([{"bits": 2}, {"bits": 3}, {"bits": 4, "four_bits": "IQ4_XS"}, {"bits": 6}], [{"bits": 2}])
)
def test_k_quants_come_back_after_every_step(settings: dict[str, Any], tmp_path: Path) -> None:
    """Rotated, with a target, GPTQ and refinement."""
    weights = {"grid": "k_quant", **settings, "solver": "gptq", "target": {"share": 0.5}, "refine": {"passes": 2}}
    rotated = {"R1": {"method": "hadamard"}, "R2": {"method": "hadamard"}}
    recipe = {"transform": rotated, "weights": weights, "calibration": {"nsamples": 4, "seqlen": 32}}
    text, words = [tiny_models.prose(3000)], tiny_models.tokenizer()
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    model = tiny_models.build("llama", **wide)
    gq.quantize(model, recipe | {"proof": {"seqlen": 32}}, text, out=tmp_path / "ours", tokenizer=words)
    store = open_model(tmp_path / "ours")
    assert isinstance(store, PackedStore)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    name = settings.get("four_bits", f"Q{settings['bits']}_K")
    assert check(store, tensors) == {name: 14}
    assert metadata["general.file_type"] == FILE_TYPES[name]
    assert facts["deviation"] == 0
    same_logits(store, tmp_path / "gguf")


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_come_back(kind: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    recipe = {"weights": {"grid": "ternary", "kind": kind}, "proof": {"seqlen": 32}}
    model = tiny_models.build("llama", **wide)
    gq.quantize(model, recipe, out=tmp_path / "ours", tokenizer=tiny_models.tokenizer())
    store = open_model(tmp_path / "ours")
    assert isinstance(store, PackedStore)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    assert check(store, tensors) == {kind: 14}
    assert metadata["general.file_type"] == FILE_TYPES[kind]
    assert facts["deviation"] == 0
    same_logits(store, tmp_path / "gguf")


def test_it_opens_where_there_is_no_gyroquant(tmp_path: Path) -> None:
    rotated = {"R1": {"method": "hadamard"}, "R2": {"method": "hadamard"}}
    store, ids = saved_models.rounded(tiny_models.build("llama_tied"), tmp_path / "ours", rotated), [5, 17, 40, 8]
    written(store, tmp_path / "gguf")
    found = saved_models.logits_without_us(tmp_path / "gguf", ids, gguf_file="model.gguf")
    torch.testing.assert_close(found, saved_models.our_logits(store.folder, ids), rtol=1e-5, atol=1e-5)


def test_the_metadata_describe_the_model(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama", **WIDE), tmp_path / "ours")
    facts, metadata, _ = written(store, tmp_path / "gguf")
    assert metadata == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "ours",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 128,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": 96,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "none",
    }
    (note,) = facts["notes"]
    assert "the file has no tokenizer" in note
    assert "WordLevel" in note


@pytest.mark.parametrize(
    ("bits", "settings", "group_size", "kind"),
    [
        (1, {}, 64, "Q2_0"),
        (1, {}, 32, "Q4_0"),
        (1, {"symmetric": False}, 128, "Q2_0"),
        (2, {}, 64, "Q2_0"),
        (2, {}, 128, "Q2_0"),
        (2, {}, -1, "Q2_0"),
        (2, {"symmetric": False}, 64, "Q4_0"),
        (2, {"midrise": True}, 128, "Q4_0"),
        (3, {}, 128, "Q4_0"),
        (3, {"symmetric": False}, -1, "Q4_0"),
        (3, {"midrise": True}, 64, "Q4_0"),
        (4, {}, -1, "Q4_0"),
        (4, {"symmetric": False}, 64, "Q4_1"),
        (4, {"symmetric": False}, -1, "Q4_1"),
        (4, {"midrise": True}, -1, "Q5_0"),
        (5, {}, 64, "Q5_0"),
        (5, {"symmetric": False}, 64, "Q8_0"),
        (7, {"symmetric": False}, 128, "Q8_0"),
        (7, {"midrise": True}, 64, "Q8_0"),
        (8, {}, 128, "Q8_0"),
    ],
)
def test_every_grid_comes_back(
    bits: int, settings: dict[str, Any], group_size: int, kind: str, wide: dict[str, Any], tmp_path: Path
) -> None:
    store = saved_models.rounded(wide["model"], tmp_path / "ours", bits=bits, group_size=group_size, **settings)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    assert check(store, tensors, 5e-4 if kind == "Q4_1" else 0) == {kind: 14}
    assert metadata["general.file_type"] == FILE_TYPES[kind]
    assert (facts["deviation"] > 0) == (kind == "Q4_1")
    scales = torch.cat([store.quantized(name).params.scale.flatten() for name in store.description["tensors"]])
    assert bool((scales < 0).any()) == (bits > 1 and settings.get("symmetric", True))
    codes = torch.cat([store.quantized(name).codes.flatten() for name in store.description["tensors"]])
    assert set(codes.unique().tolist()) >= {0, 2**bits - 1}  # both ends were there to go wrong


@pytest.fixture(scope="module")
def wide() -> dict[str, Any]:
    """A tiny Llama with rows of 128 and 256 weights."""
    return {"model": tiny_models.build("llama", **WIDE)}


def test_groups_too_small_for_the_smallest_type_take_the_next(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "ours", bits=2)
    assert check(store, written(store, tmp_path / "gguf")[2]) == {"Q4_0": 14}
    same_logits(store, tmp_path / "gguf")


def test_layers_may_differ(wide: dict[str, Any], tmp_path: Path) -> None:
    overrides = [{"layers": ["down_proj"], "bits": 2}, {"layers": ["v_proj"], "bits": 4, "symmetric": False}]
    store = saved_models.rounded(wide["model"], tmp_path / "ours", overrides=overrides, bits=6, group_size=64)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    assert check(store, tensors, 5e-4) == {"Q8_0": 10, "Q2_0": 2, "Q4_1": 2}
    assert metadata["general.file_type"] == 7
    assert {key: facts["types"][key] for key in ("Q2_0", "Q8_0", "Q4_1")} == {"Q8_0": 10, "Q2_0": 2, "Q4_1": 2}


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16", "float16"])
def test_other_weights_are_held_exactly(save_dtype: str, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 2.0**-30  # too small for fp16
        model.lm_head.weight.copy_(model.lm_head.weight.half())
    store = saved_models.rounded(model, tmp_path / "ours", save_dtype=save_dtype)
    _, _, tensors = written(store, tmp_path / "gguf")
    check(store, tensors)
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    assert tensors["token_embd.weight"][0] == IDS[kinds[save_dtype]]
    assert tensors["output.weight"][0] == IDS["F16"]
    same_logits(store, tmp_path / "gguf")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG |= {"short_factor": [1 + 0.05 * i for i in range(8)], "long_factor": [1 + 0.3 * i for i in range(8)]}


@pytest.mark.parametrize(
    ("name", "rope"),
    [("llama", one) for one in (LLAMA3, YARN, YARN | {"attention_factor": 1.3}, LONG)] + [("qwen3", YARN)],
)
def test_what_is_exported_opens_as_the_same_model(name: str, rope: dict[str, Any], tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build(name, rope_parameters=rope), tmp_path / "ours")
    facts, _, _ = written(store, tmp_path / "gguf")
    assert any("LongRoPE" in note for note in facts["notes"]) == (rope["rope_type"] == "longrope")
    ids = torch.randint(3, 96, (60,), generator=torch.Generator().manual_seed(1))
    found = GgufRuntime(tmp_path / "gguf", exact=True).logits(ids)
    torch.testing.assert_close(found, saved_models.our_logits(store.folder, ids.tolist()), rtol=1e-4, atol=1e-4)


def test_where_llama_cpp_is_absent_our_own_reader_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *LLAMA_CPP)
    model = tiny_models.build("llama", **WIDE, rope_parameters=LLAMA3)
    store = saved_models.rounded(model, tmp_path / "ours", bits=2, group_size=64)
    check = gq.export(store.folder, "gguf", tmp_path / "gguf")["check"]
    assert check["runtime"] == "gyroquant's reader of GGUF"
    assert check["relative_logit_error"] < 1e-5


def test_scaled_rope(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama", rope_parameters=LLAMA3), tmp_path / "llama3")
    _, metadata, tensors = written(store, tmp_path / "a")
    kind, factors = tensors.pop("rope_freqs.weight")
    assert check(store, tensors) == {"Q4_0": 14}
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    wanted = tiny_models.build("llama", rope_parameters=LLAMA3).model.rotary_emb.inv_freq.numpy()
    assert kind == 0
    assert np.allclose(plain / factors, wanted, rtol=1e-6)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    assert metadata["llama.rope.freq_base"] == 500
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    _, metadata, _ = written(
        saved_models.rounded(tiny_models.build("qwen2", rope_parameters=linear), tmp_path / "linear"), tmp_path / "b"
    )
    assert (metadata["qwen2.rope.scaling.type"], metadata["qwen2.rope.scaling.factor"]) == ("linear", 4)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen3", {"rope_parameters": LLAMA3}, "RoPE of type llama3 for qwen3; it supports default, linear, yarn"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "RoPE of type dynamic for llama"),
        ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "turns whole heads of llama"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 8}}, "YaRN of llama only with beta_fast 32"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu for llama; it supports silu"),
        ("qwen3", {"attention_bias": True}, r"does not support the biases \(attention_bias\) of qwen3"),
    ],
)
def test_settings_that_llama_cpp_does_not_run_are_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    config = tiny_models.CONFIGS[name]()
    assert GGUF.incompatibilities(replace(needs(name), config=config)) == []
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(gq.InputError, match=reason):
        check_fit(GGUF, replace(needs(name), config=config))


def test_half_a_scale_that_fp16_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    store = saved_models.rounded(model, tmp_path / "ours", bits=2, midrise=True)
    reason = r"layers.1.mlp.up_proj.weight has a group whose scale is too small: .* leave midrise out"
    with pytest.raises(gq.InputError, match=reason), OutputFolder(tmp_path / "gguf") as folder:
        GGUF.write(store, folder)
    assert not (tmp_path / "gguf").exists()


def test_a_name_that_llama_cpp_acts_on_is_left_out(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "my-Phi-3")
    assert "general.name" not in written(store, tmp_path / "gguf")[1]


def test_a_window_is_noted(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("mistral", sliding_window=32), tmp_path / "ours")
    notes = written(store, tmp_path / "gguf")[0]["notes"]
    assert any("not to the last 32" in note for note in notes)


DOWN = "model.layers.0.mlp.down_proj"


def needs(model_type: str = "llama", online: tuple[Any, ...] = (), **settings: Any) -> ModelRequirements:
    grid = IntegerGrid(**{"bits": 4, "group_size": 32, "symmetric": True} | settings)
    return ModelRequirements(model_type, (Layer(f"{DOWN}.weight", grid, 96),), online)


def test_what_fits_has_no_problems() -> None:
    for fine in (needs(), needs(bits=2, symmetric=False), needs("qwen3", group_size=-1), needs(bits=6, midrise=True)):
        assert GGUF.incompatibilities(fine) == []


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (needs("helium"), "does not support helium; it supports llama, mistral, ministral, "),
        (
            needs(group_size=16),
            r"has no type for 4-bit symmetric weights in groups of 16 .*; it has Q4_0 \(4 bits, symmetric, groups of "
            r"32 or multiples of it\) and IQ4_NL \(4 bits, its own table, groups of 32 or multiples of it\) and Q4_1",
        ),
        (needs(bits=8, symmetric=False), "has no type for 8-bit asymmetric weights"),
        (needs(bits=8, midrise=True), "has no type for 8-bit midrise weights"),
        (
            ModelRequirements("llama", (Layer(f"{DOWN}.weight", Fp4Grid(group_size=32), 96),)),
            "has no type for the grid fp4",
        ),
        (
            needs(online=(OnlineMap(HookPoint("input", DOWN), maps.hadamard(32)),)),
            f"cannot run the online map before {DOWN}; leave that site out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(wanted: ModelRequirements, reason: str) -> None:
    with pytest.raises(gq.InputError, match=rf"GGUF \(llama.cpp\) {reason}"):
        check_fit(GGUF, wanted)
