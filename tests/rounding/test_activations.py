"""Rounding while the model runs: what is rounded, with which scales, and that saving keeps all of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from selection import some
from tiny_runs import run, streamed_logits

import gyroquant as gq
from gyroquant.grids import IntegerGrid
from gyroquant.models.execution.online import attach, attached
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.planning import plan_quantizers
from gyroquant.rounding.activations import KeyMean

W8 = ("weights.bits=8", "weights.group_size=16")


def quantizers(model: torch.nn.Module, *changes: str) -> list:
    return plan_quantizers(ModuleStore(model).graph, gq.load_recipe("rtn", [*W8, *changes]))


def by_hand(x: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Asymmetric rounding with fp16 scales, written out."""
    groups = x.unflatten(-1, (-1, size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
    codes = torch.round(groups / scale + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(-2)


def test_every_token_has_its_own_scale_and_o_proj_one_a_head() -> None:
    model = tiny_models.build("llama")
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    before: dict[str, torch.Tensor] = {}
    names = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj")
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: before.update({name: args[0]}))
    attach(model, quantizers(model, "activations.bits=4"))
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: (before[name], args[0])}))
    with torch.no_grad():
        model(tiny_models.tokens(model))
    raw, rounded = seen[names[0]]
    assert torch.equal(rounded, by_hand(raw, 4, 96))
    raw, rounded = seen[names[1]]
    assert torch.equal(rounded, by_hand(raw, 4, 16))
    assert not torch.equal(rounded, by_hand(raw, 4, 64))


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_quantizable_input_of_every_architecture_is_rounded(name: str) -> None:
    """At 8 bits the logits move a little, at 2 bits far more: nothing is skipped, nothing is broken."""
    model = tiny_models.build(name)
    ids = tiny_models.tokens(model)
    with torch.no_grad():
        exact = model(ids).logits
        errors = []
        for bits in (8, 2):
            with attached(model, quantizers(model, f"activations.bits={bits}", f"kv_cache.bits={bits}")):
                errors.append(float((model(ids).logits - exact).norm() / exact.norm()))
        assert torch.equal(model(ids).logits, exact)
    assert 0 < errors[0] < 0.1  # routers may send a token elsewhere
    assert errors[1] > 3 * errors[0]


@pytest.mark.parametrize("name", some(name for name in tiny_models.CONFIGS if name not in tiny_models.POST_NORM))
def test_w4a4kv4_is_saved_and_loaded_as_it_was_calibrated(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = ["activations.bits=4", "kv_cache.bits=4", "kv_cache.center_keys=true", "weights.bits=4"]
    manifest = run(folders[name], tmp_path / "out", "quarot", corpus, *changes)
    assert manifest["recipe"]["kv_cache"]["center_keys"] is True
    ids = tiny_models.tokens(tiny_models.build(name))
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        rounded = loaded(ids).logits
        assert torch.equal(rounded, streamed_logits(tmp_path / "out", ids))
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, rounded)
    assert manifest["bits"]["stored_bits"]["maps"] >= 16


def test_rounding_follows_the_online_map() -> None:
    """R4 spreads an outlier of the input of down_proj before it is rounded, not after."""
    from gyroquant.pipeline.folds import plan_folds

    model = tiny_models.build("llama")
    recipe = gq.load_recipe("rtn", [*W8, "activations.bits=4", "transform.R4.method=hadamard"])
    graph = ModuleStore(model).graph
    plan = plan_folds(graph, recipe)
    seen: list[torch.Tensor] = []
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    attach(model, [*plan.online, *plan_quantizers(graph, recipe)])
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(tiny_models.tokens(model))
    rotated = plan.online[0].map.apply(seen[0])
    assert torch.equal(seen[1], by_hand(rotated, 4, 96))


