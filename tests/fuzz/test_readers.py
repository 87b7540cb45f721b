"""Readers of files from outside take what they are given, or refuse it in their own words, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reader_targets import HOSTILE, Target, make, mutated

from gyroquant.recipes.schema import Recipe

FAST = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = ("gguf", "safetensors", "index", "config", "tokenizer", "rotations", "recipe", "description", "manifest")
NAMES += ("export manifest",)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make(tmp_path_factory.mktemp("fuzz"))


def test_every_target_takes_its_seeds(targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES
    for target in targets.values():
        assert all(target.accepts(seed) for seed in target.seeds), target.name


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_in_words(name: str, targets: dict[str, Target]) -> None:
    found: set[bool] = set()

    @FAST
    @given(st.integers(0, 1 << 32))
    def tried(seed: int) -> None:
        found.add(targets[name].accepts(mutated(targets[name], seed)))

    tried()
    assert False in found


@FAST
@given(st.binary(max_size=200))
@pytest.mark.parametrize("name", NAMES)
def test_noise_is_refused_in_words(name: str, targets: dict[str, Target], data: bytes) -> None:
    assert not targets[name].accepts(data)


_VALUES = st.recursive(
    st.sampled_from([one for one in HOSTILE if not isinstance(one, (list, dict))]) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
_SECTIONS = [*Recipe.model_fields, "efforts", "x"]


@FAST
@given(st.dictionaries(st.sampled_from(_SECTIONS), _VALUES, max_size=4))
def test_recipes_of_anything_are_refused_in_words(targets: dict[str, Target], data: dict[str, Any]) -> None:
    targets["recipe"].accepts(yaml.safe_dump(data).encode())


def test_crashes_are_crashes(targets: dict[str, Target], tmp_path: Path) -> None:
    """What the other tests rest on: an exception of another family is not taken for a refusal."""

    def broken(folder: Path, path: Path) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Target("broken", "x", "json", tmp_path, (b"{}",), broken).accepts(b"{}")
