"""The file of a derived description gives the same description again, as a person would have written it."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deriving_examples import CustomModel, custom_config

from gyroquant.errors import InputError
from gyroquant.models.deriving.derive import Derivation, derive, derived
from gyroquant.models.deriving.description_file import description_text, write_description
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.graph.model_graph import ModelGraph, build_graph
from gyroquant.models.graph.spec import ARCHITECTURES, Architecture, Example, Kept, Linear, described
from gyroquant.models.stores.base import ModuleStore

RUFF = Path(__file__).parents[3] / "pyproject.toml"


def executed(text: str) -> Architecture:
    """The architecture that the file registers, under its model types only as long as it is executed."""
    namespace: dict[str, Any] = {}
    with ARCHITECTURES.restored():
        for model_type in list(ARCHITECTURES):
            ARCHITECTURES.discard(model_type)
        exec(compile(text, "description", "exec"), namespace)
        (found,) = {id(item): item for item in namespace.values() if isinstance(item, Architecture)}.values()
        assert all(described(model_type) is found for model_type in found.model_types)
    return found


def checked_by_ruff(path: Path) -> None:
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(RUFF), "--no-cache", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def parts(graph: ModelGraph) -> Any:
    return [(group.label, [(type(op), op.entry) for op in group.ops if hasattr(op, "entry")]) for group in graph.groups]


@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "gpt_oss", "rwkv", "odd_decoder"])
def test_the_round_trip(name: str, tmp_path: Path) -> None:
    config, build = (
        (custom_config(), CustomModel._from_config) if name == "odd_decoder" else (default_config(name), None)
    )
    model = tiny_model(config, build)
    derivation = derive(model, tiny_tokens(model))
    path = tmp_path / "mine.py"
    write_description(derivation, path)
    again = executed(path.read_text(encoding="utf-8"))
    assert again == derivation.architecture
    assert again.examples == {}
    store = ModuleStore(model)
    expected, found = (build_graph(store.config, store.shapes, store.tied, a) for a in (derivation.architecture, again))
    assert parts(found) == parts(expected)
    checked_by_ruff(path)


def test_only_what_differs_from_the_defaults_is_written() -> None:
    text = description_text(derived(default_config("gemma")))
    assert '    Linear("self_attn.q_proj", "attn_in", "q"),\n' in text
    assert '    Norm("input_layernorm", "residual", "attn_in", offset=1.0),\n' in text
    assert '    Embedding("model.embed_tokens"),\n' in text
    assert "GEMMA = register(\n" in text
    for default in ("keeps_mean", "returns", "facts", "examples", "refuse", "r1_blocked", "Kept", "per_head"):
        assert default not in text
    assert "R1 can be fused" in ast.get_docstring(ast.parse(text))  # type: ignore[operator]


@pytest.mark.parametrize(
    "reason",
    [
        "short",
        "it's \"quoted\" and 'quoted' " * 12,
        'only "double" quotes ' * 12,
        "a backslash \\ and a\nnew line and a tab\t" * 8,
        "thisisonewordwithoutspaces" * 12,
        'triple """ quotes',
    ],
)
def test_any_reason_is_written_as_it_is(reason: str, tmp_path: Path) -> None:
    architecture = Architecture(
        name="odd-1 (derived)",
        model_types=("1-odd", "odd"),
        blocks="layers",
        block=(Linear("a" * 60, "b" * 40, ("c" * 30, "d" * 30), alternating=True), Kept("e")),
        outer=(),
        rope="unknown",
        derived=True,
        r1_blocked=reason,
    )
    path = tmp_path / "mine.py"
    write_description(Derivation(architecture, {}, {"R1": reason}), path)
    assert executed(path.read_text(encoding="utf-8")) == architecture
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--config", str(RUFF), str(path)], check=False
    )
    assert done.returncode == 0


def test_a_description_with_alternatives_is_written_too() -> None:
    groups = ((Linear("a", "attn_in", "fixed"),), (Linear("b", "attn_in", "fixed"), Kept("c")))
    architecture = Architecture("x", ("x",), "layers", (groups,), (Kept("d"),), "half", derived=True)
    assert executed(description_text(Derivation(architecture))) == architecture


def test_facts_and_examples_do_not_count() -> None:
    architecture = Architecture("x", ("x",), "layers", (Kept("a"),), (), "half", facts={"a": "kept"})
    assert replace(architecture, facts={}, examples={"x": Example("LlamaConfig")}) == architecture


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    derivation = derived(default_config("gemma"))
    path = tmp_path / "mine.py"
    path.write_text("precious")
    with pytest.raises(InputError, match=r"mine\.py exists already"):
        write_description(derivation, path)
    assert path.read_text() == "precious"
    with pytest.raises(InputError, match="cannot be written"):
        write_description(derivation, tmp_path / "nowhere" / "mine.py")
