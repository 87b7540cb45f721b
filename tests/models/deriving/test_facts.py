"""A derived description says how each of its facts is known."""

from __future__ import annotations

import pytest
from deriving_examples import CustomModel, custom_config

from gyroquant.models.deriving.derive import Derivation, derive, derived
from gyroquant.models.deriving.facts import corrected, joined, told
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.graph.spec import Architecture, Entry, Kept, Linear

NORM_OUTPUT = "its inputs are multiples of the outputs of input_layernorm"
STREAM = "the gradients of its outputs are multiples of those of the residual stream"


def of(model_type: str) -> Derivation:
    model = tiny_model(default_config(model_type))
    return derive(model, tiny_tokens(model))


def entries(architecture: Architecture) -> list[Entry]:
    return [entry for entry in (*architecture.block, *architecture.outer) if not isinstance(entry, tuple)]


@pytest.mark.parametrize("model_type", ["gemma", "gpt_oss", "gpt_neox", "glm4", "jetmoe", "gemma3_text"])
def test_every_entry_has_a_fact_that_names_its_bases(model_type: str) -> None:
    architecture = of(model_type).architecture
    for entry in entries(architecture):
        fact = architecture.facts[entry.name]
        for verb in ("reads", "writes"):
            bases = getattr(entry, verb, ())
            shown = bases if isinstance(bases, str) else ", ".join(bases)
            assert not bases or f"{verb} {shown}: " in fact or f"{verb} {shown}, " in fact, (entry, fact)
        if isinstance(entry, Kept):
            assert fact.startswith("kept: it meets no basis that changes")


def test_facts_say_what_was_seen() -> None:
    facts = derived(default_config("gemma")).architecture.facts
    assert facts["self_attn.v_proj"] == (
        f"reads attn_in: {NORM_OUTPUT}; writes v: its outputs are the values that attention takes"
    )
    assert facts["self_attn.o_proj"].endswith(f"writes residual: {STREAM}")
    assert facts["mlp.up_proj"].endswith("coordinate i of the input of mlp.down_proj depends linearly on row i")
    assert facts["mlp.gate_proj"].endswith("coordinate i of the input of mlp.down_proj depends on row i")
    assert "mlp.gate_proj and mlp.up_proj at the same token" in facts["mlp.down_proj"]
    assert "kind rms, offset 1: its outputs fit" in facts["input_layernorm"]
    assert facts["model.embed_tokens"] == f"writes residual: {STREAM}"
    assert facts["lm_head"].endswith("writes logits: it is the layer after the last norm")
    assert "half a head apart were exact" in facts["qk"]


def test_gate_and_up_in_one_weight() -> None:
    assert "on rows i and i + n, linearly on row i + n" in of("glm4").architecture.facts["mlp.gate_up_proj"]


def test_norms_that_subtract_the_mean_are_named() -> None:
    assert "mean of the residual stream, which is subtracted in ln_1, ln_2" in of("gpt2").architecture.facts["R1"]


def test_a_withdrawn_guess_stays_with_its_reason() -> None:
    derivation = of("qwen3_5_text")
    reason = derivation.problems["R2"]
    assert "changed the logits" in reason
    assert derivation.architecture.facts["R2"] == f"not proven: {reason}"
    fact = derivation.architecture.facts["self_attn.v_proj"]
    assert "writes v: its outputs are the values" in fact
    assert f"withdrawn: it writes values in place of v, because R2 was not exact: {reason}" in fact


def test_every_problem_is_a_fact() -> None:
    derivation = derived(custom_config(), CustomModel._from_config)
    assert derivation.problems
    for label, reason in derivation.problems.items():
        assert f"not proven: {reason}" in derivation.architecture.facts[label]
    assert "never rounded" in derivation.architecture.facts["router"]


def test_blocks_that_contradict_each_other_are_both_heard() -> None:
    one, other = Linear("a", "attn_in", "fixed"), Linear("a", "residual", "fixed")
    facts = told([Linear("a", "a.in", "fixed")], [(one, "in one block"), (other, "in another"), (one, "in one block")])
    assert facts == {"a": "the blocks contradict each other (in one block | in another)"}
    assert told([other], [(one, "in one block"), (other, "in another")]) == {"a": "in another"}


def test_a_name_that_two_entries_share_has_both_facts() -> None:
    assert joined({"norm": "in the block"}, {"norm": "around", "head": "x"}) == {
        "norm": "in the block; around",
        "head": "x",
    }


def test_corrections_name_every_field_that_changes() -> None:
    old = Architecture("a", ("a",), "layers", (Linear("x", "act", ("gate", "up")), Kept("y")), (), "unknown")
    new = Architecture("a", ("a",), "layers", (Linear("x", "x.in", "fixed", quantize=False),), (), "unknown")
    facts = corrected(old, new, "so").facts
    assert facts["x"] == (
        "withdrawn: it reads x.in in place of act and writes fixed in place of gate, up and "
        "has quantize False in place of True, because so"
    )
    assert facts["y"] == "withdrawn: it is left out, because so"
    assert corrected(old, old, "so").facts == {}
