"""Fuzzing finds what descriptions forget, on architectures that are described and on those that are not."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_models

import gyroquant as gq
from gyroquant.cli import main
from gyroquant.inspection.fuzz import THRESHOLD, fuzz, tiny_config
from gyroquant.models.deriving.tiny import causal_model_types
from gyroquant.models.graph.spec import described
from gyroquant.models.stores.base import ModuleStore

METHODS = ("hadamard", "massdiff")


def test_a_described_architecture_is_exact_wherever_it_is_not_refused() -> None:
    report = fuzz("Qwen3ForCausalLM", METHODS)
    assert (report.model_type, report.described_by, report.known) == ("qwen3", "llama", True)
    assert not report.wrong
    assert report.worst is not None
    assert 0 < report.worst < THRESHOLD
    tried = {(f.site, f.method) for f in report.findings if f.error is not None}
    assert {("R1", "hadamard"), ("R4", "massdiff"), ("attn_in online", "hadamard")} <= tried
    assert any("attn_in" in f.refused for f in report.findings if f.method == "hadamard")


def test_an_architecture_without_a_file_is_derived() -> None:
    """Gemma has Llama's parameters, but its norms multiply by one more than their weight."""
    report = fuzz("gemma", METHODS)
    assert (report.described_by, report.known) == ("gemma (derived)", False)
    assert not report.wrong
    assert {"R1", "R1 online", "R2", "R4"} <= {f.site for f in report.findings if f.error is not None}


def test_a_wrong_description_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's description claims all parameters of Gemma, but not that its norms add one to their weight."""
    monkeypatch.setattr(ModuleStore, "derivation", None, raising=False)
    monkeypatch.setattr("gyroquant.models.graph.model_graph.architecture_of", lambda config: described("llama"))
    report = fuzz("gemma", METHODS)
    assert {f.site for f in report.wrong} == {"R1"}
    assert "worst block" in report.wrong[0].fault


def test_an_architecture_that_cannot_be_described_says_so() -> None:
    report = fuzz("zamba", METHODS)
    assert "share parameters" in report.problem
    assert report.worst is None


@pytest.mark.parametrize("name", ["llama", "GPTNeoXConfig", "Qwen2MoeForCausalLM"])
def test_names_of_all_kinds_are_understood(name: str) -> None:
    config = tiny_config(name)
    assert config.model_type in causal_model_types()
    assert config.hidden_size == 64


def test_a_folder_is_made_small(folders: dict, tmp_path: object) -> None:
    config = tiny_config(folders["llama_tied"])
    assert config.tie_word_embeddings is True
    assert config.hidden_size == tiny_models.COMMON["hidden_size"]


@pytest.mark.parametrize("name", ["no_such_model", "bert-base", "/nowhere/config.json"])
def test_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(gq.InputError):
        tiny_config(name)


def test_the_command_fails_when_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gyroquant", "fuzz", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    assert run("gemma", "--method", "hadamard", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["described_by"] == "gemma (derived)"
    with monkeypatch.context() as wrong:
        wrong.setattr(ModuleStore, "derivation", None, raising=False)
        wrong.setattr("gyroquant.models.graph.model_graph.architecture_of", lambda config: described("llama"))
        assert run("gemma", "--method", "hadamard", "--json") == 1
    capsys.readouterr()
    assert run("llama", "--method", "hadamard") == 0
    assert "described by llama" in capsys.readouterr().out
    assert run() == 1
    assert "--all" in capsys.readouterr().err
