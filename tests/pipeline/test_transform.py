"""`gq.transform` on a model in memory: exact or refused, and then untouched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

import gyroquant as gq
from gyroquant.models.deriving.tiny import default_config, tiny_model
from gyroquant.models.folding.fold import FoldPlan

PROOF = {"nsamples": 2, "seqlen": 24}
FULL = {
    "transform": {"R1": {"method": "hadamard", "random_signs": True}, "R2": "hadamard"},
    "weights": {"bits": 4},
    "proof": PROOF,
}
ONLINE = FULL | {"transform": {**FULL["transform"], "R3": "hadamard", "R4": "hadamard"}}


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def recipe_for(name: str, recipe: dict[str, object]) -> dict[str, object]:
    """The recipe, with R1 online where the architecture cannot fuse it."""
    changed = copy.deepcopy(recipe)
    if name in tiny_models.POST_NORM:
        changed["transform"]["R1"]["online"] = True  # type: ignore[index]
    return changed


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_the_transformed_model_is_the_same_function(name: str) -> None:
    model = tiny_models.build(name)
    ids = tiny_models.tokens(model)
    before = logits(model, ids)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    proof = gq.transform(model, recipe_for(name, ONLINE), text=ids)
    assert proof.relative_logit_error < 5e-6
    assert relative(logits(model, ids), before) < 5e-6
    changed = [n for n, p in model.named_parameters() if n not in weights or not torch.equal(p, weights[n])]
    assert any("v_proj" in n or "qkv" in n or "attn" in n or "query" in n for n in changed)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_it_still_generates_with_a_cache(name: str) -> None:
    model = tiny_models.build(name)
    ids = tiny_models.tokens(model, batch=1, length=6)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **options)
    gq.transform(model, recipe_for(name, ONLINE))
    assert torch.equal(model.generate(ids, **options), before)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3_moe", "gpt2", "opt", "cohere2"])
def test_a_fused_model_saves_and_loads_like_any_other(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    ids = tiny_models.tokens(model)
    before = logits(model, ids)
    gq.transform(model, FULL)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative(logits(again, ids), before) < 5e-6


def test_a_model_with_online_maps_refuses_to_be_saved_plainly(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    gq.transform(model, ONLINE)
    with pytest.raises(gq.GyroquantError, match="online"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_tied_embeddings_are_untied_only_when_needed() -> None:
    model = tiny_models.build("llama_tied")
    gq.transform(model, {"transform": {"R2": "hadamard"}, "weights": {"bits": 4}, "proof": PROOF})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gq.transform(model, FULL)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    unit = tiny_models.build("llama_tied")
    with torch.no_grad():
        unit.model.norm.weight.fill_(1.0)  # nothing to fold into the head: both get the same rotation
    ids = tiny_models.tokens(unit)
    before = logits(unit, ids)
    gq.transform(unit, FULL)
    assert unit.lm_head.weight is unit.model.embed_tokens.weight
    assert relative(logits(unit, ids), before) < 5e-6


def untouched(model: torch.nn.Module, recipe: dict[str, object], match: str) -> None:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    config = copy.deepcopy(model.config)
    with pytest.raises(gq.UnsupportedModelError, match=match):
        gq.transform(model, recipe)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation


@pytest.mark.parametrize("name", tiny_models.POST_NORM)
def test_post_norms_refuse_a_fused_r1_with_the_reason_and_the_remedy(name: str) -> None:
    untouched(tiny_models.build(name), FULL, r"cannot pass it.*set transform.R1.online=true")


def test_a_failed_proof_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FoldPlan._apply

    def forget_down(self: FoldPlan, ports: tuple[object, ...], m: object) -> None:
        original(self, tuple(p for p in ports if "layers.1.mlp.down" not in p.param), m)  # type: ignore[attr-defined]

    monkeypatch.setattr(FoldPlan, "_apply", forget_down)
    untouched(tiny_models.build("llama"), ONLINE, "worst block 1")


def test_an_architecture_that_cannot_be_described_is_untouched() -> None:
    untouched(tiny_model(default_config("zamba")), FULL, "share parameters")


def test_dtype_and_training_mode_are_kept() -> None:
    model = tiny_models.build("llama").bfloat16().train()
    gq.transform(model, ONLINE)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_calibration_text_needs_a_tokenizer(corpus: Path, tokenizer: object) -> None:
    model = tiny_models.build("llama")
    with pytest.raises(gq.InputError, match="needs its tokenizer"):
        gq.transform(model, FULL, text=corpus)
    recipe = FULL | {"proof": {"nsamples": 3, "seqlen": 20}}
    assert gq.transform(model, recipe, text=corpus, tokenizer=tokenizer).tokens == 60


MEASURED = FULL | {"transform": {"R4": {"method": "massdiff", "block": 16}}}


@pytest.mark.parametrize(
    ("changes", "shape", "match"),
    [
        (
            {"proof": {}},
            (2, 24),
            r"2 windows of 24 tokens, not as 2 windows of 256.*--set proof.nsamples=2 --set proof.seqlen=24",
        ),
        ({"proof": {"nsamples": 3, "seqlen": 24}}, (2, 24), r"--set proof.nsamples=2 --set proof.seqlen=24"),
        (
            {"calibration": {"nsamples": 4000, "seqlen": 24}},
            (2, 24),
            r"not as 4000 windows.*--set calibration.nsamples=2",
        ),
        (
            {"calibration": {"nsamples": 2, "seqlen": 16}},
            (2, 24),
            r"--set calibration.nsamples=2 --set calibration.seqlen=24",
        ),
        ({"calibration": {"nsamples": 2, "seqlen": 24}}, (2, 23), r"not as 2 windows of 24"),
        (
            {"proof": {"nsamples": 2, "seqlen": 129}},
            None,
            r"proof.seqlen 129 is longer than the 128 positions.*--set proof.seqlen=128",
        ),
        ({"proof": {"nsamples": 2, "seqlen": 129}}, (2, 129), r"longer than the 128 positions"),
        ({}, (48,), r"of shape \(samples, length\)"),
    ],
)
def test_fewer_tokens_than_asked_for_are_refused(
    changes: dict[str, object], shape: tuple[int, ...] | None, match: str
) -> None:
    model = tiny_models.build("llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    ids = None if shape is None else torch.randint(0, 96, shape)
    recipe = (MEASURED if "calibration" in changes else FULL) | changes
    with pytest.raises(gq.InputError, match=match):
        gq.transform(model, recipe, text=ids)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_ids_of_another_model_are_refused() -> None:
    with pytest.raises(gq.InputError, match="token 96, but the model has only 96"):
        gq.transform(tiny_models.build("llama"), FULL, text=torch.full((2, 24), 96))


def test_ids_are_taken_as_they_are_and_the_proof_says_how_many() -> None:
    ids = tiny_models.tokens(tiny_models.build("llama"), 5, 40)
    assert gq.transform(tiny_models.build("llama"), FULL, text=ids).tokens == 48
    recipe = MEASURED | {"calibration": {"nsamples": 5, "seqlen": 40}, "proof": {"nsamples": 5, "seqlen": 40}}
    assert gq.transform(tiny_models.build("llama"), recipe, text=ids).tokens == 200


def test_a_text_that_is_too_short_for_the_proof_is_refused(tokenizer: object) -> None:
    with pytest.raises(gq.InputError, match="enough for 4 samples of 24, not for 5"):
        recipe = FULL | {"proof": {"nsamples": 5, "seqlen": 24}}
        gq.transform(tiny_models.build("llama"), recipe, text=[tiny_models.prose(100)], tokenizer=tokenizer)


def test_twice_is_still_exact() -> None:
    model = tiny_models.build("qwen2")
    ids = tiny_models.tokens(model)
    before = logits(model, ids)
    gq.transform(model, FULL)
    gq.transform(model, FULL | {"seed": 5})
    assert relative(logits(model, ids), before) < 1e-5
