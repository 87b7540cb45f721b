"""Tokens of the KV cache that stay exact: which query reads which rounded, the same on a text and in generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from selection import some_pairs
from tiny_runs import run
from transformers import AutoModelForCausalLM, DynamicCache

import gyroquant as gq
from gyroquant.grids import IntegerGrid, RealZeroGrid
from gyroquant.models.execution.exact_tokens import ExactTokens
from gyroquant.models.execution.online import CacheQuantizer, attached
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.planning import plan_quantizers

TOKENS = [(0, 0), (3, 0), (0, 5), (3, 5), (0, 1), (2, 40), (50, 0)]


@contextmanager
def rounding(model: torch.nn.Module, *changes: str) -> Iterator[list[Any]]:
    recipe = gq.load_recipe("rtn", ["weights.bits=8", "weights.group_size=16", *changes])
    quantizers = plan_quantizers(ModuleStore(model).graph, recipe)
    with attached(model, quantizers):
        yield quantizers


def double(name: str) -> Any:
    """A tiny model in fp64: in fp32, a number between two codes may get either, which changes everything after it."""
    return tiny_models.build(name).double()


def settings(first: int, last: int, grid: str = "real_zero") -> list[str]:
    return [f"kv_cache={{grid: {grid}, bits: 2, first_tokens: {first}, last_tokens: {last}}}"]


def by_hand(
    model: torch.nn.Module, ids: torch.Tensor, quantizer: CacheQuantizer, window: int | None = None
) -> torch.Tensor:
    """The output of the first attention of a llama, written out: every query with its own keys and values."""
    seen: dict[str, Any] = {}
    module = model.get_submodule("model.layers.0.self_attn")
    handles = [
        module.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True),
        module.o_proj.register_forward_pre_hook(lambda m, args: seen.update(out=args[0])),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    shape = (*hidden.shape[:2], -1, module.head_dim)
    query, key, value = (p(hidden).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    rounded_key, rounded_value = quantizer.round_keys(key), quantizer.values.fake(value)
    first, last = quantizer.exact.first, quantizer.exact.last
    rows = []
    for t in range(ids.shape[1]):
        rounded = [j for j in range(t + 1) if j >= first and j <= t - last]
        keys, values = key[:, :, : t + 1].clone(), value[:, :, : t + 1].clone()
        keys[:, :, rounded], values[:, :, rounded] = rounded_key[:, :, rounded], rounded_value[:, :, rounded]
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = (query[:, :, t : t + 1] @ keys.transpose(-1, -2)) * module.scaling
        rows.append(scores.softmax(-1) @ values)
    out = torch.cat(rows, dim=2).transpose(1, 2).flatten(2)
    assert torch.allclose(out, seen["out"], atol=1e-5)
    return out


@pytest.mark.parametrize(("first", "last"), TOKENS)
@torch.no_grad()
def test_every_query_reads_its_own_tokens_exact(first: int, last: int) -> None:
    model = tiny_models.build("llama")
    ids = tiny_models.tokens(model)[:, :20]
    with rounding(model, *settings(first, last)) as quantizers:
        out = by_hand(model, ids, quantizers[0])
    with rounding(model, *settings(0, 0)) as quantizers:
        all_rounded = by_hand(model, ids, quantizers[0])
    assert torch.allclose(out, all_rounded, atol=1e-6) == (first == last == 0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_nothing_leaks_from_later_tokens(implementation: str) -> None:
    """The logits of a prefix are those of the text cut there."""
    model = double("llama")
    model.set_attn_implementation(implementation)
    ids = tiny_models.tokens(model)
    with rounding(model, *settings(2, 4)):
        whole = model(ids).logits
        for length in (1, 3, 7, 15):
            assert torch.allclose(model(ids[:, :length]).logits, whole[:, :length], atol=1e-5)


@torch.no_grad()
def test_a_text_within_the_window_is_exact() -> None:
    model = tiny_models.build("llama")
    ids = tiny_models.tokens(model)[:, :16]
    exact = model(ids).logits
    for changes in (settings(16, 0), settings(0, 16), settings(8, 8)):
        with rounding(model, *changes):
            assert torch.allclose(model(ids).logits, exact, atol=1e-5)
    with rounding(model, *settings(7, 8)):
        assert not torch.allclose(model(ids).logits, exact, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_does_not_count() -> None:
    model = double("llama")
    ids = tiny_models.tokens(model)[:1, :12]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with rounding(model, *settings(3, 4)):
        alone = model(ids).logits
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        assert torch.allclose(beside, alone, atol=1e-6)
        cache = gq.PackedKVCache(model)
        with pytest.raises(gq.InputError, match="first_tokens=0"):
            model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "tokens"),
    some_pairs(
        ["llama", "qwen3", "gemma2", "gpt_neox", "cohere2", "mistral"],
        TOKENS,
        [("llama", (3, 5)), ("qwen3", (0, 5)), ("gemma2", (3, 5)), ("gpt_neox", (3, 0)), ("cohere2", (0, 1))],
    ),
)
@torch.no_grad()
def test_generation_gives_the_logits_of_the_whole_text(name: str, tokens: tuple[int, int]) -> None:
    """With transformers' cache and with the packed one; token by token and several at once."""
    model = double(name)
    ids = tiny_models.tokens(model)[:, :24]
    with rounding(model, *settings(*tokens), "kv_cache.center_keys=false"):
        whole = model(ids, use_cache=False).logits
        for make in (lambda: DynamicCache(config=model.config), lambda: gq.PackedKVCache(model)):
            for cuts in ((7, 8, 9, 10, 24), range(1, 25), (12, 20, 21, 24)):
                cache, start, parts = make(), 0, []
                for stop in cuts:
                    parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
                    start = stop
                got = torch.cat(parts, dim=1)
                assert torch.allclose(got, whole, atol=2e-5), (cuts, type(cache).__name__)


