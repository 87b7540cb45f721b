"""Rotations of the KV cache from attention: what they are measured on, and that heads may have their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_runs import run, streamed_logits

import gyroquant as gq
from gyroquant.calibration.attention_observers import KeyMoments, QueryMoments, ValueMoments
from gyroquant.maps import BlockDiagonal, Dense, hadamard
from gyroquant.methods import Context, KeyPCA, Oscar
from gyroquant.models.execution.online import observing_attention, run_on_heads
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.base import ModuleStore

CACHE = ["weights.bits=8", "kv_cache={grid: real_zero, bits: 2, first_tokens: 1, last_tokens: 3}"]


def site(name: str) -> Any:
    return find_sites(ModuleStore(tiny_models.build("llama")).graph, name)[0]


def heads(*, queries: int = 4, shared: int = 2, length: int = 30, n: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, count, length, n, generator=generator) for count in (queries, shared, shared))


def test_moments_are_those_of_each_kv_head() -> None:
    q, k, v = heads()
    queries, keys, values = QueryMoments(16), KeyMoments(16), ValueMoments(16)
    for observer in (queries, keys, values):
        observer.attend(q, k, v)
    for head in range(2):
        own = q[:, 2 * head : 2 * head + 2].reshape(-1, 16)
        assert torch.allclose(queries.sums[head], own.T @ own, atol=1e-3)
        assert torch.allclose(keys.covariance[head].float(), k[:, head].reshape(-1, 16).T.cov(correction=0), atol=1e-5)
    expected = torch.zeros(16, 16)
    for head in range(2):
        rows, vectors = k[:, head].reshape(-1, 16), v[:, head].reshape(-1, 16)
        weight = torch.stack([row @ queries.sums[head] @ row for row in rows])
        expected += (vectors * (weight / weight.mean())[:, None]).T @ vectors
    assert torch.allclose(values.sums[0], expected, atol=1e-2)


def test_axes_are_those_of_the_costly_directions() -> None:
    """The first row of the inverse is the direction in which the queries are large, spread over all coordinates."""
    q, k, v = heads()
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    q[:, :2] += 40 * torch.randn(2, 2, 30, 1) * direction
    observer = QueryMoments(16)
    observer.attend(q, k, v)
    chosen = Oscar().choose(site("R3"), Context(0, -1, {QueryMoments: observer}))
    assert isinstance(chosen, BlockDiagonal)
    assert (chosen.n, len(chosen.parts)) == (32, 2)
    turned = direction.double() @ chosen.parts[0].dense()
    assert torch.allclose(turned.abs(), torch.full((16,), 0.25, dtype=torch.float64), atol=0.02)
    shared = Oscar(per_head=False).choose(site("R3"), Context(0, -1, {QueryMoments: observer}))
    assert shared.n == 16


def test_key_axes_ignore_the_mean() -> None:
    q, k, v = heads()
    k = k + 100 * torch.randn(1, 2, 1, 16)
    k[:, 0, :, 5] += 20 * torch.randn(2, 30)
    observer = KeyMoments(16)
    observer.attend(q, k, v)
    chosen = KeyPCA().choose(site("R3"), Context(0, -1, {KeyMoments: observer}))
    first = chosen.parts[0].dense()[:, 0]  # type: ignore[attr-defined]
    assert abs(float(first[5])) > 0.95


def test_each_kv_head_and_its_queries_get_its_own_map() -> None:
    q, k, _ = heads()
    parts = (Dense(torch.eye(16, dtype=torch.float64).flip(0)), hadamard(16))
    turned_q, turned_k = (run_on_heads(BlockDiagonal(parts), x.double()) for x in (q, k))
    for head, part in enumerate(parts):
        assert torch.allclose(turned_k[:, head], part.apply(k[:, head].double()))
        for query in (2 * head, 2 * head + 1):
            assert torch.allclose(turned_q[:, query], part.apply(q[:, query].double()))


def test_observers_see_keys_after_rope() -> None:
    model = tiny_models.build("llama")
    seen: list[torch.Tensor] = []

    def observe(*parts: torch.Tensor) -> None:
        seen.extend(parts)

    ids = torch.full((1, 6), 7)  # the same token everywhere: only RoPE tells positions apart
    undo = observing_attention(model, "model.layers.0.self_attn", observe)
    with torch.no_grad():
        model(ids)
        for step in reversed(undo):
            step()
        model(ids)
    queries, keys, values = seen
    assert (queries.shape[1], keys.shape[1]) == (4, 2)
    assert torch.allclose(values[:, :, 0], values[:, :, 1], atol=1e-6)
    assert not torch.allclose(keys[:, :, 0], keys[:, :, 1], atol=1e-3)
    assert torch.allclose(keys.norm(dim=-1), keys.norm(dim=-1)[..., :1].expand(1, 2, 6), atol=1e-5)


@pytest.mark.parametrize("per_head", ["true", "false"])
def test_a_recipe_with_it_is_proven_saved_loaded_and_generates(
    per_head: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = [*CACHE, "transform.R2.method=oscar", f"transform.R3={{method: oscar, per_head: {per_head}}}"]
    manifest = run(folders["llama"], tmp_path / "out", "rtn", corpus, *changes, "kv_cache.center_keys=true")
    assert manifest["proof"]["relative_logit_error"] < 1e-5
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    ids = tiny_models.tokens(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, streamed_logits(tmp_path / "out", ids))
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        plain = loaded.generate(ids[:1, :9], **options)
        assert torch.equal(loaded.generate(ids[:1, :9], past_key_values=gq.PackedKVCache(loaded), **options), plain)


def test_it_is_measured_before_other_maps(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = [*CACHE, "transform.R3=[{method: hadamard}, {method: oscar}]"]
    with pytest.raises(gq.UnsupportedModelError, match="put the method that measures first"):
        run(folders["llama"], tmp_path / "out", "rtn", corpus, *changes)