def test_layers_that_read_one_tensor_share_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    calls: list[tuple[int, ...]] = []
    fake = IntegerGrid.fake

    def counted(self: IntegerGrid, x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return fake(self, x)

    monkeypatch.setattr(IntegerGrid, "fake", counted)
    with attached(model, quantizers(model, "activations.bits=8")):
        model(tiny_models.tokens(model))
    assert len(calls) == 2 * 4  # in each of two blocks: q, k, v | o | gate, up | down


def test_gradients_pass_straight_through() -> None:
    model = tiny_models.build("llama")
    ids = tiny_models.tokens(model)
    with attached(model, quantizers(model, "activations.bits=8", "kv_cache.bits=8")):
        model(ids, labels=ids).loss.backward()
    rounded = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    exact = model.model.embed_tokens.weight.grad
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def test_a_mean_after_rope_is_exact_and_one_before_is_not() -> None:
    """softmax does not see an offset of all keys; RoPE would turn one that is taken before it."""
    model = tiny_models.build("llama")
    ids = tiny_models.tokens(model)
    module = model.model.layers[0].self_attn
    offset = torch.randn(2, 1, 16)
    from gyroquant.models.execution.online import attention_state, route_attention

    undo = route_attention(module)

    class Shift:
        n = offset.shape[-1]

        def apply(self, x: torch.Tensor) -> torch.Tensor:
            return x + offset if x.shape[1] == 2 else x  # keys have two heads, queries four

    with torch.no_grad():
        exact = model(ids).logits
        attention_state(module).map = Shift()  # type: ignore[assignment]
        after = model(ids).logits
        attention_state(module).map = None
        undo()
        module.k_proj.bias = torch.nn.Parameter(offset.flatten())
        before = model(ids).logits
    assert float((after - exact).norm() / exact.norm()) < 1e-5
    assert float((before - exact).norm() / exact.norm()) > 1e-2


def test_the_mean_of_keys_is_that_of_all_tokens() -> None:
    keys = torch.randn(3, 2, 7, 16)
    mean = KeyMean()
    mean(keys[:2])
    mean(keys[2:])
    assert torch.allclose(mean.result().float(), keys.mean((0, 2)), atol=1e-3)


def test_centring_helps_keys_with_an_offset() -> None:
    from gyroquant.models.execution.online import CacheQuantizer

    grid = IntegerGrid(bits=2, group_size=16, scale="minmax", symmetric=True)
    keys = torch.randn(1, 2, 50, 16) + 5 * torch.randn(2, 1, 16)
    plain, centred = CacheQuantizer("", grid, grid), CacheQuantizer("", grid, grid, keys.mean((0, 2)).half())
    errors = [float((q.round_keys(keys) - keys).norm()) for q in (plain, centred)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["activations.bits=4", "activations.group_size=48"], "does not divide the 64 inputs of the input of model"),
        (["kv_cache.bits=4", "kv_cache.group_size=24"], "heads of the KV cache"),
        (["activations.bit=4"], "did you mean 'bits'"),
        (["kv_cache.centre=true"], "center_keys"),
        (["activations.ignore=lm_head"], "must be a list of module names"),
        (["activations=4"], "activations holds bits"),
        (["activations.bits=4", "activations.ignore=['re:.*']"], "leaves no input"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: list[str], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(gq.GyroquantError, match=message):
        run(folders["llama"], tmp_path / "out", "rtn", None, *changes)
    assert not (tmp_path / "out").exists()


def test_dense_output_has_no_place_for_it(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(gq.UnsupportedModelError, match="activations=null"):
        run(folders["llama"], tmp_path / "out", "rtn", None, "activations.bits=8", dense=True)


def test_names_say_what_is_rounded() -> None:
    recipe = gq.load_recipe("quarot-W4A4KV4g32")
    assert (recipe.weights.grid.bits, recipe.weights.grid.group_size) == (4, 32)
    assert recipe.activations is not None
    assert recipe.kv_cache is not None
    assert (recipe.activations.grid.bits, recipe.kv_cache.grid.bits) == (4, 4)
    assert recipe.activations.grid.group_size == -1
    weights_only = gq.load_recipe("quarot-w2a16kv16")
    assert weights_only.activations is None
    assert weights_only.kv_cache is None
    assert gq.load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("rounded", [False, True])
def test_qronos_compares_rounded_inputs_with_exact_ones(rounded: bool) -> None:
    """In the first block both models see the same hidden states, so all drift is that of the rounded activations."""
    from gyroquant.calibration.observers import PairedForward, observing
    from gyroquant.calibration.stream import Stream
    from gyroquant.models.execution.runner import BlockRunner

    model = tiny_models.build("llama")
    store = ModuleStore(model)
    online = quantizers(model, "activations.bits=4") if rounded else []
    online = [one for one in online if one.module.startswith("model.layers.0.")]
    stream = Stream(
        BlockRunner(model, store.graph),
        tiny_models.tokens(model),
        store.read(store.graph.outer_params()),
        pairing=PairedForward(),
    )
    group = store.graph.blocks[0]
    with attached(model, online), observing(model, group, online, stream.observer) as observed:
        stream.observe(0, store.read(store.graph.block_params(0)))
    gram = observed["attn_in", None]
    assert gram.count == tiny_models.tokens(model).numel()
    assert bool(gram.input_error_cross.any()) == rounded


def test_what_a_router_sees_is_rounded_for_the_layers_beside_it() -> None:
    """Routers read the input unrounded and see every token, so the others' statistics are taken there, but rounded."""
    from gyroquant.calibration.observers import SecondMoments, observing

    model = tiny_models.build("qwen2_moe")
    store = ModuleStore(model)
    online = quantizers(model, "activations.bits=4")
    seen: list[torch.Tensor] = []
    with attached(model, online), observing(model, store.graph.blocks[0], online, SecondMoments) as observed:
        module = model.get_submodule("model.layers.0.mlp.shared_expert.gate_proj")
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
        with torch.no_grad():
            model(tiny_models.tokens(model))
        handle.remove()
    assert torch.allclose(observed["mlp_in", None].second_moments, seen[0].T @ seen[0], rtol=1e-4, atol=1e-3)