def with_key_biases(folder: Path, size: float) -> Path:
    """A tiny Qwen2 whose keys have biases many times as large as the keys, in the channels that RoPE turns slowly."""
    torch.manual_seed(0)
    model = tiny_models.build("qwen2")
    slow = torch.arange(16) % 8 >= 4  # less than 0.6 radians over 64 tokens
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.copy_(torch.randn_like(bias) * size * slow.repeat(len(bias) // 16))
    model.save_pretrained(folder)
    return folder


def test_large_key_biases_are_survived(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """RoPE turns a bias with the position. In slow channels, nearly all of it is in the mean of the keys."""
    for file in folders["qwen2"].glob("tokenizer*"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "model")
    folder = with_key_biases(tmp_path / "model", 20.0)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tiny_models.tokens(exact)
    with torch.no_grad():
        target = exact(ids).logits
    errors = {}
    for center in ("false", "true"):
        changes = ["weights.bits=8", "weights.group_size=16", *settings(0, 0), f"kv_cache.center_keys={center}"]
        run(folder, tmp_path / center, "rtn", corpus, *changes, "kv_cache.bits=4")
        loaded = gq.load(tmp_path / center, dtype=torch.float32)
        with torch.no_grad():
            errors[center] = float((loaded(ids).logits - target).norm() / target.norm())
            cache = gq.PackedKVCache(loaded)
            parts = [loaded(ids[:, :9], past_key_values=cache).logits]
            parts += [loaded(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, ids.shape[1])]
            packed = float((torch.cat(parts, 1) - target).norm() / target.norm())
            assert packed == pytest.approx(errors[center], rel=0.25)
    assert errors["true"] < 0.2 < 2 * 0.2 < errors["false"], errors


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("changes", [["grid: real_zero"], ["symmetric: true"], ["grid: real_zero", "group_size: 16"]])
@torch.no_grad()
def test_the_packed_cache_reads_every_grid_as_the_model_rounds_it(bits: int, changes: list[str]) -> None:
    model = double("llama")
    ids = tiny_models.tokens(model)[:, :24]
    options = ", ".join([*changes, f"bits: {bits}", "last_tokens: 3"])
    with rounding(model, f"kv_cache={{{options}}}"):
        whole = model(ids, use_cache=False).logits
        cache = gq.PackedKVCache(model)
        parts = [model(ids[:, :10], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(10, 24)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


@torch.no_grad()
def test_the_packed_cache_holds_the_exact_tokens_and_rounds_the_others_once() -> None:
    model = tiny_models.build("llama")
    ids = tiny_models.tokens(model)[:, :30]
    with rounding(model, *settings(3, 5)):
        cache = gq.PackedKVCache(model)
        model(ids[:, :20], past_key_values=cache)
        layer = cache.layers[0]
        assert (layer._first[0].shape[2], len(layer._keys), layer._recent[0].shape[2]) == (3, 12, 5)
        codes = layer._keys.codes.clone()
        model(ids[:, 20:21], past_key_values=cache)
        assert torch.equal(layer._keys.codes[:, :, :12], codes)
        assert len(layer._keys) == 13
        batch, heads, blocks = ids.shape[0], 2, 2
        rounded, exact = 16 * 2 // 8 + 2 + 1, 16 * 4  # bytes of a vector
        parts = [layer._keys, layer._values]
        tensors = [*layer._first, *layer._recent, *(t for p in parts for t in (p.codes, p.scale, p.zero))]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == layer.bytes  # nothing is a slice of more
        assert cache.nbytes == batch * heads * blocks * 2 * (13 * rounded + 8 * exact)
        with pytest.raises(gq.UnsupportedModelError, match="last_tokens=0"):
            cache.crop(-1)
        assert not cache.is_croppable


@torch.no_grad()
def test_cropping_a_cache_with_exact_first_tokens() -> None:
    model = double("llama")
    ids = tiny_models.tokens(model)[:, :20]
    with rounding(model, *settings(4, 0)):
        whole = model(ids, use_cache=False).logits
        for keep in (2, 4, 11):
            cache = gq.PackedKVCache(model)
            model(ids[:, :15], past_key_values=cache)
            cache.crop(keep - 15)
            assert cache.get_seq_length() == keep
            rest = model(ids[:, keep:], past_key_values=cache).logits
            assert torch.allclose(rest, whole[:, keep:], atol=1e-6)


def test_code_that_reads_the_cache_past_the_attention_function_finds_no_numbers() -> None:
    model = tiny_models.build("llama")
    with rounding(model, *settings(0, 0)):
        cache = gq.PackedKVCache(model)
        keys, values = cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 0)
    assert keys.shape == values.shape == (1, 2, 3, 16)
    assert bool(keys.isnan().all() and values.isnan().all())


def test_clip_ratios_are_those_of_the_range() -> None:
    model = tiny_models.build("llama")
    with rounding(model, "kv_cache={bits: 2, key_clip: 0.9, value_clip: 0.5}") as (first, *_):
        assert (first.keys.clip, first.values.clip) == (0.9, 0.5)
    with rounding(model, "kv_cache={grid: real_zero, bits: 2, clip: 0.8, value_clip: 0.5}") as (first, *_):
        assert (first.keys.clip, first.values.clip) == (0.8, 0.5)
        assert first.values == CacheQuantizer(first.module, first.keys, RealZeroGrid(bits=2, clip=0.5)).values


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{bits: 2, key_clip: 1.5}", "key_clip"),
        ("{bits: 2, key_clip: 0}", "key_clip"),
        ("{bits: 2, scale: mse, key_clip: 0.9}", "scale: minmax"),
        ("{bits: 2, first_tokens: -1}", "first_tokens"),
        ("{bits: 2, last_tokens: 1.5}", "last_tokens"),
        ("{bits: 2, last_token: 1}", "did you mean 'last_tokens'"),
        ("{grid: nvfp4}", "real_zero"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section: str, message: str) -> None:
    with pytest.raises(gq.RecipeError, match=message):
        gq.load_recipe("rtn", [f"kv_cache={section}"])


def test_settings_at_their_defaults_are_not_written() -> None:
    plain = gq.load_recipe("rtn", ["kv_cache.bits=4"]).to_dict()["kv_cache"]
    assert set(plain) == {"grid", "bits", "group_size", "symmetric", "midrise", "scale", "clip", "center_keys"}
    own = ["kv_cache={bits: 4, key_clip: 0.9, value_clip: 0.8, first_tokens: 2, last_tokens: 3}"]
    recipe = gq.load_recipe("rtn", own)
    assert gq.load_recipe(recipe.to_dict()) == recipe
    assert recipe.kv_cache is not None
    assert recipe.kv_cache.value_clip == 0.8


def test_they_are_saved_and_loaded(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = ["weights.bits=8", *settings(2, 3), "kv_cache.key_clip=0.9", "kv_cache.center_keys=true"]
    run(folders["llama"], tmp_path / "out", "quarot", corpus, *changes)
    run(folders["llama"], tmp_path / "plain", "quarot", corpus, "weights.bits=8", "kv_cache.bits=4")
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    state = loaded.model.layers[0].self_attn.__dict__["_gyroquant_attention"]
    assert state.cache.exact == ExactTokens(2, 3)
    assert state.cache.keys == RealZeroGrid(bits=2, clip=0.9)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "plain")]
    versions = [config["quantization_config"]["format_version"] for config in configs]
    assert versions == [4, 1]
    assert isinstance(state.cache.values, RealZeroGrid)
    assert not isinstance(state.cache.values, IntegerGrid)
